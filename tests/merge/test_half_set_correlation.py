"""r of relatives from halves of the data: mates, pairs of datasets, and data that say nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_priors import crystal, observe

from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.half_set_correlation import (
    half_set_correlation,
    set_correlation,
)
from braggflux.merge.fit.training import fit, start
from braggflux.merge.model.merger import Merger
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.problem import build_problem

CONFIG = MergeConfig(
    network_width=0, epochs=20, batch_size=None, prior="double-wilson", n_correlation_shells=5
)


def fitted(data, config, parents=None):
    """Merger with the amplitudes coupled, and its table."""
    problem = build_problem(data, config, parents)
    torch.manual_seed(0)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    merger.prior.couple()
    fit(merger, problem.table, config)
    return merger, problem.table


def mates(one_minus_r2: float, noise: float):
    """Bijvoet mates that differ, 8 observations each."""
    c = crystal(d_min=4.0, anomalous=True, noise_r2=one_minus_r2, b=15.0)
    return fitted([observe(c, noise, n_obs=8, flicker=0.0)], replace(CONFIG, anomalous=True))


def pair(one_minus_r2: float, noise: float):
    """Two datasets that differ; centrics among them."""
    both = crystal(d_min=4.0, anomalous=True, noise_r2=one_minus_r2, b=15.0)
    plus = both.asu.friedel_sign > 0
    rng = np.random.default_rng(3)
    own = np.sqrt(both.asu.epsilon * both.sigma)[plus]
    one = both.amplitude[plus]
    two = both.amplitude[both.asu.friedel_mate[plus]]
    centric = both.asu.is_centric[plus]
    moved = np.sqrt(1 - one_minus_r2) * one / own
    moved = np.abs(moved + np.sqrt(one_minus_r2) * rng.standard_normal(len(own))) * own
    two = np.where(centric, moved, two)
    plain = crystal(d_min=4.0, b=15.0)
    order = plain.asu.refl_id(both.asu.miller_index[plus])
    data = []
    for seed, values in enumerate((one, two)):
        amplitude = np.zeros(len(plain.asu))
        amplitude[order] = values
        c = replace(plain, amplitude=amplitude)
        data.append(observe(c, noise, n_obs=8, flicker=0.0, seed=seed, name="ab"[seed]))
    return fitted(data, CONFIG, (None, 0))


@pytest.mark.slow
@pytest.mark.parametrize("made", [mates, pair])
@pytest.mark.parametrize("true", [0.003, 0.01])
def test_halves_find_how_alike_relatives_are(made, true):
    """Noise of the difference of two means of a half about as large as the true difference."""
    merger, table = made(true, 50.0)
    rows = half_set_correlation(merger, table, 0)
    found = merger.prior.part(DoubleWilson).by_shell()
    assert len(rows) == len(found) == 5
    assert {r["relative"] for r in rows} == {"mate" if made is mates else "parent"}
    assert min(r["n_pairs"] for r in rows) > 150
    z = [(r["one_minus_r2"] - true) / r["error"] for r in rows]
    assert np.abs(z).max() < 4.0
    assert float(found.log().mean().exp()) == pytest.approx(true, rel=0.2)
    assert [r["chosen_r"] for r in rows] == pytest.approx(((1 - found) ** 0.5).tolist())


@pytest.mark.slow
def test_same_seed_same_answer_another_a_similar_one():
    merger, table = mates(0.004, 20.0)
    prior, found = merger.prior.part(DoubleWilson), []
    for seed in (0, 0, 1):
        half_set_correlation(merger, table, seed)
        found.append(prior.one_minus_r2.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)
    assert (found[0] - found[2]).abs().max() > 1e-6
    torch.testing.assert_close(found[0], found[2], rtol=0.25, atol=0)


def test_r_never_runs_to_one():
    """Mates alike to 1e-6 under noise that hides 3e-3: no more is believed than is known."""
    merger, table = mates(1e-6, 60.0)
    rows = half_set_correlation(merger, table, 0)
    found = merger.prior.part(DoubleWilson).one_minus_r2
    pooled = sum(r["error"] ** -2 for r in rows) ** -0.5
    assert found.min() > 0.5 * pooled
    assert found.max() < 10 * pooled


@pytest.mark.slow
@pytest.mark.parametrize("dof", [4.0, 30.0])
def test_robust_likelihoods_add_no_noise(dof):
    """Under strong noise; weights of Student's t would give 13e-4 +- 2e-4 with 4 degrees."""
    c = crystal(d_min=4.0, anomalous=True, noise_r2=4e-4, b=15.0)
    config = replace(CONFIG, anomalous=True, dof=dof)
    merger, table = fitted([observe(c, 150.0, n_obs=16, flicker=0.0)], config)
    rows = half_set_correlation(merger, table, 0)
    weight = np.array([r["error"] ** -2 for r in rows])
    pooled = weight @ [r["one_minus_r2"] for r in rows] / weight.sum()
    error = weight.sum() ** -0.5
    assert error < 2.5e-4
    assert abs(pooled - 4e-4) < 2.5 * error


@pytest.mark.slow
def test_too_few_pairs_leave_r_as_it_is(caplog):
    merger, _ = mates(0.004, 20.0)
    prior = merger.prior.part(DoubleWilson)
    before = prior.one_minus_r2.clone()
    nothing = torch.full((len(prior.child),), torch.nan, dtype=torch.float64)
    rows = set_correlation(merger, nothing, torch.ones_like(nothing))
    assert torch.equal(prior.one_minus_r2, before)
    assert {r["one_minus_r2"] for r in rows} == {None}
    assert "fewer than" in caplog.text


@pytest.mark.slow
def test_pairs_that_noise_hides_do_not_hide_the_others():
    """Every second difference has fifty times the variance in noise: as if it were not there."""
    merger, _ = mates(0.004, 20.0)
    n, share = len(merger.prior.part(DoubleWilson).child), 0.004
    rng = np.random.default_rng(2)
    noise = np.where(np.arange(n) % 2, 0.05 * share, 25 * share)
    true = np.sqrt(share / 2) * rng.standard_normal(n)
    halves = true + np.sqrt(2 * noise) * rng.standard_normal((2, n))
    rows = set_correlation(merger, torch.as_tensor(halves.prod(0)), torch.as_tensor(noise))
    weight = np.array([r["error"] ** -2 for r in rows])
    pooled = weight @ [r["one_minus_r2"] for r in rows] / weight.sum()
    error = weight.sum() ** -0.5
    alone = 2 * np.hypot(share / 2 + 0.1 * share, share / 2) * (n / 2) ** -0.5
    assert error < 1.3 * alone
    assert abs(pooled - share) < 3 * error
