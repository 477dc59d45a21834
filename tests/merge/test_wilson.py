"""Sigma of Wilson's prior, started and learned; Bijvoet mates with double-Wilson above."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import tolerances
import torch
from torch.distributions import kl_divergence

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.wilson import Wilson, hat_design
from braggflux.merge.rows import UniqueRows


def toy_wilson(n: int = 4000, n_knots: int = 12, seed: int = 0):
    """Prior of random reflections between 20 and 2 A, and the true Sigma (n,)."""
    rng = np.random.default_rng(seed)
    inv_d2 = rng.uniform(20.0**-2, 2.0**-2, n)
    centric = torch.as_tensor(rng.random(n) < 0.1)
    epsilon = torch.as_tensor(rng.choice([1, 2], n, p=[0.95, 0.05]))
    prior = Wilson(torch.as_tensor(inv_d2), epsilon, centric, n_knots)
    sigma = 5e3 * np.exp(-30 * inv_d2 / 2) * (1 + 0.3 * np.sin(12 * inv_d2))
    return prior, sigma


def test_hat_design_interpolates():
    knots = torch.tensor([0.0, 1.0, 3.0, 10.0]).double()
    values = torch.tensor([2.0, -1.0, 4.0, 0.0]).double()
    x = torch.tensor([-5.0, 0.0, 0.25, 1.0, 2.9, 10.0, 77.0]).double()
    expected = np.interp(x, knots, values)
    np.testing.assert_allclose(hat_design(x, knots) @ values, expected, rtol=1e-12)
    torch.testing.assert_close(hat_design(x, knots).sum(1), torch.ones(7).double())
    assert hat_design(x, knots[:1]).eq(1).all()


def test_hat_design_survives_equal_knots():
    """All reflections at one resolution: a tiny cell, or one shell of powder rings."""
    knots = torch.full((5,), 0.04).double()
    assert torch.isfinite(hat_design(knots, knots)).all()


def test_prior_is_wilson_with_epsilon():
    prior, _ = toy_wilson()
    p = prior.p_structure_factor()
    torch.testing.assert_close(p.spread, prior.epsilon * prior.wilson_sigma())
    assert (p.concentration[prior.is_centric] == 0.5).all()
    assert (p.concentration[~prior.is_centric] == 1.0).all()


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_start_recovers_sigma(noise):
    prior, sigma = toy_wilson()
    rng = np.random.default_rng(1)
    centric = prior.is_centric.numpy()
    shape = np.where(centric, 0.5, 1.0)
    intensity = rng.gamma(shape, 1 / shape) * sigma * prior.epsilon.numpy()
    intensity += noise * sigma * rng.normal(size=len(sigma))
    prior.start(torch.as_tensor(intensity), torch.ones(len(sigma), dtype=torch.bool))
    ratio = np.log(prior.wilson_sigma().detach().numpy() / sigma)
    # 4,000 logarithms of spread 1.28 on 12 knots: 7 % each; centrics, a tenth, lower it by 7 %
    assert abs(ratio.mean()) < 0.1
    assert np.abs(ratio).max() < 0.35


def test_learned_sigma_is_the_mean_intensity():
    """Gradient of the divergence, q narrow: maximum likelihood of Sigma."""
    prior, sigma = toy_wilson(n=6000)
    rng = np.random.default_rng(2)
    shape = np.where(prior.is_centric.numpy(), 0.5, 1.0)
    intensity = torch.as_tensor(rng.gamma(shape, 1 / shape) * sigma * prior.epsilon.numpy())
    prior.start(intensity, torch.ones(6000, dtype=torch.bool))
    q = Nakagami(torch.full_like(intensity, 1e4), intensity)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        kl_divergence(q, prior.p_structure_factor()).mean().backward()
        optimizer.step()
    ratio = np.log(prior.wilson_sigma().detach().numpy() / sigma)
    assert abs(ratio.mean()) < 0.04
    assert np.abs(ratio).max() < 0.25


def coupled_mates(one_minus_r2: float):
    """Prior of the Bijvoet mates of a small crystal, and its rows."""
    asu = ReciprocalAsu(
        gemmi.UnitCell(30, 30, 40, 90, 90, 90), gemmi.SpaceGroup("P 43 21 2"), 8.0, True
    )
    rows = UniqueRows([asu], None, True)
    prior = DoubleWilson(Wilson.of_rows(rows, 3), rows, 1)
    prior.couple()
    prior.one_minus_r2.fill_(one_minus_r2)
    return prior, rows


def test_without_correlation_mates_are_wilsons():
    prior, rows = coupled_mates(1.0)
    n, generator = len(rows), torch.Generator().manual_seed(0)
    k, omega = torch.rand(2, n, generator=generator, dtype=torch.float64)
    q = Nakagami(9 * k + 0.5, 3 * omega + 0.01)
    torch.testing.assert_close(prior.kl(q), prior.below.kl(q), rtol=1e-9, atol=1e-9)


def test_coupling_prefers_alike_mates():
    prior, rows = coupled_mates(0.01)
    k = torch.full((len(rows),), 500.0).double()
    alike = prior.spread().detach().clone()
    different = alike.clone()
    different[prior.child] *= 2.0
    costs = [prior.kl(Nakagami(k, omega))[prior.child] for omega in (alike, different)]
    assert (costs[1] - costs[0] > 10.0).all()


def test_centrics_have_no_mate():
    prior, rows = coupled_mates(0.01)
    alone = torch.ones(len(rows), dtype=torch.bool)
    alone[prior.child] = alone[prior.parent] = False
    assert torch.equal(alone, torch.as_tensor(rows.is_centric))
    divergence = prior.kl(prior.below.p_structure_factor())[alone]
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), rtol=0, atol=1e-10)


def test_gradients_of_the_coupled_divergence():
    prior, rows = coupled_mates(0.03)
    generator = torch.Generator().manual_seed(0)
    log_k, log_omega = torch.rand(2, len(rows), generator=generator, dtype=torch.float64)
    k, omega = (5 * log_k - 0.5).exp().requires_grad_(), (log_omega - 0.5).exp().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda k, omega: prior.kl(Nakagami(k, omega)), (k, omega), **tolerances.GRADCHECK
    )
