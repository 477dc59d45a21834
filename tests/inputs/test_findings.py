"""What a merge says of its own result: symmetry, images that do not fit, photons used twice."""

from __future__ import annotations

import logging

import gemmi
import numpy as np
import pytest
from simulated_unmerged import write_mtz

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.indexing.higher_symmetry import point_group_with, relations
from braggflux.merge.output.odd_images import against_neighbours
from braggflux.merge.output.same_photons import SAME_PHOTONS, residual_over_noise
from braggflux.pipelines import cli

CELL = gemmi.UnitCell(60, 60, 60, 90, 90, 120)
TWIN = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]])
FAST = ("--epochs", "8", "--set", "network_width=0", "--set", "held_out=0")


@pytest.fixture(scope="module")
def r3():
    return ReciprocalAsu(CELL, gemmi.SpaceGroup("R 3:H"), 4.0, False)


def intensities(asu, rng):
    """Normalised intensities of an acentric crystal."""
    value = rng.exponential(1.0, len(asu))
    return np.where(asu.is_centric, rng.standard_normal(len(asu)) ** 2, value)


def twinned(asu, value, share):
    return (1 - share) * value + share * value[asu.refl_id(asu.miller_index @ TWIN)]


def found(asu, value, noise, rng, tolerance=0.5):
    sigma = np.full(len(asu), noise)
    return relations(asu, value + noise * rng.standard_normal(len(asu)), sigma, tolerance)


@pytest.mark.parametrize("noise", [0.02, 0.3, 0.7])
def test_symmetry_of_r32_in_r3(r3, noise):
    rng = np.random.default_rng(0)
    value = twinned(r3, intensities(r3, rng), 0.5)
    both = {r.name: r for r in found(r3, value, noise, rng)}
    assert set(both) == {"k,h,-l"}
    relation = both["k,h,-l"]
    assert relation.is_symmetry
    assert relation.correlation == pytest.approx(relation.largest, abs=0.05)
    assert relation.correlation == pytest.approx(0.5 / (0.5 + noise**2), abs=0.07)
    assert point_group_with(r3.space_group, [relation.matrix]) == "32"


def test_true_r3_and_partial_twins_are_not_called_symmetric(r3):
    rng = np.random.default_rng(1)
    value = intensities(r3, rng)
    for share in (0.0, 0.2, 0.3):
        for relation in found(r3, twinned(r3, value, share), 0.1, rng):
            assert not relation.is_symmetry
    # noise alone says nothing
    assert not any(r.is_symmetry for r in found(r3, np.ones(len(r3)), 1.0, rng))


def test_translational_pseudo_symmetry_is_no_symmetry(r3):
    """Layers of odd l are a tenth as strong."""
    rng = np.random.default_rng(2)
    value = intensities(r3, rng) * np.where(r3.miller_index[:, 2] % 2 == 0, 1.9, 0.1)
    (relation,) = found(r3, value, 0.05, rng)
    assert relation.correlation > 0.15
    assert not relation.is_symmetry


@pytest.mark.parametrize(
    ("group", "names", "cell", "larger"),
    [
        ("P 4", {"k,h,-l"}, (50, 50, 70, 90, 90, 90), "422"),
        ("P 3", {"-h,-k,l", "k,h,-l", "-k,-h,-l"}, (50, 50, 70, 90, 90, 120), "622"),
        ("P 1 2 1", {"-h,-k,l"}, (40, 50, 60, 90, 90.1, 90), "222"),
    ],
)
def test_other_lattices(group, names, cell, larger):
    asu = ReciprocalAsu(gemmi.UnitCell(*cell), gemmi.SpaceGroup(group), 5.0, False)
    rng = np.random.default_rng(3)
    value = intensities(asu, rng)
    operators = [r.matrix for r in found(asu, value, 0.1, rng)]
    total = value.copy()
    for matrix in operators:
        total += value[asu.refl_id(asu.miller_index @ matrix)]
    obeyed = [r for r in found(asu, total / (1 + len(operators)), 0.05, rng) if r.is_symmetry]
    assert len(obeyed) == len(names)
    assert point_group_with(asu.space_group, [r.matrix for r in obeyed]) == larger


def test_a_lattice_without_more_symmetry_has_no_relation():
    cell = gemmi.UnitCell(40, 50, 60, 90, 103, 90)
    asu = ReciprocalAsu(cell, gemmi.SpaceGroup("P 1 21 1"), 5.0, False)
    rng = np.random.default_rng(0)
    assert not found(asu, intensities(asu, rng), 0.1, rng)


