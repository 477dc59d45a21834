"""Photon counts as a measurement: density, mean under q and gradients, against exact answers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tolerances
import torch
from scipy import integrate

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.merge.data.measurement import (
    GaussianMeasurement,
    PartlyCounted,
    PhotonCounts,
    measurement_of,
)
from braggflux.merge.likelihood.common_error import CommonError
from braggflux.merge.likelihood.error_model import ErrorModel
from braggflux.merge.likelihood.student_t import Normal, StudentT
from braggflux.merge.scale.base import Scale

NOTHING_KNOWN = Scale(torch.zeros(()))


def f64(values):
    return torch.as_tensor(np.asarray(values, dtype=float))


def counts(rng, n):
    """Counts, backgrounds, exposures; some without a photon."""
    beta, t = rng.uniform(0.2, 30, n), rng.uniform(0.3, 1.0, n)
    true = rng.exponential(8.0, n)
    a = rng.poisson(t * (true + beta)).astype(float)
    a[:3] = 0.0
    return true, f64(a), f64(beta), f64(t)


def normal():
    return Normal(ErrorModel(False, 1.0), CommonError(False))


def nearly_normal(relative_error):
    """Student's t with the most degrees of freedom, and a relative error."""
    model = StudentT(ErrorModel(False, 1.0), CommonError(False), 3000.0)
    with torch.no_grad():
        model.error.log_sdadd.fill_(np.log(relative_error))
    return model


def density(model, measured, mean, spread=None):
    batch = SimpleNamespace(observations=SimpleNamespace(measured=measured), cluster=None)
    spread = torch.zeros_like(mean) if spread is None else spread
    ones = torch.ones_like(mean)
    return model(batch, model.expectation(measured, mean, spread, ones, NOTHING_KNOWN, ones))


def stirling(exact):
    """What a density of the observed intensity lacks for the log-likelihood of the photons."""
    return exact.log_maximum + 0.5 * torch.log(2 * torch.pi * exact.observed_variance)


