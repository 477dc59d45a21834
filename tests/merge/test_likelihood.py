"""The seam of the likelihood: a law of one class, registered, does all that a merge asks for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_intensities import simulated

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.measurement import PhotonCounts
from braggflux.merge.fit.held_out import predict, split
from braggflux.merge.fit.training import fit, start
from braggflux.merge.likelihood.base import IndependentLikelihood
from braggflux.merge.likelihood.registry import LIKELIHOODS
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.objective import elbo
from braggflux.merge.model.sums import ObservationSums
from braggflux.merge.output.amplitudes import scaled_observations, weighted_mean
from braggflux.merge.problem import build_problem
from braggflux.merge.stream.solve import solve_amplitudes

CONFIG = MergeConfig(network_width=0, epochs=30, batch_size=None)


class Laplace(IndependentLikelihood):
    """Two-sided exponential law, of variance D; E|z| <= sqrt(E z^2) makes it a bound."""

    def log_density(self, batch, expected):
        return -math.sqrt(2) * self.z(batch, expected) - 0.5 * (2 * expected.variance).log()

    @torch.no_grad()
    def weight(self, batch, expected):
        return math.sqrt(2) / self.z(batch, expected)

    def z(self, batch, expected):
        square = batch.observations.measured.compare(expected.mean, expected.spread).square
        return (square / expected.variance + 1e-6).sqrt()


def test_a_law_is_one_class_and_its_name(monkeypatch):
    monkeypatch.setitem(LIKELIHOODS, "laplace", Laplace)
    data, f, asu = simulated(np.random.default_rng(0))
    found = {}
    for name in ("laplace", "normal"):
        config = replace(CONFIG, likelihood=name)
        problem = build_problem([data], config)
        torch.manual_seed(0)
        merger, table = Merger(problem.unique, problem.table, config), problem.table
        masks = split(table, 0.05, False, 0)
        start(merger, table.with_masks(masks.is_used, masks.is_seen))
        fit(merger, table.with_masks(masks.is_used, masks.is_seen), config)
        # outputs, held-out scores and the sums of streams ask the law alone
        held_out = predict(merger, table, masks.by_observation)
        assert held_out.cc_pred > 0.85  # of images whose scales change fast
        mean, sigma = weighted_mean(scaled_observations(merger, table), len(merger.group))
        batch = table.rows(masks.is_used.nonzero()[:, 0])
        sums = ObservationSums(merger, 0).add([(0, batch)])
        solve_amplitudes(merger, sums)
        amplitude = merger.inference().mean.detach().numpy()
        true = f[asu.refl_id(problem.unique.asus[0].miller_index)]
        seen = (merger.n_obs > 2).numpy()
        assert np.corrcoef(amplitude[seen], true[seen])[0, 1] > 0.99
        assert np.corrcoef(mean.numpy()[seen], true[seen] ** 2)[0, 1] > 0.98
        assert bool((sigma[seen] > 0).all())
        found[name] = held_out.log_likelihood
    assert found["laplace"] != found["normal"]
    assert merger.likelihood.error_parameters.keys() >= {"sdfac", "sdb", "sdadd"}


def test_an_unknown_law_is_a_user_error():
    data, _, _ = simulated(np.random.default_rng(0))
    config = replace(CONFIG, likelihood="cauchy")
    problem = build_problem([data], config)
    with pytest.raises(UserError, match="one of studentt, normal, got 'cauchy'"):
        Merger(problem.unique, problem.table, config)


def test_minibatches_of_any_rows_with_another_measurement_add_up():
    """What a joint run feeds: rows of the table in any order, their photons with a graph."""
    rng = np.random.default_rng(2)
    config = replace(CONFIG, network_width=8)
    problem = build_problem([simulated(rng)[0]], config)
    table = problem.table
    n = len(table.observations)
    merger = Merger(problem.unique, table, config)
    start(merger, table)
    background = torch.rand(n, dtype=torch.float64) + 0.5
    a = (table.observations.intensity.clamp_min(0) + background).requires_grad_()
    photons = ShiftedPoisson(a, background, torch.ones_like(background))
    measured = PhotonCounts.of(photons, 1.0)

    def summed(parts):
        q = merger.inference()
        terms = [merger.loss(table.rows(rows, measured[rows]), q) for rows in parts]
        total = sum(elbo(t) for t in terms)
        parameters = [a, merger.log_spread_step, merger.likelihood.error.log_sdfac]
        gradients = torch.autograd.grad(total, parameters)
        return total.detach(), sum(t.information for t in terms), gradients

    whole = summed([torch.arange(n)])
    order = torch.as_tensor(rng.permutation(n))
    parts = summed(order.split(700))
    # networks are float32: sums in another order differ in the last digits
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-6)
    for got, wanted in zip(parts[2], whole[2], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert float(whole[2][0].abs().min()) > 0


def test_rows_that_belong_together_are_not_taken_one_by_one():
    first, _, asu = simulated(np.random.default_rng(1))
    second, _, _ = simulated(np.random.default_rng(1), asu=asu, name="b")
    table = build_problem([first, second], CONFIG, (None, 0)).table
    assert table.has_clusters
    with pytest.raises(ValueError, match="clusters"):
        table.rows(torch.arange(5))
