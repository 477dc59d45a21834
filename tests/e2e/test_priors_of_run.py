"""Priors that a run takes from outside: a model's amplitudes, and other data sets."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
import pytest

from braggflux.fixtures.crystals import REFERENCE_MODEL
from braggflux.fixtures.simulate import simulate
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    DialsFlag,
    read_experiments,
    read_reflections,
    write_reflections,
)
from braggflux.pipelines import cli
from braggflux.pipelines.compare.run import compare
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.config.schema import updated
from braggflux.pipelines.dials.process import finish
from braggflux.pipelines.integration.data_sets import read_tables
from braggflux.pipelines.integration.run import run

pytestmark = pytest.mark.slow

#: A hundredth of the photons of the preset.
WEAK = {"intensity.photons_per_f2": 1e-5}
SHORT = {"training.epochs": 1, "training.device": "cpu"}


def mean_amplitudes(path, labels=("F",)) -> dict[tuple[int, int, int], float]:
    """Mean of the columns of each reflection that has them all."""
    mtz = gemmi.read_mtz_file(str(path))
    values = np.mean([np.array(mtz.column_with_label(label)) for label in labels], axis=0)
    hkl = map(tuple, mtz.make_miller_array().tolist())
    return {h: v for h, v in zip(hkl, values, strict=True) if np.isfinite(v)}


def r_factor(merged, truth) -> float:
    """Sum of |k F - F_true| over that of F_true."""
    ours, true = mean_amplitudes(merged), mean_amplitudes(truth, ("F(+)", "F(-)"))
    shared = sorted(ours.keys() & true.keys())
    assert len(shared) > 300
    f, t = (np.array([d[h] for h in shared]) for d in (ours, true))
    return float(np.abs(f * (f @ t) / (f @ f) - t).sum() / t.sum())


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("weak"), "tiny", overrides=WEAK)


@pytest.mark.parametrize("coupling", ["joint", pytest.param("staged", marks=pytest.mark.slow)])
def test_amplitudes_of_a_model_help_weak_data(weak, tmp_path, coupling):
    config = RunConfig(expt=weak.expt, refl=weak.refl)
    config = updated(config, SHORT | {"training.coupling": coupling, "extraction.box": "7,9,9"})
    plain = run(updated(config, {"out": str(tmp_path / "plain")}))
    given = {"prior_model": str(weak.model), "out": str(tmp_path / "model")}
    with_model = run(updated(config, given))
    assert 0.5 < with_model.read_metrics()[-1]["sigma_a"] < 1
    history = gemmi.read_mtz_file(str(with_model.merged)).history
    assert any("the prior of a model" in line for line in history)
    before, after = (r_factor(d.merged, weak.truth_mtz) for d in (plain, with_model))
    assert after < 0.8 * before
    assert with_model.read_provenance()["inputs"]["prior_model"]["sha256"]


def test_a_model_of_another_crystal_is_refused_before_the_work(weak, tmp_path):
    structure = gemmi.read_structure(str(weak.model))
    structure.cell = gemmi.UnitCell(60, 60, 90, 90, 90, 90)
    structure.write_pdb(str(tmp_path / "other.pdb"))
    config = RunConfig(
        expt=weak.expt, refl=weak.refl, prior_model=tmp_path / "other.pdb", out=tmp_path / "run"
    )
    with pytest.raises(UserError, match=r"other\.pdb"):
        run(config)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Dark and light frames of little dose; the light structure has seven residues moved."""
    folder = tmp_path_factory.mktemp("pair")
    structure = gemmi.read_structure(str(REFERENCE_MODEL))
    for residue in structure[0]["A"][67:74]:
        for atom in residue:
            atom.pos += gemmi.Position(0.5, 0.5, 0.5)
    structure.write_pdb(str(folder / "moved.pdb"))
    dose = {"intensity.photons_per_f2": 1e-4, "scan.n_images": 24}
    models = {"dark": REFERENCE_MODEL, "light": folder / "moved.pdb"}
    return {
        name: simulate(folder / name, "tiny", k, overrides=dose | {"name": name}, model=model)
        for k, (name, model) in enumerate(models.items())
    }


def configured(pair, out, **options) -> RunConfig:
    dark, light = pair["dark"], pair["light"]
    config = RunConfig(expt=dark.expt, refl=dark.refl, more_data=(light.expt, light.refl), out=out)
    small = {"extraction.box": "5,9,11", "merge.anomalous": False}
    return updated(config, SHORT | small | {k.replace("__", "."): v for k, v in options.items()})


