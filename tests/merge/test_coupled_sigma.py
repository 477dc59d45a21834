"""SIGDANO is the spread of the difference under the joint Normal of all relatives."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from simulated_intensities import CELL, SPACE_GROUP, simulated

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import MergeConfig
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.coupled_difference import (
    coupled_difference,
    difference_in_trees,
    ties_mates_only,
)
from braggflux.merge.problem import build_problem


def fitted(parents):
    """Merger of one dataset or of two, mates apart, and the precision of its amplitudes, (R,)."""
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 12.0, True)
    config = MergeConfig(prior="double-wilson", anomalous=True)
    data, _, _ = simulated(np.random.default_rng(0), asu=asu)
    problem = build_problem([data] * len(parents), config, parents)
    merger = Merger(problem.unique, problem.table, config)
    merger.prior.couple()
    merger.prior.one_minus_r2.fill_(0.01)
    torch.manual_seed(0)
    precision = 100 * torch.rand(len(problem.unique)).double() / merger.prior.spread().detach()
    square = 4 + torch.rand(len(problem.unique)).double()
    merger.information = precision * square / 4
    q = SimpleNamespace(mean=square.sqrt(), variance=0.1 * square, spread=square)
    return merger, q, precision


def joint_covariance(merger, precision):
    """Inverse of the precisions of data, links and roots, (R, R)."""
    prior = merger.prior
    n = len(precision)
    matrix = np.diag(precision.numpy())
    r, spread = (x.detach().numpy() for x in prior.conditional())
    child, parent = prior.child.numpy(), prior.parent.numpy()
    link = np.where(prior.is_centric.numpy()[child], 1.0, 2.0) / spread
    for c, p, k, s in zip(child, parent, link, r, strict=True):
        matrix[c, c] += k
        matrix[p, p] += s**2 * k
        matrix[c, p] -= s * k
        matrix[p, c] -= s * k
    roots = np.setdiff1d(np.arange(n), child)
    matrix[roots, roots] += prior.precision().detach().numpy()[roots]
    return np.linalg.inv(matrix)


@pytest.mark.parametrize("parents", [[None], [None, 0]])
def test_spread_is_that_of_the_joint_normal(parents):
    merger, q, precision = fitted(parents)
    found = difference_in_trees(merger, q)
    mean, sigma = found.value, found.sigma
    covariance = joint_covariance(merger, precision)
    minus = np.flatnonzero(merger.joined.numpy() != np.arange(len(mean)))
    plus = merger.joined.numpy()[minus]
    known = np.isfinite(sigma.numpy()[plus])
    assert known.sum() > 15 * len(parents)
    plus, minus = plus[known], minus[known]
    variance = covariance[plus, plus] + covariance[minus, minus] - 2 * covariance[plus, minus]
    np.testing.assert_allclose(sigma.numpy()[plus], variance**0.5, rtol=1e-6)
    assert (variance < covariance[plus, plus] + covariance[minus, minus]).all()
    np.testing.assert_allclose(mean[plus], q.mean[plus] - q.mean[minus])
    others = np.setdiff1d(np.arange(len(mean)), plus)
    assert np.isnan(mean.numpy()[others]).all()


def test_without_coupling_there_is_no_difference():
    merger, q, _ = fitted([None])
    assert ties_mates_only(merger)
    merger.prior.uncouple()
    assert not ties_mates_only(merger)
    found = coupled_difference(merger, q.mean, q.mean)
    assert torch.isnan(torch.stack(list(vars(found).values()))).all()
    assert not ties_mates_only(fitted([None, 0])[0])
