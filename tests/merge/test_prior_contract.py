"""What every prior of amplitudes keeps, a toy one that is made of one class among them."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
import pytest
import torch
from simulated_priors import crystal, observe

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.training import fit, start
from braggflux.merge.model.merger import Merger
from braggflux.merge.prior import registry
from braggflux.merge.prior.base import PriorOver
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.reference import Reference
from braggflux.merge.prior.registry import build_prior
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.problem import build_problem
from braggflux.merge.rows import UniqueRows

CELL, SPACE_GROUP = gemmi.UnitCell(30, 30, 40, 90, 90, 90), gemmi.SpaceGroup("P 43 21 2")
CONFIG = MergeConfig(network_width=0, epochs=30, batch_size=None)


class KnownIntensity(PriorOver):
    """Toy: log F^2 is Normal about that of one known intensity, whatever the resolution."""

    LOG_INTENSITY, PRECISION = 0.4, 9.0

    def kl(self, q):
        """Up to a constant; of log F^2 at the mean of q alone."""
        return 0.5 * self.PRECISION * (q.spread.log() - self.LOG_INTENSITY) ** 2 - q.entropy()

    def stiffness(self, mean_square):
        """Curvature of the above."""
        return torch.full_like(mean_square, self.PRECISION)

    def precision(self):
        """As d log F^2 = 2 dF / F."""
        return torch.full_like(
            self.spread(), 4 * self.PRECISION / float(np.exp(self.LOG_INTENSITY))
        )


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The one line of the registry."""
    monkeypatch.setitem(
        registry.PRIORS, "known-intensity", lambda below, rows, config: KnownIntensity(below)
    )


def made(kind: str):
    """Prior of two datasets and its number of rows."""
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 6.0, False)
    rows = UniqueRows([asu, asu], (None, 0))
    name, _, model = kind.partition(" with a ")
    f_calc = None
    if model:
        generator = torch.Generator().manual_seed(1)
        f_calc = torch.rand(len(rows), generator=generator, dtype=torch.float64) + 0.5
        f_calc[::3] = torch.nan
    prior = build_prior(rows, replace(CONFIG, prior=name), f_calc)
    if model:
        prior.part(Reference).sigma_a2.fill_(0.7)
    prior.couple()
    return prior, len(rows)


KINDS = ("wilson", "wilson with a model", "double-wilson", "double-wilson with a model")
KINDS += ("known-intensity", "known-intensity with a model")


@pytest.mark.parametrize("kind", KINDS)
def test_every_prior_keeps_the_contract(kind):
    prior, n = made(kind)
    torch.manual_seed(0)
    k = (torch.rand(n).double() * 50 + 5).requires_grad_()
    omega = (torch.rand(n).double() + 0.5).requires_grad_()
    q = Nakagami(k, omega, validate_args=False)
    divergence = prior.kl(q)
    assert divergence.shape == (n,)
    gradients = torch.autograd.grad(divergence.sum(), (k, omega))
    assert all(torch.isfinite(g).all() for g in gradients)
    for value in (prior.spread(), prior.precision()):
        assert value.shape == (n,)
        assert (value > 0).all()
    stiffness = prior.stiffness(omega.detach())
    assert stiffness.shape == (n,)
    assert (stiffness >= 0).all()
    assert prior.penalty().shape == ()
    assert prior.rows_with_relatives().any() == prior.is_coupled == bool(prior.levels)
    width = prior.width(q, torch.full((n,), 3.0).double())
    assert width.sigma.shape == (n,)
    assert torch.isfinite(width.sigma).all()
    if not prior.is_coupled:
        torch.testing.assert_close(width.sigma, q.variance.sqrt())
    assert prior.has(Wilson)
    assert prior.part(Wilson).spread().equal(prior.spread())


@pytest.mark.parametrize("kind", ["double-wilson", "known-intensity"])
def test_stiffness_is_the_curvature_in_the_logarithm(kind):
    """Of a narrow q: a centric child's, half of an acentric one's, is bounded by it."""
    prior, n = made(kind)
    x = torch.full((n,), 0.3, dtype=torch.float64)
    k = torch.full_like(x, 1e4)
    curvature = torch.autograd.functional.hessian(
        lambda v: prior.kl(Nakagami(k, v.exp(), validate_args=False)).sum(), x
    ).diagonal()
    share = prior.stiffness(x.exp()) / curvature
    if kind == "known-intensity":
        torch.testing.assert_close(share, torch.ones_like(x))
        return
    centric = prior.is_centric[prior.child]
    assert 0 < centric.sum() < len(centric)
    expected = torch.where(centric, 2.0, 1.0).double()
    torch.testing.assert_close(share[prior.child], expected, rtol=0.02, atol=0)


def test_a_prior_that_is_asked_for_and_not_there_is_named():
    prior, _ = made("wilson")
    assert not prior.has(DoubleWilson)
    with pytest.raises(LookupError, match="Wilson stands on no DoubleWilson"):
        prior.part(DoubleWilson)


def test_a_merge_with_the_toy_prior_believes_it_as_far_as_the_data_allow():
    """Weak data end at the prior's intensity, strong ones at their mean; all steps converge."""
    c = crystal(d_min=6.0)
    amplitudes = {}
    for noise in (1e4, 1e-3):
        problem = build_problem([observe(c, noise, n_obs=4, flicker=0.0)], CONFIG)
        config = replace(CONFIG, prior="known-intensity")
        torch.manual_seed(0)
        merger = Merger(problem.unique, problem.table, config)
        start(merger, problem.table)
        elbo = [fit(merger, problem.table, config, epochs=n) for n in (60, 20)]
        assert np.isfinite(elbo).all()
        amplitudes[noise] = merger.log_spread.detach()[merger.n_obs > 0]
    found, true = (amplitudes[noise].numpy() for noise in (1e4, 1e-3))
    assert np.abs(found - KnownIntensity.LOG_INTENSITY).max() < 0.2
    assert true.std() > 0.8
