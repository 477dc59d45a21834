"""Mates that a prior ties: F(+) and F(-) stay each its own, their difference gets better.

The true amplitudes of the simulation score both. What a peak height of an anomalous map is
proportional to is the correlation of its coefficients with the true differences.
"""

from __future__ import annotations

import gemmi
import numpy as np
import pytest

from braggflux.fixtures.unmerged import UnmergedSettings, unmerged_sweep
from braggflux.merge.config import MergeConfig
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines.inputs.inputs import MergeInputs
from braggflux.pipelines.maps.difference_map import weighted_differences
from braggflux.pipelines.merging.merge import merge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep():
    return unmerged_sweep(
        UnmergedSettings(n_images=720, width=0.5, spots_per_image=14.0, redundancy=4.0)
    )


@pytest.fixture(scope="module")
def merged(sweep, tmp_path_factory):
    """File of each prior; r is that of the truth."""
    folder = tmp_path_factory.mktemp("coupled")
    sweep.write_mtz(folder / "unmerged.mtz")
    plus, minus = abs(sweep.truth.f_plus), abs(sweep.truth.f_minus)
    r = float(np.sqrt(1 - 2 * np.mean((plus - minus) ** 2) / np.mean(plus**2)))
    files = {}
    for prior, correlation in (("wilson", None), ("double-wilson", r)):
        config = MergeConfig(anomalous=True, epochs=60, prior=prior, correlation=correlation)
        inputs = MergeInputs((folder / "unmerged.mtz",), folder / prior)
        (path,) = merge(inputs, config)
        files[prior] = read_merged_mtz(path)
    return files


class Score:
    """Differences of one file beside the true ones, over the acentric pairs, (P,) each."""

    def __init__(self, sweep, file):
        t, table = sweep.truth, file.table
        index = {tuple(h): i for i, h in enumerate(t.miller_index_asu.tolist())}
        row = np.array([index[tuple(h)] for h in table.miller_index.tolist()])
        plus, minus = abs(t.f_plus)[row], abs(t.f_minus)[row]
        pair = np.isfinite(table.f_plus) & np.isfinite(table.f_minus)
        mean = (table.f_plus + table.f_minus)[pair] / 2
        true_mean = (plus + minus)[pair] / 2
        self.scale = (mean @ true_mean) / (mean @ mean)
        self.true = (plus - minus)[pair]
        self.own = (table.f_plus - table.f_minus)[pair]
        variance = (table.sigma_f_plus**2 + table.sigma_f_minus**2)[pair]
        inv_d2 = file.cell.calculate_1_d2_array(table.miller_index[pair])
        self.weighted = weighted_differences(self.own, variance, inv_d2)
        self.coupled, self.sigma = table.difference[pair], table.sigma_difference[pair]

    def correlation(self, values):
        return np.corrcoef(values, self.true)[0, 1]


@pytest.fixture(scope="module")
def scores(sweep, merged):
    return {prior: Score(sweep, file) for prior, file in merged.items()}


def test_each_mate_is_its_own_whatever_ties_them(merged):
    free, tied = (merged[prior].table for prior in ("wilson", "double-wilson"))
    np.testing.assert_array_equal(free.miller_index, tied.miller_index)
    for mate in ("plus", "minus"):
        for value in ("f", "i"):
            name, sigma = f"{value}_{mate}", f"sigma_{value}_{mate}"
            seen = np.isfinite(getattr(free, name))
            np.testing.assert_array_equal(seen, np.isfinite(getattr(tied, name)))
            x, error = getattr(free, name)[seen], getattr(free, sigma)[seen]
            assert np.median(np.abs(getattr(tied, name)[seen] - x) / error) < 0.2, name
            assert np.median(getattr(tied, sigma)[seen] / error) == pytest.approx(1, abs=0.1)


def test_weighted_differences_are_no_worse_for_the_coupling(scores):
    free, tied = scores["wilson"], scores["double-wilson"]
    assert free.correlation(free.own) > 0.3
    assert free.correlation(free.weighted) > free.correlation(free.own)
    assert tied.correlation(tied.weighted) > 0.99 * free.correlation(free.weighted)


def test_the_coupled_difference_is_nearer_to_the_truth(scores):
    free, tied = scores["wilson"], scores["double-wilson"]
    assert tied.correlation(tied.coupled) > free.correlation(free.own) + 0.01
    error = {
        k: s.scale * v - s.true
        for k, s, v in (("own", free, free.own), ("coupled", tied, tied.coupled))
    }
    assert np.std(error["coupled"]) < 0.8 * np.std(error["own"])
    # no other factor would bring it nearer
    slope = (tied.coupled @ tied.true) / (tied.coupled @ tied.coupled) / tied.scale
    assert slope == pytest.approx(1.0, abs=0.15)


def test_its_sigma_is_that_of_its_error(scores):
    tied = scores["double-wilson"]
    z = (tied.scale * tied.coupled - tied.true) / (tied.scale * tied.sigma)
    assert np.subtract(*np.quantile(z, [0.8413, 0.1587])) / 2 == pytest.approx(1.0, abs=0.15)


def test_a_pair_is_better_known_than_its_mates(merged):
    table = merged["double-wilson"].table
    pair = np.isfinite(table.difference)
    alone = np.hypot(table.sigma_f_plus, table.sigma_f_minus)
    assert (table.sigma_difference[pair] < alone[pair]).mean() > 0.99
    operations = merged["double-wilson"].space_group.operations()
    assert not operations.centric_flag_array(table.miller_index[pair]).any()
    assert not merged["wilson"].table.has_coupled_differences


@pytest.mark.parametrize("prior", ["wilson", "double-wilson"])
def test_amplitudes_are_those_before_the_damage(sweep, merged, prior):
    """B grows by 4 A^2 over the scan: at the mean dose amplitudes fall off by 2 A^2 too much.

    The few spots of low resolution tell a part of it; by that much the files are nearer.
    """
    file, t = merged[prior], sweep.truth
    index = {tuple(h): i for i, h in enumerate(t.miller_index_asu.tolist())}
    row = np.array([index[tuple(h)] for h in file.table.miller_index.tolist()])
    ratio = np.log(file.table.f_plus / abs(t.f_plus)[row])
    inv_d2 = file.cell.calculate_1_d2_array(file.table.miller_index)
    strong = file.table.f_plus > 10 * file.table.sigma_f_plus
    b = -4 * np.polyfit(inv_d2[strong], ratio[strong], 1)[0]
    (line,) = [x for x in file.history if "before the scan" in x]
    said = float(line.split("by ")[1].split(" A^2")[0])
    assert said > 0.3
    assert b + said == pytest.approx(2.0, abs=0.4)


def test_history_says_what_the_columns_are(merged):
    free, tied = ("\n".join(merged[p].history) for p in ("wilson", "double-wilson"))
    assert "each mate from its own observations" in tied
    assert "coupled posterior of |F(+)| - |F(-)|" in tied
    assert "use DANO unweighted" in tied
    assert "each from its own observations" in free
    assert "DANO" not in free
    assert isinstance(merged["wilson"].space_group, gemmi.SpaceGroup)
