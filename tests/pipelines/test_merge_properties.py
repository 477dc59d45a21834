"""A merge knows nothing of how its input is written down: order, names, equivalents, units.

Every test merges two files that say the same and compares the merged amplitudes.
"""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
from simulated_unmerged import observed, write_mtz

from braggflux.integrator.crystal import symmetry
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines import cli

pytestmark = pytest.mark.slow

CELL = (40.0, 50.0, 60.0, 90.0, 90.0, 90.0)
SPACE_GROUP = "P 21 21 21"
FAST = ("--epochs", "60", "--set", "flicker=off", "--set", "network_width=8")
#: Median and largest change of an amplitude, in its sigma. Seen 2026-11-30: 0.027 and 0.53 for
#: equivalents (the order of the rows, and with it that of the minibatches, changes), less for the
#: others. Which of two scale models fits better is a choice by held-out data that may tip.
MEDIAN, LARGEST = 0.1, 1.0
#: The unit of all amplitudes together is free within what the scale's own terms leave open.
UNIT = 0.02


@pytest.fixture(scope="module")
def data():
    asu = ReciprocalAsu(gemmi.UnitCell(*CELL), gemmi.SpaceGroup(SPACE_GROUP), 5.0, False)
    rng = np.random.default_rng(5)
    hkl, columns = observed(asu, rng, n_images=10, n_per_image=200)
    return hkl * rng.choice([1, -1], (len(hkl), 1)), columns  # mates are alike


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    return merged(*data, tmp_path_factory.mktemp("straight"))


def merged(hkl, columns, folder):
    out = folder / "out"
    path = write_mtz(folder / "data.mtz", hkl, columns, cell=CELL, space_group=SPACE_GROUP)
    assert cli.main(["merge", str(path), "--out", str(out), "--anomalous", *FAST]) == 0
    return read_merged_mtz(out / "merged.mtz").table


def shuffled(hkl, columns):
    order = np.random.default_rng(1).permutation(len(hkl))
    return hkl[order], {n: (kind, v[order]) for n, (kind, v) in columns.items()}


def images_renumbered(hkl, columns):
    kind, image = columns["BATCH"]
    return hkl, columns | {"BATCH": (kind, image + 5000)}


def equivalents(hkl, columns):
    """Every index by a random rotation of the point group."""
    rotations = np.array(symmetry.rotations(gemmi.SpaceGroup(SPACE_GROUP)))
    chosen = rotations[np.random.default_rng(2).integers(0, len(rotations), len(hkl))]
    return np.einsum("ni,nij->nj", hkl, chosen), columns


def rescaled(hkl, columns):
    """Other units, as of a detector with another gain."""
    changed = {n: (columns[n][0], 7.3 * columns[n][1]) for n in ("I", "SIGI")}
    return hkl, columns | changed


@pytest.mark.parametrize("change", [shuffled, images_renumbered, equivalents, rescaled])
def test_the_same_data_give_the_same_amplitudes(change, data, straight, tmp_path):
    ours = merged(*change(*data), tmp_path)
    assert (ours.miller_index == straight.miller_index).all()
    median, largest, unit = changes(straight, ours)
    assert median < MEDIAN
    assert largest < LARGEST
    expected = 7.3**0.5 if change is rescaled else 1.0
    assert unit == pytest.approx(expected, rel=UNIT)


def changes(table, other):
    """Median and largest change of F(+), F(-) in sigma, and ratio of the units."""
    found, units = [], []
    for mate in ("plus", "minus"):
        f, sigma = getattr(table, f"f_{mate}"), getattr(table, f"sigma_f_{mate}")
        g = getattr(other, f"f_{mate}")
        seen = np.isfinite(f)
        assert (np.isfinite(g) == seen).all()
        units.append(np.sum(f[seen] * g[seen]) / np.sum(f[seen] ** 2))
        found.append(np.abs(g[seen] / units[-1] - f[seen]) / sigma[seen])
    change = np.concatenate(found)
    return np.median(change), change.max(), np.mean(units)


def test_a_change_of_the_data_is_noticed(data, straight, tmp_path):
    """The comparison can fail: with a tenth of the intensities 20 % larger it does."""
    hkl, columns = data
    kind, value = columns["I"]
    value = np.where(np.arange(len(value)) % 10 == 0, 1.2 * value, value)
    _, largest, _ = changes(straight, merged(hkl, columns | {"I": (kind, value)}, tmp_path))
    assert largest > 10 * LARGEST