def difference_error(pair, folder) -> float:
    """Rms error of F_light - F_dark over the rms of the true one."""
    labels = ("F(+)", "F(-)")
    true = [mean_amplitudes(pair[k].truth_mtz, labels) for k in ("dark", "light")]
    ours = [mean_amplitudes(folder / f"{k}_merged.mtz") for k in ("dark", "light")]
    shared = sorted(set.intersection(*(set(d) for d in (*true, *ours))))
    assert len(shared) > 300
    dark, light, f, g = (np.array([d[h] for h in shared]) for d in (*true, *ours))
    difference, expected = (g - f) * (f @ dark) / (f @ f), light - dark
    return float(np.sqrt(np.mean((difference - expected) ** 2) / np.mean(expected**2)))


@pytest.fixture(scope="module")
def related(pair, tmp_path_factory):
    return finish(run(configured(pair, tmp_path_factory.mktemp("run") / "run", parents="none,0")))


def test_each_data_set_has_its_files(pair, related):
    names = {"merged.mtz", "half_sets.mtz", "statistics.csv", "integrated.refl"}
    names |= {"integrated.expt", "unmerged.mtz"}
    for name in ("dark", "light"):
        assert {f"{name}_{n}" for n in names} <= {p.name for p in related.path.iterdir()}
        assert (related.path / "mtz" / f"{name}_epoch_0001.mtz").is_file()
        history = gemmi.read_mtz_file(str(related.path / f"{name}_merged.mtz")).history
        assert any("given the relatives in other datasets" in line for line in history)
        table = read_reflections(related.path / f"{name}_integrated.refl")
        (identifier,) = table.identifiers.values()
        (expected,) = read_experiments(pair[name].expt)
        assert identifier == expected.identifier
        assert set(table["id"]) == {0}
        unmerged = gemmi.read_mtz_file(str(related.path / f"{name}_unmerged.mtz"))
        assert len(unmerged.batches) == 24
    assert not (related.path / "merged.mtz").exists()
    row = related.read_metrics()[-1]
    assert row["cc_half/dark"] != row["cc_half/light"]
    assert 1e-4 < row["one_minus_r2"] < 0.1
    page = related.report.read_text()
    assert "<h2>dark</h2>" in page
    assert "<h2>light</h2>" in page


@pytest.mark.slow
def test_parents_make_the_difference_better(pair, related, tmp_path):
    """Data sets without relatives have the same pixels, integrator and scale."""
    apart = run(configured(pair, tmp_path / "run"))
    assert difference_error(pair, related.path) < 0.8 * difference_error(pair, apart.path)
    history = gemmi.read_mtz_file(str(apart.path / "light_merged.mtz")).history
    assert not any("relatives" in line for line in history)


@pytest.mark.slow
def test_the_intensities_of_a_run_stay_two_data_sets(pair, related, tmp_path):
    out = tmp_path / "merged"
    argv = ["merge", str(related.intensities), "--parents", "none,0", "--out", str(out)]
    assert cli.main([*argv, "--epochs", "30"]) == 0
    for name in ("dark", "light"):
        (out / f"intensities_{name}_merged.mtz").rename(out / f"{name}_merged.mtz")
    assert difference_error(pair, out) < 1.3 * difference_error(pair, related.path)


@pytest.mark.parametrize(
    ("parents", "said"),
    [
        ("none,0,1", r"names 3 parents \(none,0,1\) for 2 datasets"),
        ("none,2", "dataset 2 does not exist"),
        ("none,1", "its own parent"),
        ("1,0", "its own parent or ancestor"),
        ("none,x", "'x' is neither none nor the number"),
    ],
)
def test_wrong_parents_are_refused_before_the_work(pair, tmp_path, parents, said):
    with pytest.raises(UserError, match=said):
        run(configured(pair, tmp_path / "run", parents=parents))
    assert not (tmp_path / "run").exists()


def test_other_mistakes_of_several_data_sets(pair, related, tmp_path):
    dark, light = pair["dark"], pair["light"]
    config = configured(pair, tmp_path / "run", parents="none,0", merge__prior="wilson")
    with pytest.raises(UserError, match=r"merge\.prior=wilson"):
        run(config)
    with pytest.raises(UserError, match="3 files are given"):
        run(replace(config, more_data=(light.expt,)))
    with pytest.raises(UserError, match="swapped"):
        run(replace(config, more_data=(light.refl, light.expt)))
    table = read_reflections(light.refl)
    integrated = np.where(table["flags"] > 0, DialsFlag.INTEGRATED_PRF, 0).astype(np.uint64)
    path = tmp_path / "integrated.refl"
    write_reflections(path, replace(table, columns=table.columns | {"flags": integrated}))
    with pytest.raises(UserError, match="same DIALS step"):
        read_tables(replace(config, more_data=(light.expt, path)))
    with pytest.raises(UserError, match="count twice"):
        run(replace(config, more_data=(dark.expt, dark.refl), merge=configured(pair, None).merge))
    with pytest.raises(UserError, match="one is compared at a time"):
        compare(related, truth=dark.truth_mtz)