def test_it_is_the_shifted_poisson():
    rng = np.random.default_rng(0)
    true, a, beta, t = counts(rng, 200)
    exact = PhotonCounts(a, beta, t)
    mean = f64(true * rng.uniform(0.2, 3, 200)).requires_grad_()
    given, wanted = density(normal(), exact, mean), exact.log_prob(mean) - stirling(exact)
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)
    slopes = [torch.autograd.grad(x.sum(), mean, retain_graph=True)[0] for x in (given, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-9)


def test_the_unit_of_intensity_does_not_matter():
    rng = np.random.default_rng(3)
    true, a, beta, t = counts(rng, 50)
    photons, mean = ShiftedPoisson(a, beta, t), f64(true + 0.1)
    given = density(nearly_normal(0.02), PhotonCounts.of(photons, 40.0), mean / 40.0)
    wanted = density(nearly_normal(0.02), PhotonCounts.of(photons, 1.0), mean)
    torch.testing.assert_close(given - np.log(40.0), wanted, rtol=1e-9, atol=1e-9)


def test_mean_under_q_against_quadrature():
    """Second order: good where q is narrow, a few hundredths of a nat where it is Wilson's."""
    rng = np.random.default_rng(1)
    for k, tolerance in ((50.0, 0.01), (4.0, 0.1)):
        for _ in range(6):
            _, a, beta, t = counts(rng, 4)
            m = float(rng.exponential(8.0)) + 0.5
            exact = PhotonCounts(a[3:], beta[3:], t[3:])
            q = Nakagami(f64([k]), f64([m]))

            def integrand(f, exact=exact, q=q):
                value = f64([f])
                log_l = exact.log_prob(value**2) - exact.log_maximum
                return float(q.log_prob(value).exp() * log_l)

            wanted, _ = integrate.quad(integrand, 1e-9, 6 * m**0.5, limit=200)
            given = density(normal(), exact, f64([m]), f64([m**2 / k]))
            given = float(given + stirling(exact) - exact.log_maximum)
            assert given == pytest.approx(wanted, abs=tolerance * (1 + 0.1 * abs(wanted)))


@pytest.mark.parametrize("expected", [0.3, 6.0, 40.0])
@pytest.mark.parametrize("photons", [1e-3, 1.0, 10.0])
def test_gradients_of_the_joint_objective_by_finite_differences(photons, expected):
    """Density and the pixels' own evidence, as a joint run adds them."""

    def value(a, beta, t, mean, spread):
        exact = PhotonCounts(a, beta, t)
        return density(nearly_normal(0.05), exact, mean, spread) + stirling(exact)

    given = [f64([v]).requires_grad_() for v in (photons, 3.0, 0.8, expected, 0.1 * expected**2)]
    assert torch.autograd.gradcheck(value, given, eps=1e-7, atol=1e-5, rtol=1e-4)


def test_a_box_without_a_photon():
    """No derivative by a exists on the left of 0; those of all others, and of all on the right."""
    beta, t, mean = (f64([v]).requires_grad_() for v in (3.0, 0.8, 6.0))
    a = f64([0.0]).requires_grad_()

    def value(a, beta, t, mean):
        exact = PhotonCounts(a, beta, t)
        return density(normal(), exact, mean) + stirling(exact)

    gradient = torch.autograd.grad(value(a, beta, t, mean), (a, beta, t, mean))
    # exactly l(m) = a log(m + beta) - t m
    for got, wanted in zip(gradient, (np.log(9.0), 0.0, -6.0, -0.8), strict=True):
        assert float(got) == pytest.approx(wanted, abs=1e-9)
    step = 1e-6
    with torch.no_grad():
        rise = float(value(a + step, beta, t, mean) - value(a, beta, t, mean)) / step
    assert rise == pytest.approx(np.log(9.0), abs=1e-6)

    def with_errors(beta, t, mean):
        return density(nearly_normal(0.05), PhotonCounts(a.detach(), beta, t), mean)

    assert torch.autograd.gradcheck(with_errors, (beta, t, mean), **tolerances.GRADCHECK)
    # where the variance is wider than the counts', the slope by a is steep, and finite
    wide = density(nearly_normal(0.5), PhotonCounts(a, beta, t), mean)
    assert torch.isfinite(torch.autograd.grad(wide, a)[0])


def test_the_root_of_the_deviance_is_smooth_and_signed():
    exact = PhotonCounts(f64([20.0]), f64([3.0]), f64([0.8]))  # I = 22
    for off in (-5.0, -0.026, -0.024, 0.0, 0.024, 0.026, 5.0):
        mean = f64([22.0 - off]).requires_grad_()
        residual, square = exact.compare(mean, torch.zeros(1).double())
        slope = torch.autograd.grad(residual, mean, retain_graph=True)[0]
        residual, square = residual.item(), square.item()
        assert residual**2 == pytest.approx(square, rel=1e-5, abs=1e-10)
        assert residual == pytest.approx(off, rel=0.2, abs=1e-12)
        assert slope.item() == pytest.approx(-1.0, abs=0.2)


def test_numbers_beside_counts():
    rng = np.random.default_rng(0)
    _, a, beta, t = counts(rng, 6)
    is_counted = np.array([True, False, True, False, False, True])
    exact = PhotonCounts(a, beta, t)
    share = np.where(is_counted, 1 / t.numpy(), 0.0)
    sigma = np.where(is_counted, (beta / t).sqrt().numpy(), 2.0)
    both = measurement_of(exact.mode.numpy(), sigma, share)
    assert isinstance(both, PartlyCounted)
    numbers = GaussianMeasurement(exact.mode, torch.full((6,), 2.0).double())
    mean, spread = f64(rng.uniform(1, 9, 6)), f64(rng.uniform(0, 2, 6))
    given = density(normal(), both, mean, spread)
    for part, chosen in ((exact, is_counted), (numbers, ~is_counted)):
        torch.testing.assert_close(given[chosen], density(normal(), part, mean, spread)[chosen])
        torch.testing.assert_close(both.observed_variance[chosen], part.observed_variance[chosen])
    torch.testing.assert_close(both.background_sigma, f64(sigma))
    alone = measurement_of(exact.mode.numpy(), sigma, None)
    assert isinstance(alone, GaussianMeasurement)
    torch.testing.assert_close(both[1:3].mode, exact.mode[1:3])


def test_a_count_of_nothing_stays_nothing_through_the_columns_of_a_file():
    beta, t = np.array([0.3, 7.1]), np.array([0.7, 0.9])
    counted = measurement_of(-beta, np.sqrt(beta / t), 1 / t)
    assert (counted.effective_counts >= 0).all()
    torch.testing.assert_close(counted.effective_counts, torch.zeros(2).double())
    assert torch.isfinite(density(normal(), counted, f64([1.0, 2.0]))).all()
