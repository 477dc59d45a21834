"""Likelihood of an expected intensity against quadrature over the relative error."""

import math

import numpy as np
import pytest
import tolerances
import torch
from helpers import assert_within_se
from scipy import integrate

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.merge.engine.likelihood import PhotonCountLikelihood


def observed(a, beta=20.0, t=1.0) -> ShiftedPoisson:
    a = torch.as_tensor(a, dtype=torch.float64).reshape(-1)
    return ShiftedPoisson(a, torch.full_like(a, beta), torch.full_like(a, t))


def likelihood(error: float, outliers: float = 0.01) -> PhotonCountLikelihood:
    return PhotonCountLikelihood(error, outliers)


def quadrature(a: float, beta: float, t: float, mu: float, s: float) -> float:
    """log of the integral over x of Normal(x; 0, s^2) exp(l(mu e^x))."""

    def log_integrand(x):
        return a * np.log(mu * np.exp(x) + beta) - t * mu * np.exp(x) - 0.5 * (x / s) ** 2

    x = np.linspace(-12 * s, 12 * s, 40001)
    values = log_integrand(x)
    top = values.max()
    area = integrate.trapezoid(np.exp(values - top), x)
    return top + math.log(area / (s * math.sqrt(2 * math.pi)))


@pytest.mark.parametrize("s", [0.005, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("photons", [0.0, 3.0, 30.0, 1e3, 1e6])
def test_marginal_over_the_relative_error_equals_quadrature(photons, s):
    """Observed 0, 2 and 4 standard deviations off what is expected."""
    beta, t = 20.0, 0.8
    mu = max(photons, 1.0)
    sigma = math.sqrt(t * (mu + beta) + (s * t * mu) ** 2)
    for off in (-4, -2, 0, 2, 4):
        a = max(t * (photons + beta) + off * sigma, 0.0)
        ours = likelihood(s)._marginal(observed(a, beta, t), torch.tensor([mu]).double()).item()
        exact = quadrature(a, beta, t, mu, s)
        # Laplace with the expected curvature. 2025-11-22: 0.027 at 4 sigma and s = 0.1
        assert ours == pytest.approx(exact, abs=0.002 if abs(off) < 3 and s < 0.03 else 0.05)


def test_without_relative_error_it_is_the_shifted_poisson():
    obs = observed([0.0, 20.0, 80.0, 500.0])
    mu = torch.tensor([1.0, 30.0, 50.0, 480.0]).double()
    ours = likelihood(1e-9)._marginal(obs, mu)
    # s stops at e^-7 = 9e-4: that times the square root of the counts is what is left
    torch.testing.assert_close(ours, obs.log_prob(mu), rtol=0, atol=3e-4)


@pytest.mark.parametrize("s", [0.01, 0.1])
@pytest.mark.parametrize(("mu", "beta"), [(0.0, 10.0), (5.0, 10.0), (100.0, 20.0), (1e4, 50.0)])
def test_integrates_to_one_over_the_observed_intensity(mu, beta, s):
    """Good part and mixture as densities of the observed intensity a / t - beta."""
    t, mean = 1.0, mu + beta
    width = math.sqrt(mean + (s * mu) ** 2)
    a = torch.linspace(max(mean - 10 * width, 0.0), mean + 10 * width, 4001).double()
    model = likelihood(s)
    good, _ = model.components(observed(a, beta, t), torch.tensor(mu).double())
    area = integrate.trapezoid(good.exp().detach(), a)
    # Stirling's 1 / (12 a); at s = 0.1 the curvature's share of the second order as well
    assert area == pytest.approx(1.0, abs=0.02)


def test_outlier_part_integrates_to_one():
    a = torch.as_tensor(
        np.concatenate([-np.geomspace(1e7, 1e-3, 20001), np.geomspace(1e-3, 1e7, 20001)])
    )
    obs = ShiftedPoisson(a + 120.0, torch.full_like(a, 20.0), torch.ones_like(a))
    _, outlier = likelihood(0.02).components(obs, torch.tensor(100.0).double())
    assert integrate.trapezoid(outlier.exp().detach(), a) == pytest.approx(1.0, abs=1e-3)


def test_counts_follow_the_model():
    """Simulated flicker and Poisson noise: z from the claimed variance has unit variance."""
    rng = np.random.default_rng(0)
    mu, s, n = 3000.0, 0.03, 20_000
    a = rng.poisson(mu * np.exp(s * rng.normal(size=n)) + 20.0)
    obs = observed(a)
    variance = likelihood(s).variance(obs, torch.tensor(mu).double())
    z2 = ((obs.mode - mu) ** 2 / variance).detach().numpy()
    assert_within_se(z2, 1.0)


def test_relative_error_and_outlier_share_are_learned():
    rng = np.random.default_rng(1)
    n = 2000
    mu = rng.uniform(500, 20_000, n)
    a = rng.poisson(mu * np.exp(0.04 * rng.normal(size=n)) + 20.0).astype(float)
    bad = rng.random(n) < 0.05
    a[bad] *= rng.uniform(2, 6, bad.sum())
    obs, expected = observed(a), torch.as_tensor(mu)
    model = likelihood(0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (-model(obs, expected).mean()).backward()
        optimizer.step()
    assert model.relative_error.item() == pytest.approx(0.04, rel=0.08)
    # more than 0.05: the tail's own core overlaps the good part (0.077 on 2025-11-22)
    assert 0.04 < torch.sigmoid(model.logit_outlier).item() < 0.1
    good = model.responsibility(obs, expected).detach().numpy()
    assert good[~bad].mean() > 0.96
    assert good[bad].mean() < 0.1


@pytest.mark.parametrize("off", [50.0, 500.0, -30.0])
def test_an_outlier_has_a_bounded_gradient(off):
    """Far off, the pull on log mu falls like 1 / distance instead of growing with it."""
    mu = torch.tensor(1000.0).double()
    sigma = (mu + 20 + (0.02 * mu) ** 2).sqrt()

    def pull(n_sigma):
        log_mu = mu.log().clone().requires_grad_()
        obs = observed((mu + 20 + n_sigma * sigma).clamp_min(0.0))
        return torch.autograd.grad(likelihood(0.02)(obs, log_mu.exp()).sum(), log_mu)[0].abs()

    assert pull(off) < pull(3.0)
    # Student-t: 3 mu / distance, and no more than 3 from the width's share in the norm
    assert pull(off) < 5.0
    assert pull(off) < 0.02 * abs(off) * mu / sigma


def test_responsibility_is_bayes():
    model = likelihood(0.02, 0.1)
    obs, mu = observed([1020.0, 1400.0]), torch.tensor([1000.0, 1000.0]).double()
    good, outlier = model.components(obs, mu)
    expected = 0.9 * good.exp() / (0.9 * good.exp() + 0.1 * outlier.exp())
    torch.testing.assert_close(model.responsibility(obs, mu), expected)
    mixture = torch.log(0.9 * good.exp() + 0.1 * outlier.exp())
    torch.testing.assert_close(model(obs, mu), mixture)


@pytest.mark.parametrize("a", [0.0, 25.0, 1e6])
def test_finite_from_nothing_to_a_million(a):
    model = likelihood(0.02)
    for mu in (1e-12, 1.0, 1e4, 1e9):
        log_mu = torch.tensor([math.log(mu)]).double().requires_grad_()
        value = model(observed(a), log_mu.exp()).sum()
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(log_mu.grad).all()
        assert all(torch.isfinite(p.grad) for p in model.parameters())


def test_gradients():
    a = torch.tensor([18.0, 120.0, 2100.0]).double().requires_grad_()
    beta = torch.tensor([20.0, 15.0, 30.0]).double().requires_grad_()
    t = torch.tensor([1.0, 0.9, 0.7]).double().requires_grad_()
    mu = torch.tensor([3.0, 100.0, 3000.0]).double().requires_grad_()
    model = likelihood(0.02)

    def outlier(*x):
        return model.components(ShiftedPoisson(*x[:3]), x[3])[1]

    def marginal(*x):
        return model._marginal(ShiftedPoisson(*x[:3]), x[3])

    assert torch.autograd.gradcheck(outlier, (a, beta, t, mu), **tolerances.GRADCHECK)
    # the mode's derivative is that of one scoring step, with the expected curvature for the exact
    loose = {**tolerances.GRADCHECK, "rtol": 2e-3}
    assert torch.autograd.gradcheck(marginal, (a, beta, t, mu), **loose)


def test_slope_equals_that_of_the_quadrature():
    model = likelihood(0.02)
    for a, mu in ((18.0, 3.0), (120.0, 100.0), (3100.0, 3000.0)):
        expected = torch.tensor([mu]).double().requires_grad_()
        model._marginal(observed(a), expected).sum().backward()
        step = 1e-3 * mu
        high, low = (quadrature(a, 20.0, 1.0, mu + sign * step, 0.02) for sign in (1, -1))
        noise = (mu + 20.0 + (0.02 * mu) ** 2) ** -0.5  # standard deviation of the slope
        assert expected.grad.item() == pytest.approx((high - low) / (2 * step), abs=5e-3 * noise)
