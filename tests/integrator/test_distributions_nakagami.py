"""Nakagami against SciPy, quadrature and Wilson's published moments."""

import math

import numpy as np
import pytest
import tolerances
import torch
from helpers import assert_goodness_of_fit, assert_within_se
from scipy import integrate, stats
from torch.distributions import kl_divergence

from braggflux.integrator.distributions.nakagami import Nakagami, gauss_hermite

K = [0.3, 0.5, 1.0, 3.7, 29.0, 31.0, 1e3, 1e6]
OMEGA = [1e-3, 2.5, 1e7]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scipy_law(k: float, omega: float):
    return stats.nakagami(k, scale=math.sqrt(omega))


@pytest.mark.parametrize("k", K)
@pytest.mark.parametrize("omega", OMEGA)
def test_log_prob_equals_scipy(k, omega):
    law = scipy_law(k, omega)
    f = law.ppf([1e-6, 0.01, 0.3, 0.5, 0.9, 0.999999])
    ours = Nakagami(tensor(k), tensor(omega)).log_prob(torch.as_tensor(f))
    # the terms are of size k log k: their rounding is what is left
    np.testing.assert_allclose(ours, law.logpdf(f), rtol=tolerances.SCIPY, atol=1e-9 * max(k, 1))


def test_log_prob_in_float32():
    f = np.linspace(0.1, 3.0, 30)
    ours = Nakagami(torch.tensor(2.0), torch.tensor(1.5)).log_prob(
        torch.as_tensor(f, dtype=torch.float32)
    )
    np.testing.assert_allclose(ours, scipy_law(2.0, 1.5).logpdf(f), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", K)
def test_square_is_gamma(k):
    torch.manual_seed(int(k) + 1)
    f = Nakagami(tensor(k), tensor(2.5)).rsample((4000,))[:, 0].numpy()
    assert_goodness_of_fit(f**2, stats.gamma(k, scale=2.5 / k).cdf)


@pytest.mark.parametrize("k", [0.5, 1.0, 40.0])
def test_samples_fit_the_density(k):
    torch.manual_seed(3)
    f = Nakagami(tensor(k), tensor(7.0)).rsample((4000,))[:, 0].numpy()
    assert_goodness_of_fit(f, scipy_law(k, 7.0).cdf)


@pytest.mark.parametrize("k", K)
@pytest.mark.parametrize("omega", OMEGA)
def test_moments_equal_scipy(k, omega):
    ours = Nakagami(tensor(k), tensor(omega))
    gamma = stats.gamma(k, scale=omega / k)
    # 1 - m^2 would keep 16 - log10(4 k) digits in SciPy: the variance by its own series
    ratio = math.exp(math.lgamma(k + 0.5) - math.lgamma(k)) / math.sqrt(k) if k < 100 else None
    mean = ratio * math.sqrt(omega) if ratio else math.sqrt(omega) * (1 - 1 / (8 * k))
    np.testing.assert_allclose(ours.mean.item(), mean, rtol=tolerances.SCIPY)
    variance = omega - mean**2 if ratio else omega / (4 * k) * (1 - 1 / (8 * k))
    np.testing.assert_allclose(ours.variance.item(), variance, rtol=2e-6)
    assert ours.second_moment.item() == pytest.approx(gamma.mean())


@pytest.mark.parametrize("k", [0.3, 0.5, 1.0, 5.0, 200.0])
def test_log_intensity_mean_and_entropy_equal_quadrature(k):
    law = scipy_law(k, 2.5)
    ours = Nakagami(tensor(k), tensor(2.5))
    # over u = log F the integrand has no singularity at F = 0
    low, high = (math.log(law.ppf(p)) for p in (1e-14, 1 - 1e-15))

    def expect(g):
        def f(u):
            return g(math.exp(u)) * law.pdf(math.exp(u)) * math.exp(u)

        return integrate.quad(f, low, high, limit=400, points=[math.log(law.median())])[0]

    np.testing.assert_allclose(
        ours.log_intensity_mean.item(), expect(lambda f: 2 * math.log(f)), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(
        ours.entropy().item(), expect(lambda f: -law.logpdf(f)), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("k", "omega", "k0", "omega0"),
    [(1.0, 1.0, 1.0, 3.0), (0.7, 4.0, 0.5, 1.0), (30.0, 2.0, 1.0, 5.0), (4.0, 1.0, 40.0, 1.2)],
)
def test_kl_equals_quadrature(k, omega, k0, omega0):
    q, p = scipy_law(k, omega), scipy_law(k0, omega0)
    low, high = q.ppf([1e-13, 1 - 1e-13])
    reference = integrate.quad(
        lambda f: q.pdf(f) * (q.logpdf(f) - p.logpdf(f)), low, high, limit=400
    )[0]
    ours = kl_divergence(
        Nakagami(tensor(k), tensor(omega)), Nakagami(tensor(k0), tensor(omega0))
    ).item()
    np.testing.assert_allclose(ours, reference, rtol=1e-6, atol=1e-8)
    assert ours > 0


@pytest.mark.parametrize("k", K)
def test_kl_of_equals_is_zero(k):
    q = Nakagami(tensor(k), tensor(2.5))
    assert kl_divergence(q, Nakagami(tensor(k), tensor(2.5))).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("k", "mean", "ratio"),
    # Wilson (1949): <F>^2 / <F^2> is pi/4 = 0.785 for acentric, 2/pi = 0.637 for centric
    [(1.0, math.sqrt(math.pi / 4), 0.785), (0.5, math.sqrt(2 / math.pi), 0.637)],
)
def test_wilson_statistics(k, mean, ratio):
    law = Nakagami(tensor(k), tensor(1.0))
    assert law.mean.item() == pytest.approx(mean, rel=tolerances.CLOSED_FORM)
    assert law.mean.item() ** 2 == pytest.approx(ratio, abs=5e-4)
    assert law.variance.item() == pytest.approx(1 - mean**2, rel=tolerances.CLOSED_FORM)
    # <|E^2 - 1|> is 0.736 and 0.968 (Karle, Dewar & Stone, 1968)
    torch.manual_seed(5)
    deviation = (law.rsample((100_000,)) ** 2 - 1).abs()[:, 0].numpy()
    assert_within_se(deviation, {1.0: 2 / math.e, 0.5: 0.96788}[k])


# Bounds on the error of 5-node expectations from a k on: of <I> in units of Omega, of the relative
# error of the standard deviation of I, and of <log(I + Omega / 10)> in nats. Seen on 2025-11-22:
# 9e-3 / 8e-3 / 1e-3 at k = 1/2 and the log at k = 0.7: 1.1e-2; 1.4e-3 / 2e-3 / 7e-3 at k = 1;
# 1e-5 / 8e-5 / 1.3e-4 at k = 5.
NODE_ERRORS = [
    (0.5, 1e-2, 1e-2, 1.5e-2),
    (1.0, 2e-3, 3e-3, 8e-3),
    (5.0, 2e-5, 1e-4, 2e-4),
    (50.0, 1e-7, 1e-6, 1e-6),
]


@pytest.mark.parametrize(("k", "of_mean", "of_sd", "of_log"), NODE_ERRORS)
def test_intensity_nodes_take_gamma_expectations(k, of_mean, of_sd, of_log):
    ks = tensor(k, 1.4 * k, 100 * k)
    nodes, weights = Nakagami(ks, torch.full_like(ks, 7.0)).intensity_nodes(5)
    mean = (weights @ nodes) / 7.0
    sd = (weights @ (nodes / 7.0 - mean) ** 2).sqrt() * ks.sqrt()
    log = weights @ (nodes / 7.0 + 0.1).log()
    for i, shape in enumerate(ks.tolist()):
        law = stats.gamma(shape, scale=1 / shape)
        exact = law.expect(lambda x: math.log(x + 0.1), epsabs=1e-9)
        assert abs(mean[i].item() - 1) < of_mean
        assert abs(sd[i].item() - 1) < of_sd
        assert abs(log[i].item() - exact) < of_log


def test_gauss_hermite_is_exact_for_polynomials():
    nodes, weights = gauss_hermite(5, tensor(0.0))
    moments = [float(weights @ nodes**p) for p in range(10)]
    np.testing.assert_allclose(moments, [1, 0, 1, 0, 3, 0, 15, 0, 105, 0], atol=1e-9)


def test_gradients():
    k = tensor(0.4, 1.0, 8.0, 29.0, 300.0).requires_grad_()
    omega = tensor(0.3, 2.0, 1.0, 5.0, 2.0).requires_grad_()
    f = tensor(0.2, 1.3, 1.0, 2.4, 1.4).requires_grad_()
    check = lambda g, *x: torch.autograd.gradcheck(g, x, **tolerances.GRADCHECK)  # noqa: E731
    assert check(lambda k, o, f: Nakagami(k, o).log_prob(f), k, omega, f)
    for name in ("mean", "variance", "log_intensity_mean"):
        assert check(lambda k, o, name=name: getattr(Nakagami(k, o), name), k, omega)
    assert check(lambda k, o: Nakagami(k, o).entropy(), k, omega)
    assert check(lambda k, o: Nakagami(k, o).intensity_nodes(5)[0], k, omega)
    assert check(lambda k, o: kl_divergence(Nakagami(k, o), Nakagami(k.flip(0), o * 2)), k, omega)


def test_gradient_of_samples_is_that_of_the_moments():
    """d<F>/dk through implicit reparameterisation, against the derivative of the closed form."""
    k = tensor(2.0).requires_grad_()
    exact = torch.autograd.grad(Nakagami(k, tensor(3.0)).mean, k)[0].item()
    torch.manual_seed(1)
    many = k.expand(50_000).clone().detach().requires_grad_()
    f = Nakagami(many, torch.full_like(many, 3.0)).rsample()
    assert_within_se(torch.autograd.grad(f.sum(), many)[0].numpy(), exact)


def test_no_overflow_at_extremes():
    k = tensor(0.3, 1e9).requires_grad_()
    omega = tensor(1e-12, 1e15).requires_grad_()
    q = Nakagami(k, omega)
    total = q.mean + q.variance + q.entropy() + kl_divergence(q, Nakagami(k * 0 + 1, omega * 2))
    total.sum().backward()
    assert torch.isfinite(total).all()
    assert torch.isfinite(k.grad).all()
    assert torch.isfinite(omega.grad).all()
