"""The shifted Poisson against the pixel likelihood, Cramer-Rao and Monte Carlo."""

import numpy as np
import pytest
import tolerances
import torch
from helpers import Spot, assert_within_se, gaussian_voxels, spot_metadata
from torch.distributions import Poisson

from braggflux.integrator.distributions.shifted_poisson import (
    ShiftedPoisson,
    shifted_poisson_from_pixels,
)


def spot(background: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Profile and tilted background of one 11^3 box, each (1, P) in float64."""
    shape = Spot()
    rho = gaussian_voxels(spot_metadata(1, np.random.default_rng(4), shape), shape).reshape(1, -1)
    tilt = np.linspace(0.7, 1.3, rho.shape[1])[None]
    return torch.as_tensor(rho), torch.as_tensor(background * tilt)


def simulate(true: float, rho, b, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.poisson((true * rho + b).expand(n, -1), generator=generator)


def matched(counts, rho, b, reference: float, is_valid=None) -> ShiftedPoisson:
    n = len(counts)
    if is_valid is None:
        is_valid = torch.ones_like(counts, dtype=torch.bool)
    return shifted_poisson_from_pixels(
        counts, rho.expand(n, -1), b.expand(n, -1), is_valid, torch.full((n,), reference).double()
    )


def pixel_log_likelihood(counts, rho, b, intensity: float) -> torch.Tensor:
    return Poisson(intensity * rho + b).log_prob(counts).sum(-1)


@pytest.mark.parametrize("reference", [0.0, 3.0, 5000.0])
def test_exact_where_background_is_proportional_to_the_profile(reference):
    rho, _ = spot()
    rho = rho.clamp_min(1e-6)
    b = 40.0 * rho
    counts = simulate(25.0, rho, b, 3)
    likelihood = matched(counts, rho, b, reference)
    grid = [0.1, 2.0, 20.0, 300.0, 1e5]
    ours = torch.stack([likelihood.log_prob(torch.full((3,), j).double()) for j in grid])
    exact = torch.stack([pixel_log_likelihood(counts, rho, b, j) for j in grid])
    torch.testing.assert_close(ours - ours[0], exact - exact[0], rtol=1e-10, atol=1e-6)
    torch.testing.assert_close(likelihood.mode, counts.sum(-1) / rho.sum() - 40.0)


@pytest.mark.parametrize("true", [0.0, 3.0, 50.0, 2000.0])
@pytest.mark.parametrize("error", [0.1, 1.0, 10.0])
def test_mode_is_unbiased_whatever_the_reference(true, error):
    rho, b = spot()
    reference = error * max(true, 2.0)
    counts = simulate(true, rho, b, 1500, seed=int(true))
    mode = matched(counts, rho, b, reference).mode
    assert_within_se(mode, true)
    # the mean is exact: with the expected counts for the counts, the mode is the truth
    assert matched(true * rho + b, rho, b, reference).mode.item() == pytest.approx(true, abs=1e-8)


def test_unbiased_with_masked_voxels():
    rho, b = spot()
    is_valid = torch.rand(1, rho.shape[1], generator=torch.Generator().manual_seed(1)) > 0.4
    counts = simulate(80.0, rho, b, 1500) * is_valid
    likelihood = matched(counts, rho, b, 30.0, is_valid.expand(1500, -1))
    assert_within_se(likelihood.mode, 80.0)
    torch.testing.assert_close(likelihood.exposure[0], (rho * is_valid).sum())


@pytest.mark.parametrize("true", [0.0, 3.0, 50.0, 2000.0])
def test_variance_is_the_cramer_rao_bound_at_the_reference(true):
    rho, b = spot()
    counts = simulate(true, rho, b, 4000, seed=int(true) + 7)
    likelihood = matched(counts, rho, b, true)
    bound = 1 / (rho**2 / (true * rho + b)).sum()
    claimed = likelihood.variance(torch.tensor(true, dtype=torch.float64))
    torch.testing.assert_close(claimed[0], bound, rtol=1e-9, atol=0)
    assert_within_se((likelihood.mode - true) ** 2, bound.item())


def test_efficiency_lost_by_a_wrong_reference_is_bounded():
    """Weights tuned for 10 times too much (little) cost less than 30 (15) % of the variance."""
    rho, b = spot()
    for true in (3.0, 50.0, 2000.0):
        rate = true * rho + b
        best = 1 / (rho**2 / rate).sum()
        for error, bound in ((10.0, 1.30), (0.1, 1.15)):
            weight = rho / (error * true * rho + b)
            variance = (weight**2 * rate).sum() / (weight * rho).sum() ** 2
            assert 1 <= variance / best < bound


@pytest.mark.parametrize("true", [5.0, 50.0, 1000.0])
def test_log_ratio_follows_the_pixels_within_two_sigma(true):
    """Mean size of the error of the log-ratio against J0 [nats]; the ratio itself is 1/2 and 2."""
    rho, b = spot()
    counts = simulate(true, rho, b, 300)
    likelihood = matched(counts, rho, b, true)
    sigma = likelihood.variance(torch.tensor(true)).sqrt()[0].item()

    def errors(j):
        ours = [likelihood.log_prob(torch.tensor(x).double()) for x in (j, true)]
        exact = [pixel_log_likelihood(counts, rho, b, x) for x in (j, true)]
        return (ours[0] - ours[1]) - (exact[0] - exact[1])

    for step, bound in ((-2.0, 0.15), (-1.0, 0.05), (1.0, 0.05), (2.0, 0.15)):
        assert errors(max(true + step * sigma, 0.0)).abs().mean() < bound


def test_score_at_the_reference_is_exact():
    rho, b = spot()
    counts = simulate(50.0, rho, b, 5)
    j = torch.full((5,), 37.0, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(matched(counts, rho, b, 37.0).log_prob(j).sum(), j)[0]
    exact = torch.autograd.grad(Poisson(j[:, None] * rho + b).log_prob(counts).sum(), j)[0]
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def test_tempered_keeps_the_mode_and_divides_the_information():
    rho, b = spot()
    likelihood = matched(simulate(50.0, rho, b, 4), rho, b, 50.0)
    fraction = torch.tensor([1.0, 0.9, 0.5, 0.1]).double()
    tempered = likelihood.tempered(fraction)
    torch.testing.assert_close(tempered.mode, likelihood.mode)
    j = torch.tensor(50.0).double()
    torch.testing.assert_close(tempered.variance(j), likelihood.variance(j) / fraction)
    rise = likelihood.log_prob(j) - likelihood.log_maximum
    torch.testing.assert_close(tempered.log_prob(j) - tempered.log_maximum, fraction * rise)


def test_maximum_and_curvature():
    rho, b = spot()
    likelihood = matched(simulate(50.0, rho, b, 4), rho, b, 50.0)
    j = likelihood.mode.clone().requires_grad_()
    value = likelihood.log_prob(j)
    torch.testing.assert_close(value, likelihood.log_maximum)
    (slope,) = torch.autograd.grad(value.sum(), j, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), j)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-10)
    torch.testing.assert_close(-1 / curvature, likelihood.observed_variance)


def test_no_photon_at_all_has_a_finite_gradient():
    rho, b = spot()
    rho = rho.requires_grad_()
    likelihood = matched(torch.zeros_like(rho), rho, b, 0.0)
    assert likelihood.effective_counts.item() == 0.0
    # log L = -J t + const, and its maximum over J + beta >= 0 is at -beta
    assert likelihood.mode.item() == -likelihood.effective_background.item()
    torch.testing.assert_close(
        likelihood.log_maximum, likelihood.exposure * likelihood.effective_background
    )
    (likelihood.log_maximum + likelihood.log_prob(torch.ones(1))).sum().backward()
    assert torch.isfinite(rho.grad).all()


def test_gradients_by_profile_and_background():
    rng = np.random.default_rng(2)
    rho = torch.as_tensor(rng.dirichlet(np.ones(12), 2)).requires_grad_()
    b = torch.as_tensor(rng.uniform(0.5, 2.0, (2, 12))).requires_grad_()
    counts = torch.as_tensor(rng.poisson(5.0, (2, 12)).astype(float))
    is_valid = torch.as_tensor(rng.random((2, 12)) > 0.2)
    reference = torch.tensor([0.0, 40.0]).double()

    def matched_parts(rho, b):
        s = shifted_poisson_from_pixels(counts, rho, b, is_valid, reference)
        j = torch.tensor([3.0, 30.0]).double()
        return s.effective_counts, s.effective_background, s.exposure, s.mode, s.log_prob(j)

    assert torch.autograd.gradcheck(matched_parts, (rho, b), **tolerances.GRADCHECK)


def test_effective_background_in_float32_for_a_bright_spot():
    """J0 of 1e7 photons must not swallow an effective background of some tens."""
    rho, b = spot()
    counts = torch.full_like(rho, 3.0)
    exact = matched(counts, rho, b, 1e7).effective_background
    ours = shifted_poisson_from_pixels(
        counts.float(),
        rho.float(),
        b.float(),
        torch.ones_like(rho, dtype=torch.bool),
        torch.tensor([1e7]),
    ).effective_background
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=0)
