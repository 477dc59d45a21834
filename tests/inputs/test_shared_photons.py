"""The same photons in several inputs: told from independent measurements of the same spots."""

from __future__ import annotations

import logging
from dataclasses import replace

import gemmi
import numpy as np
import pytest
from simulated_unmerged import write_mtz

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.io.formats.mtz_observations import read_mtz
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.io.shared_photons import (
    ONE_MEASUREMENT,
    Spots,
    residual_of_pairs,
    shared_photons,
)
from braggflux.pipelines import cli

CELL = gemmi.UnitCell(40, 50, 60, 90, 90, 90)
FORM = {"cell": CELL.parameters, "space_group": "P 21 21 21"}
FAST = ("--epochs", "4", "--set", "network_width=0", "--set", "held_out=0")


@pytest.fixture(scope="module")
def asu():
    return ReciprocalAsu(CELL, gemmi.SpaceGroup("P 21 21 21"), 4.5, False)


def columns_of(asu, noise_seed, n_images=10, n_per_image=150, relative=0.02):
    """Spots of one geometry; the noise is that of ``noise_seed``."""
    rng = np.random.default_rng(0)
    f2 = rng.exponential(1000.0, len(asu))
    image = np.repeat(np.arange(n_images), n_per_image)
    row = rng.integers(0, len(asu), len(image))
    x, y = rng.uniform(0, 1000, (2, len(image)))
    sigma = 60.0 + relative * f2[row]
    noise = sigma * np.random.default_rng(noise_seed).standard_normal(len(image))
    columns = {
        "I": ("J", f2[row] + noise),
        "SIGI": ("Q", sigma),
        "BATCH": ("B", image + 1),
        "X": ("R", x),
        "Y": ("R", y),
    }
    return asu.miller_index[row], columns


def scaled(rows):
    """As a scaling program leaves them: 20 % across the detector, a factor a batch, more error."""
    hkl, columns = rows
    x, batch = columns["X"][1], columns["BATCH"][1]
    factor = (1 + 2e-4 * (x - 500)) * np.exp(0.5 * np.sin(batch))
    intensity, sigma = factor * columns["I"][1], factor * columns["SIGI"][1]
    larger = np.sqrt((1.3 * sigma) ** 2 + (0.03 * intensity) ** 2)
    return hkl, columns | {"I": ("J", intensity), "SIGI": ("Q", larger)}


def save(folder, name, rows, chosen=slice(None)):
    hkl, columns = rows
    columns = {k: (kind, v[chosen]) for k, (kind, v) in columns.items()}
    return write_mtz(folder / f"{name}.mtz", hkl[chosen], columns, **FORM)


def merge(*argv):
    return cli.main(["merge", *map(str, argv), *FAST])


@pytest.mark.parametrize("has_places", [True, False])
def test_same_and_independent(asu, tmp_path, has_places):
    kinds = {"one": columns_of(asu, 1), "two": columns_of(asu, 2)}
    kinds["scaled"] = scaled(kinds["one"])
    data = {name: read_mtz(save(tmp_path, name, rows)) for name, rows in kinds.items()}
    if not has_places:
        data = {n: replace(d, metadata={"BATCH": d.metadata["BATCH"]}) for n, d in data.items()}
    step = 1.0 if has_places else None
    spots = {name: Spots(d, step, 1) for name, d in data.items()}
    assert residual_of_pairs(spots["one"], spots["one"]) == 0.0
    assert residual_of_pairs(spots["one"], spots["scaled"]) < ONE_MEASUREMENT / 2
    assert residual_of_pairs(spots["one"], spots["two"]) == pytest.approx(1.0, abs=0.25)
    assert [p[:2] for p in shared_photons(list(data.values()))] == [(0, 2)]


@pytest.mark.slow
def test_what_is_done_about_them(asu, tmp_path, capsys, caplog):
    one, two = columns_of(asu, 1), columns_of(asu, 2)
    a, b = save(tmp_path, "a", one), save(tmp_path, "b", two)
    other = save(tmp_path, "scaled", scaled(one))
    assert merge(a, b, a, "--out", tmp_path / "x") == 2
    assert "a.mtz is given twice" in capsys.readouterr().err
    assert merge(a, other, "--group", "all", "--out", tmp_path / "x") == 2
    assert "hold the same photons, treated differently" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    options = ("--parents", "none,0,1", "--correlation", "0.9")
    assert merge(a, b, other, *options, "--out", tmp_path / "x") == 0
    assert "--parents: a (dataset 0) and scaled (dataset 2) hold the same photons" in caplog.text
    assert "a (dataset 0) and b" not in caplog.text
    caplog.clear()
    assert merge(a, other, "--out", tmp_path / "apart") == 0
    assert "both count in the scale" in caplog.text
    caplog.clear()
    assert merge(a, b, "--group", "all", "--out", tmp_path / "both") == 0
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_sweeps_that_overlap_in_a_group_count_once(asu, tmp_path, caplog):
    """Images 1 to 7 in one file and 4 to 10 in another: what all ten in one file give."""
    rows = columns_of(asu, 1)
    image = rows[1]["BATCH"][1]
    whole = save(tmp_path, "whole", rows)
    parts = save(tmp_path, "a", rows, image <= 7), save(tmp_path, "b", rows, image >= 4)
    assert merge(whole, "--out", tmp_path / "whole") == 0
    assert merge(*parts, "--group", "all", "--out", tmp_path / "parts") == 0
    assert "600 of 2100 observations are copies of others" in caplog.text
    one, two = (read_merged_mtz(tmp_path / n / "merged.mtz").table for n in ("whole", "parts"))
    np.testing.assert_array_equal(one.n_plus, two.n_plus)
    assert np.corrcoef(one.f, two.f)[0, 1] > 0.999
