"""Merging photon counts: weak intensities without bias."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
import pytest
import torch

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.measurement import counted_sigma
from braggflux.merge.fit.training import fit, start
from braggflux.merge.io.observations import PHOTON_VARIANCE, make_unmerged
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.amplitudes import merged_rows, scaled_observations
from braggflux.merge.problem import build_problem

CELL, SPACE_GROUP = gemmi.UnitCell(40, 50, 60, 90, 90, 90), gemmi.SpaceGroup("P 21 21 21")


WEAK, BACKGROUND = 1.5, 2.0  # photons


def weak_data(rng, n_per_row=12):
    """Half of the reflections weak, half strong enough to fix the scale; LP and cut spots."""
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 5.0, False)
    acentric = np.flatnonzero(~asu.is_centric)
    f2 = np.zeros(len(asu))
    is_weak = np.zeros(len(asu), bool)
    is_weak[acentric[::2]] = True
    f2[:] = rng.exponential(200.0, len(asu))
    f2[is_weak] = rng.exponential(WEAK, is_weak.sum())
    row = np.repeat(np.arange(len(asu)), n_per_row)
    image = np.sort(rng.integers(0, 12, len(row)))
    row = rng.permutation(row)
    t = rng.uniform(0.5, 1.0, len(row))
    lp = rng.uniform(0.6, 1.0, len(row))
    beta = rng.uniform(0.5, 1.5, len(row)) * BACKGROUND
    a = rng.poisson(t * (f2[row] / lp + beta))
    data = make_unmerged(
        source="x",
        miller_index=asu.miller_index[row],
        intensity=a / t - beta,
        sigma=np.sqrt(beta / t),
        image_label=image,
        metadata={"LP": lp, "BATCH": image, PHOTON_VARIANCE: 1 / t},
        wavelength=None,
        cell=CELL,
        space_group=SPACE_GROUP,
        name="x",
        has_lp_applied=False,
    )
    return data, asu, f2, is_weak, (row, a, beta, t, lp)


def merged(data, asu, **changes):
    config = MergeConfig(
        network_width=0,
        likelihood="normal",
        error_model=False,
        held_out=0.0,
        epochs=20,
        d_min=5.0,
        **changes,
    )
    problem = build_problem([data], config)
    torch.manual_seed(0)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    fit(merger, problem.table, config)
    rows = merged_rows(merger, problem.table, scaled_observations(merger, problem.table))
    own = problem.unique.asus[0].refl_id(asu.miller_index)
    square = merger.inference().spread.detach().numpy() * problem.table.unit_intensity
    return rows.intensity.numpy()[own], square[own]


def exact_means(asu, observations):
    """Maximum-likelihood F^2 of each reflection from the shifted Poisson, scales known."""
    row, a, beta, t, lp = observations
    low = np.array([-0.999 * np.min((beta * lp)[row == h]) for h in range(len(asu))])
    high = np.full(len(asu), 1e5)
    for _ in range(70):
        middle = 0.5 * (low + high)
        score = np.bincount(row, a / (middle[row] / lp + beta) / lp - t / lp, minlength=len(asu))
        low, high = np.where(score > 0, middle, low), np.where(score > 0, high, middle)
    return low


@pytest.mark.slow
def test_weak_intensities_are_unbiased():
    bias = {}
    for seed in range(2):
        data, asu, f2, is_weak, observations = weak_data(np.random.default_rng(seed))
        strong = ~is_weak & (f2 > 50)
        exact = exact_means(asu, observations)
        answers = {
            "counts": merged(data, asu)[0],
            "observed": merged(data, asu, photon_counts=False)[0],
            "exact": exact,
        }
        for name, value in answers.items():
            factor = np.sum(value[strong]) / np.sum(f2[strong])
            error = (value / factor - f2)[is_weak & np.isfinite(value)]
            bias.setdefault(name, []).append(error / WEAK)
    mean = {name: np.mean(np.concatenate(values)) for name, values in bias.items()}
    error = {
        name: np.std(np.concatenate(v)) / len(np.concatenate(v)) ** 0.5 for name, v in bias.items()
    }
    assert abs(mean["counts"]) < 0.02 + 2 * error["counts"]
    assert abs(mean["counts"] - mean["exact"]) < 0.005
    assert mean["observed"] < -0.1


def test_without_counts_the_sigma_is_that_of_the_observed():
    data, *_ = weak_data(np.random.default_rng(0), 2)
    sigma, share = counted_sigma([data], False)
    assert share is None
    a = (data.intensity + data.sigma**2 / data.metadata[PHOTON_VARIANCE]) / data.metadata[
        PHOTON_VARIANCE
    ]
    t = 1 / data.metadata[PHOTON_VARIANCE]
    np.testing.assert_allclose(sigma, np.sqrt(np.maximum(a, 1.0)) / t, rtol=1e-6)
    plain = replace(data, metadata={"LP": data.metadata["LP"]})
    np.testing.assert_array_equal(counted_sigma([plain], True)[0], plain.sigma)
    both = counted_sigma([data, plain], True)
    np.testing.assert_array_equal(both[1][len(data) :], 0.0)
