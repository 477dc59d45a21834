"""Options of `braggflux merge` that others switch off: they act, or the merge says that not."""

from __future__ import annotations

import logging

import gemmi
import numpy as np
import pytest
from simulated_unmerged import FAST, write_mtz

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines import cli
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.config.run_settings import say_idle_of_run
from braggflux.pipelines.config.schema import updated
from braggflux.pipelines.integration.problem import merge_settings
from braggflux.pipelines.merging.settings import settled

FORM = {"cell": (40, 50, 60, 90, 90, 90), "space_group": "P 21 21 21"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Dark and light of noisy data, amplitudes alike to 2 %; the files and |F| of each."""
    folder = tmp_path_factory.mktemp("pair")
    asu = ReciprocalAsu(
        gemmi.UnitCell(*FORM["cell"]), gemmi.SpaceGroup(FORM["space_group"]), 4.5, False
    )
    rng = np.random.default_rng(1)
    dark = np.sqrt(rng.exponential(1000.0, len(asu)) * asu.epsilon)
    light = np.abs(dark * (1 + 0.02 * rng.standard_normal(len(asu))))
    paths = []
    for name, f in (("dark", dark), ("light", light)):
        row = rng.integers(0, len(asu), 4 * len(asu))
        sigma = np.full(len(row), 800.0)
        columns = {
            "I": ("J", f[row] ** 2 + sigma * rng.standard_normal(len(row))),
            "SIGI": ("Q", sigma),
            "BATCH": ("B", np.sort(rng.integers(1, 9, len(row)))),
        }
        paths.append(write_mtz(folder / f"{name}.mtz", asu.miller_index[row], columns, **FORM))
    return paths, asu, light


def merged(paths, out, *options):
    argv = ["merge", *map(str, paths), "--out", str(out), *FAST, *options]
    assert cli.main(argv) == 0
    return read_merged_mtz(out / "light_merged.mtz").table


@pytest.mark.slow
def test_parents_alone_mean_the_double_wilson_prior(pair, tmp_path):
    """The same numbers as with all three options, and nearer to the truth than without."""
    paths, asu, truth = pair
    parents = ("--parents", "none,0")
    full = (*parents, "--prior", "double-wilson", "--set", "sigma=difference")
    named = merged(paths, tmp_path / "named", *parents)
    explicit = merged(paths, tmp_path / "explicit", *full)
    alone = merged(paths, tmp_path / "alone")
    np.testing.assert_array_equal(named.f, explicit.f)
    np.testing.assert_array_equal(named.sigma_f, explicit.sigma_f)
    both = [np.corrcoef(t.f, truth[asu.refl_id(t.miller_index)])[0, 1] for t in (named, alone)]
    assert both[0] > both[1] + 0.01
    marginal = merged(paths, tmp_path / "marginal", *parents, "--set", "sigma=amplitude")
    np.testing.assert_array_equal(named.f, marginal.f)
    assert np.median(marginal.sigma_f / named.sigma_f) > 1.05


def test_parents_under_wilsons_prior_are_refused(pair, tmp_path, capsys):
    argv = [*map(str, pair[0]), "--out", str(tmp_path / "out"), "--parents", "none,0"]
    assert cli.main(["merge", *argv, "--prior", "wilson"]) == 2
    assert "--parents cannot act under --prior wilson" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_auto_means():
    default = MergeConfig()
    assert (settled(default, None).prior, settled(default, None).sigma) == ("wilson", "amplitude")
    assert settled(default, (None, None)).prior == "wilson"
    assert settled(default, (None, 0)).prior == "double-wilson"
    assert settled(default, (None, 0)).sigma == "difference"
    assert settled(MergeConfig(anomalous=True), None).prior == "auto"
    with_r = settled(MergeConfig(anomalous=True, correlation=0.99), None)
    assert (with_r.prior, with_r.sigma) == ("double-wilson", "amplitude")
    with pytest.raises(UserError, match="--correlation cannot act"):
        settled(MergeConfig(prior="wilson", correlation=0.99), None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"laue_lp": True}, "laue_lp=True"),
        ({"stills": True, "absorption_order": 6}, "absorption_order=6"),
        ({"laue": True, "flicker": "off"}, "flicker=off"),
        ({"stills": True, "detector_network_width": 4}, "detector_network_width=4"),
        ({"physical_scale": False, "b_factor_spacing_deg": 5.0}, "b_factor_spacing_deg=5.0"),
        ({"laue": True, "drift_spacing_deg": 5.0}, "drift_spacing_deg=5.0"),
        ({"likelihood": "normal", "dof": 8.0}, "dof=8.0"),
        ({"sigma": "difference"}, "sigma=difference"),
        ({"anomalous": True, "prior": "double-wilson", "sigma": "difference"}, "sigma=difference"),
        ({"n_correlation_shells": 5}, "n_correlation_shells=5"),
        ({"n_reference_shells": 5}, "n_reference_shells=5"),
        ({"network_width": 0, "metadata": ("X", "Y")}, "metadata=['X', 'Y']"),
        ({"network_width": 0, "alternatives": "on"}, "alternatives=on"),
        ({"wilson_b": 20.0}, "wilson_b=20.0"),
        ({"falloff": "sphere"}, "falloff=sphere"),
        ({"stream_above": 0}, "stream_above=0"),
    ],
)
def test_idle_options_are_named(options, named, caplog):
    with caplog.at_level(logging.WARNING):
        settled(MergeConfig(**options), None)
    assert any(f"without effect: {named}" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"laue": True, "laue_lp": True, "wilson_b": 20.0, "n_spectrum_knots": 20},
        {"stills": True, "stream_above": 0, "falloff": "sphere"},
        {"absorption_order": 6, "dof": 8.0},
        {"anomalous": True, "prior": "double-wilson", "n_correlation_shells": 5},
    ],
)
def test_options_that_act_are_not_named(options, caplog):
    with caplog.at_level(logging.WARNING):
        settled(MergeConfig(**options), None)
    assert not caplog.records


def test_options_that_the_files_leave_idle(pair, tmp_path, caplog):
    options = ("--set", "absorption_order=6", "--set", "photon_counts=false")
    merged(pair[0], tmp_path / "out", *options)
    said = " ".join(r.message for r in caplog.records if r.levelno >= logging.WARNING)
    assert "absorption_order=6 (the files do not say where" in said
    assert "photon_counts=False (the files hold no photon counts)" in said


def test_settings_that_frozen_scales_overrule_are_named(pair, tmp_path, caplog):
    merged(pair[0], tmp_path / "first")
    options = ("--freeze-scales", str(tmp_path / "first"), "--likelihood", "normal")
    merged(pair[0], tmp_path / "second", *options)
    said = " ".join(r.message for r in caplog.records if r.levelno >= logging.WARNING)
    assert "likelihood=normal" in said
    assert "was fitted with studentt" in said


@pytest.mark.slow
def test_the_old_name_of_the_prior_model(pair, tmp_path, caplog):
    """The same numbers under both names, and a note for the old one."""
    reference = tmp_path / "alone" / "dark_merged.mtz"
    merged(pair[0], tmp_path / "alone")
    new = merged(pair[0], tmp_path / "new", "--prior-model", str(reference))
    caplog.clear()
    old = merged(pair[0], tmp_path / "old", "--reference", str(reference))
    np.testing.assert_array_equal(new.f, old.f)
    assert any("is now --prior-model" in r.message for r in caplog.records)
    both = ["--reference", str(reference), "--prior-model", str(reference)]
    argv = ["merge", *map(str, pair[0]), "--out", str(tmp_path / "both"), *both]
    assert cli.main(argv) == 2


@pytest.mark.parametrize(
    ("options", "is_process", "named"),
    [
        (
            {"extraction.box": (5, 9, 9), "extraction.n_sigma": 3.0},
            False,
            "extraction.n_sigma=3.0",
        ),
        (
            {"merge.physical_scale": False, "merge.drift_spacing_deg": 5.0},
            False,
            "merge.drift_spacing_deg=5.0",
        ),
        (
            {"merge.prior": "wilson", "merge.n_correlation_shells": 5},
            True,
            "n_correlation_shells=5",
        ),
        ({"merge.correlation": 0.99, "merge.n_correlation_shells": 5}, False, "shells=5"),
        ({"merge.epochs": 5}, False, "merge.epochs=5"),
        ({"merge.stills": True}, False, "merge.stills=True"),
        ({"merge.anomalous": False, "merge.prior": "double-wilson"}, False, "double-wilson"),
        ({"merge.prior": "wilson", "merge.correlation": 0.99}, False, "merge.correlation=0.99"),
        ({"merge.likelihood": "normal", "merge.dof": 8.0}, False, "merge.dof=8.0"),
        ({"dials.nproc": 2}, False, "dials.nproc=2"),
        ({"reference": "known.mtz"}, True, "reference=known.mtz"),
        ({"parents": "none,0"}, True, "parents=none,0"),
        ({"parents": "none,0", "merge.anomalous": False, "merge.correlation": 0.99}, False, None),
        ({"merge.sigma": "difference"}, False, "merge.sigma=difference"),
        (
            {"dials.has_reference": False, "dials.scale_args": ("anomalous=True",)},
            True,
            "dials.scale_args",
        ),
        ({"dials.nproc": 2, "merge.n_correlation_shells": 5}, True, None),
        ({"merge.photon_counts": False, "merge.prior": "wilson"}, False, None),
        ({"reference": "known.mtz", "extraction.n_sigma": 3.0}, False, None),
    ],
)
def test_idle_options_of_a_run(options, is_process, named, caplog):
    say_idle_of_run(updated(RunConfig(), options), is_process=is_process)
    said = [r.message for r in caplog.records]
    assert len(said) == (named is not None)
    assert named is None or named in said[0]


def test_what_a_run_calls_idle_does_not_act():
    """Options of merges alone, and Bijvoet mates that are not there."""
    options = {"merge.laue": True, "merge.flicker": "off", "merge.falloff": "scale"}
    options |= {"merge.network_width": 4, "merge.alternatives": "on", "merge.anomalous": False}
    given = updated(RunConfig(), options | {"merge.prior": "double-wilson"})
    plain = updated(RunConfig(), {"merge.anomalous": False})
    assert merge_settings(given, 2.0) == merge_settings(plain, 2.0)
    assert merge_settings(plain, 2.0).prior == "wilson"
    assert merge_settings(RunConfig(), 2.0).prior == "double-wilson"
    acting = updated(RunConfig(), {"merge.prior": "wilson", "extraction.d_min": 3.0})
    assert merge_settings(acting, 2.0).prior == "wilson"
    assert merge_settings(acting, 2.0).d_min == pytest.approx(3.0, rel=2e-3)
