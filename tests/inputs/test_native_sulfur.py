"""Native sulfur, each reflection seen about twice, few spots an image, no batch headers.

The differences come out at least as well as with a plain scale, and CCanom is what the halves'
correlations with the truth let expect: noise of independent halves agrees by chance alone.
"""

from __future__ import annotations

import csv

import gemmi
import numpy as np
import pytest
import torch
from simple_scale import merge_mates, simple_log_scale

from braggflux.fixtures.unmerged import UnmergedSettings, unmerged_sweep
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import MergeConfig
from braggflux.merge.output.french_wilson import french_wilson
from braggflux.pipelines.inputs.inputs import MergeInputs
from braggflux.pipelines.merging.merge import merge
from braggflux.pipelines.merging.outputs import doubt_of_cc_anom


class Truth:
    """True differences, and those of anything else, of the acentric pairs."""

    def __init__(self, sweep):
        self.sweep, t = sweep, sweep.truth
        d_min = min(t.cell.calculate_d(h) for h in t.miller_index_asu.tolist())
        self.asu = ReciprocalAsu(t.cell, t.space_group, d_min * (1 - 1e-6), True)
        self.row = self.asu.refl_id(sweep.miller_index)
        self.plus = np.flatnonzero((self.asu.friedel_sign > 0) & ~self.asu.is_centric)
        self.true = self.difference(t.miller_index_asu, abs(t.f_plus), abs(t.f_minus))

    def difference(self, index, plus, minus):
        """F(+) - F(-) of each pair, NaN where one is missing."""
        f = np.full(len(self.asu), np.nan)
        f[self.asu.refl_id(-index)] = minus
        f[self.asu.refl_id(index)] = plus
        return f[self.plus] - f[self.asu.friedel_mate[self.plus]]

    def of_mtz(self, path, name="F"):
        mtz = gemmi.read_mtz_file(str(path))
        columns = [np.array(mtz.column_with_label(f"{name}({s})")) for s in "+-"]
        return self.difference(mtz.make_miller_array(), *columns)

    def of_simple_scale(self):
        """F by the same prior, of intensities with a plain scale."""
        s, joined = self.sweep, np.minimum(np.arange(len(self.asu)), self.asu.friedel_mate)
        unique = np.unique(joined[self.row], return_inverse=True)[1]
        inv_d2 = self.asu.d[self.row] ** -2
        log_scale = simple_log_scale(unique, s.rot, s.xyz[:, :2], inv_d2, s.intensity, s.sigma)
        value, sigma = s.intensity / np.exp(log_scale), s.sigma / np.exp(log_scale)
        variance = sigma**2 + (0.03 * value) ** 2
        mean, error = merge_mates(self.row, value, variance, len(self.asu))
        seen = np.isfinite(mean)
        order = np.argsort(self.asu.d[seen])
        shells = np.array_split(order, 12)
        usual = mean[seen] / self.asu.epsilon[seen]
        levels = [(np.mean(self.asu.d[seen][k]), np.mean(usual[k])) for k in shells]
        expected = np.interp(self.asu.d[seen], *np.transpose(levels)) * self.asu.epsilon[seen]
        arrays = (mean[seen], error[seen], expected, self.asu.is_centric[seen])
        f = np.full(len(self.asu), np.nan)
        f[seen] = french_wilson(*map(torch.as_tensor, arrays))[0].numpy()
        return f[self.plus] - f[self.asu.friedel_mate[self.plus]]


def correlation(a, b):
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.corrcoef(a[both], b[both])[0, 1])


def merged(tmp_path, **settings):
    """Truth, merged MTZ and statistics of all shells."""
    sweep = unmerged_sweep(UnmergedSettings(**settings))
    sweep.write_mtz(tmp_path / "native.mtz")
    inputs = MergeInputs((tmp_path / "native.mtz",), tmp_path / "out")
    path = merge(inputs, MergeConfig(anomalous=True, epochs=60))[0]
    with (path.parent / "statistics.csv").open(newline="") as file:
        overall = list(csv.DictReader(file))[-1]
    return Truth(sweep), path, overall


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scales_neither_swallow_nor_invent_the_signal(seed, tmp_path):
    truth, path, overall = merged(tmp_path, seed=seed)
    assert 2.2 < float(overall["redundancy"]) < 2.5  # of those seen at all
    found = correlation(truth.of_mtz(path), truth.true)
    plain = correlation(truth.of_simple_scale(), truth.true)
    assert plain > 0.3
    assert found > plain + 0.05
    halves = [truth.of_mtz(path.with_name("half_sets.mtz"), name) for name in ("F1", "F2")]
    both = np.isfinite(halves[0]) & np.isfinite(halves[1])
    allowed = np.prod([correlation(h[both], truth.true[both]) for h in halves])
    assert both.sum() > 500
    assert float(overall["cc_anom"]) == pytest.approx(allowed, abs=0.1)
    assert 0.9 < float(overall["z_spread_anom"]) < 1.1


@pytest.mark.slow
def test_without_signal_halves_do_not_agree(tmp_path):
    _, _, overall = merged(tmp_path, anomalous=0.0, redundancy=4.4)
    assert abs(float(overall["cc_anom"])) < 0.1  # three standard errors of 1,700 pairs: 0.07
    assert 0.9 < float(overall["z_spread_anom"]) < 1.1


def test_a_correlation_that_scales_have_made_is_doubted():
    # of scales that were fitted with the mates apart, seed 0: the truth allows .28 and .41
    twice = {"cc_anom": 0.891, "cc_anom_pairs": 733, "z_spread": 1.021, "z_spread_anom": 0.712}
    assert "CCanom 0.89 is not confirmed" in doubt_of_cc_anom(twice)
    often = {"cc_anom": 0.845, "cc_anom_pairs": 1802, "z_spread": 0.991, "z_spread_anom": 0.801}
    assert "0.81 times" in doubt_of_cc_anom(often)
    assert doubt_of_cc_anom(often | {"z_spread_anom": 0.95}) is None
    assert doubt_of_cc_anom(twice | {"cc_anom_pairs": 20}) is None  # chance
    assert doubt_of_cc_anom(twice | {"cc_anom": 0.05}) is None  # nothing is claimed
    assert doubt_of_cc_anom(twice | {"z_spread_anom": None}) is None