def written(path, asu, f2, rng, *, n_images=20, n_per_image=150, image_scale=None, alien=()):
    """Unmerged data of known intensities; ``alien`` images hold other reflections."""
    image = np.repeat(np.arange(n_images), n_per_image)
    row = rng.integers(0, len(asu), len(image))
    true = f2[np.where(np.isin(image, alien), (row * 7 + 11) % len(asu), row)]
    scale = np.ones(n_images) if image_scale is None else image_scale
    mean = 1000.0 * scale[image] * true
    sigma = 20.0 + 0.02 * mean
    columns = {
        "I": ("J", mean + sigma * rng.standard_normal(len(image))),
        "SIGI": ("Q", sigma),
        "BATCH": ("B", image + 101),
    }
    form = {"cell": asu.cell.parameters, "space_group": asu.space_group.xhm()}
    sign = np.where(np.arange(len(row)) % 3, 1, -1)[:, None]  # both Friedel mates
    return write_mtz(path, sign * asu.miller_index[row], columns, **form)


def said(argv, caplog):
    caplog.clear()
    assert cli.main(["merge", *map(str, argv), *FAST]) == 0
    return " ".join(r.message for r in caplog.records if r.levelno >= logging.WARNING)


@pytest.mark.slow
def test_the_line_about_symmetry(r3, tmp_path, caplog):
    rng = np.random.default_rng(4)
    value = intensities(r3, rng)
    for name, share in (("high", 0.5), ("low", 0.0)):
        path = written(tmp_path / f"{name}.mtz", r3, twinned(r3, value, share), rng)
        for options in ((), ("--anomalous",)):
            out = tmp_path / f"{name}{len(options)}"
            line = said([path, "--out", out, *options], caplog)
            assert ("intensities obey k,h,-l" in line) == (name == "high")
            assert ("point group 32" in line) == (name == "high")


def test_images_that_do_not_fit_are_named(r3, tmp_path, caplog):
    rng = np.random.default_rng(5)
    value = intensities(r3, rng)
    slow = np.exp(0.5 * np.sin(np.arange(20) / 4)) * rng.normal(1, 0.03, 20)
    assert "images" not in said(
        [written(tmp_path / "a.mtz", r3, value, rng, image_scale=slow), "--out", tmp_path / "a"],
        caplog,
    )
    slow[7] *= 0.36
    path = written(tmp_path / "b.mtz", r3, value, rng, image_scale=slow, alien=(13,))
    line = said([path, "--out", tmp_path / "b"], caplog)
    assert "1 of 20 images are much brighter or fainter" in line
    assert "theirs): 108 (0." in line
    assert "1 of 20 images do not agree with the rest" in line
    assert "crystal?): 114 (" in line


def test_neighbours_are_of_the_same_dataset():
    level = np.array([0.0] * 6 + [2.0] * 6)
    np.testing.assert_allclose(against_neighbours(level, np.repeat([0, 1], 6)), 0.0)
    level[3] = -1.0
    assert against_neighbours(level, np.repeat([0, 1], 6))[3] == pytest.approx(-1.0)


@pytest.mark.slow
def test_a_prior_model_of_the_same_photons(r3, tmp_path, caplog):
    """A merge of these data is told from one of other data, and from the truth."""
    rng = np.random.default_rng(6)
    value = intensities(r3, rng)
    same, other = (written(tmp_path / f"{n}.mtz", r3, value, rng) for n in ("same", "other"))
    form = {"cell": CELL.parameters, "space_group": "R 3:H"}
    write_mtz(tmp_path / "truth.mtz", r3.miller_index, {"FC": ("F", value**0.5)}, **form)
    for path in (same, other):
        said([path, "--out", tmp_path / path.stem], caplog)
    models = {
        "same": tmp_path / "same" / "merged.mtz",
        "other": tmp_path / "other" / "merged.mtz",
        "truth": tmp_path / "truth.mtz",
    }
    for name, model in models.items():
        argv = [same, "--out", tmp_path / f"with_{name}", "--prior-model", model]
        assert ("the same photons count twice" in said(argv, caplog)) == (name == "same")


def test_residuals_of_independent_data_and_of_the_same():
    rng = np.random.default_rng(7)
    true, inv_d2 = rng.exponential(100.0, 3000), rng.uniform(0, 1, 3000)
    sigma = 3.0 + 0.05 * true
    one, two = (true + sigma * rng.standard_normal(3000) for _ in range(2))
    smooth = np.exp(-inv_d2)  # a falloff that another program kept
    assert residual_over_noise(one, sigma, true * smooth, inv_d2) == pytest.approx(1.0, abs=0.15)
    assert residual_over_noise(one, sigma, two * smooth, inv_d2) == pytest.approx(2.0, abs=0.3)
    again = one * smooth * rng.normal(1.0, 0.01, 3000)
    assert residual_over_noise(one, sigma, again, inv_d2) < 0.2 < SAME_PHOTONS
    assert residual_over_noise(one[:20], sigma[:20], two[:20], inv_d2[:20]) == float("inf")
