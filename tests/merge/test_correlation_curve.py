"""1 - r^2 against resolution: mates differ as a few atoms let them, parents walk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simulated_priors import CELL, SPACE_GROUP

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.prior.correlation_curve import (
    N_ERRORS,
    SMALLEST,
    STEP,
    Share,
    mates_curve,
    parents_curve,
)
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.rows import UniqueRows

N_SHELLS = 8


def test_walk_of_parents_is_the_best():
    shells = [Share(4e-4, 1e-4, 99), Share(-1e-4, 8e-4, 99), Share(9e-4, 2e-4, 99)]
    shell = torch.arange(3).repeat_interleave(2)
    got = parents_curve(shell, 3).through(shells, shell, torch.ones(6).double())
    assert torch.equal(got[::2], got[1::2])

    def cost(u):
        value = u.exp()
        misfit = sum((s.value - v) ** 2 / s.error**2 for s, v in zip(shells, value, strict=True))
        return 0.5 * (misfit + (u.diff() ** 2).sum() / STEP**2)

    u = torch.full((3,), np.log(4e-4), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([u], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = cost(u)
        value.backward()
        return value

    optimizer.step(closure)
    best = u.detach().exp()
    # and two errors, added in quadrature
    assert (got[::2] > best).all()
    precision = torch.autograd.functional.hessian(cost, u.detach())
    error = best * torch.linalg.inv(precision).diag().sqrt()
    torch.testing.assert_close(got[::2], torch.hypot(best, N_ERRORS * error), rtol=0.05, atol=0)


@pytest.fixture(scope="module")
def mates():
    """Wilson's prior with a bump at 5 A, children, shells, and V of atoms of two kinds, (C,)."""
    rows = UniqueRows([ReciprocalAsu(CELL, SPACE_GROUP, 2.5, True)], None, True)
    child = torch.as_tensor(np.flatnonzero(rows.parent >= 0))
    wilson = Wilson.of_rows(rows, 12)
    knots = wilson.knots
    with torch.no_grad():
        bump = 1.2 * torch.exp(-((knots - 0.05) ** 2) / 0.015**2)
        wilson.log_sigma.copy_(5.0 - 15.0 * knots + bump)
    s2 = wilson.inv_d2[child]
    v = 0.03 * torch.exp(-15 * s2) + 0.02 * torch.exp(-5 * s2)
    return wilson, child, torch.as_tensor(rows.shells(N_SHELLS))[child], v


def estimates(mates, noise, seed=0):
    """Shells' means of products with errors, children with one, and the true 1 - r^2, (C,)."""
    wilson, child, shell, v = mates
    share = 2 * v / wilson.wilson_sigma().detach()[child]
    rng = np.random.default_rng(seed)
    used = torch.as_tensor(rng.random(len(child)) < 0.7)
    shells = []
    for s in range(N_SHELLS):
        own = share[used & (shell == s)]
        error = noise * float(share.mean())
        shells.append(Share(float(own.mean()) + error * rng.normal(), error, len(own)))
    return shells, used, share


def test_curve_of_mates_is_that_of_the_atoms_and_not_of_wilsons_sigma(mates):
    """Within a shell too: at low resolution Sigma and V change by a factor there."""
    wilson, child, shell, _ = mates
    shells, used, share = estimates(mates, 0.003)
    got = mates_curve(wilson, child).through(shells, shell, used.double())
    ratio = (got / share).detach()
    assert ratio.log().abs().max() < 0.1
    first = share[shell == 0]
    assert first.max() > 1.5 * first.min()


def test_poor_estimates_lean_on_the_curve(mates):
    """Errors of shells of 40 %: the curve is nearer to the truth than they are."""
    wilson, child, shell, _ = mates
    curve, ratios = mates_curve(wilson, child), []
    for seed in range(6):
        shells, used, share = estimates(mates, 0.4, seed)
        ratios.append((curve.through(shells, shell, used.double()) / share).log())
    ratio = torch.stack(ratios)
    assert ratio.square().mean().sqrt() < 0.3
    assert 0 < ratio.mean() < 0.3  # two errors are added in quadrature


def test_what_is_not_seen_is_no_smaller_than_its_error(mates):
    wilson, child, shell, _ = mates
    shells, used, share = estimates(mates, 0.4)
    nothing = [Share(-s.error, s.error, s.n_pairs) for s in shells]
    got = mates_curve(wilson, child).through(nothing, shell, used.double())
    assert torch.isfinite(got).all()
    pooled = N_SHELLS**-0.5 * 0.4 * float(share.mean())
    assert SMALLEST < got.min()
    assert 0.3 * pooled < got.mean() < 10 * pooled


def test_without_estimates_there_is_no_curve(mates):
    wilson, child, shell, _ = mates
    unknown = [Share(0.0, float("inf"), 3)] * N_SHELLS
    used = torch.ones_like(child).double()
    assert mates_curve(wilson, child).through(unknown, shell, used) is None
