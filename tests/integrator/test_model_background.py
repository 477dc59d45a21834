"""Fisher scoring of intensity and background against simulated boxes and explicit algebra."""

import numpy as np
import pytest
import tolerances
import torch
from helpers import (
    Spot,
    assert_within_se,
    gaussian_voxels,
    robust_spread,
    spot_metadata,
    tilted_background,
)
from torch.distributions import MultivariateNormal, kl_divergence

import braggflux.integrator.model.background as background_module
from braggflux.integrator.model.background import BackgroundModel, MeanBackground

SPOT = Spot(sigma_x_px=0.8, sigma_y_px=0.8, sigma_m_deg=0.08, box=(9, 9, 9))
LEVEL, LEVEL_SD, SLOPE_SD = 1.2, 0.1, 0.15


def simulated(true: float, n: int, seed: int = 0):
    """Counts, profile, mean background (n, P), and the coefficients theta (n, 4) drawn."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(n, 4)) * [LEVEL_SD, SLOPE_SD, SLOPE_SD, SLOPE_SD]
    background = tilted_background(LEVEL, theta[:, 1:], SPOT.box)
    background *= np.exp(theta[:, 0])[:, None, None, None]
    profile = gaussian_voxels(spot_metadata(n, rng, SPOT), SPOT)
    counts = rng.poisson(true * profile + background)
    flat = lambda a: torch.as_tensor(a, dtype=torch.float64).flatten(1)  # noqa: E731
    return flat(counts), flat(profile), torch.full((n, 729), LEVEL).double(), theta


def model(n_rounds: int = 4) -> BackgroundModel:
    return BackgroundModel(SPOT.box, LEVEL_SD, SLOPE_SD, n_rounds).double()


def fit(data, start: float, n_rounds: int = 4):
    counts, profile, mean, _ = data
    is_valid = torch.ones_like(counts, dtype=torch.bool)
    intensity = torch.full((len(counts), 1), start, dtype=torch.float64)
    return model(n_rounds).fit(counts, is_valid, profile, mean, intensity)


def full_information(j, theta, profile, mean) -> np.ndarray:
    """Fisher information of (J, theta) with the prior, (5, 5), of one box, in plain NumPy."""
    t, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SPOT.box), indexing="ij")
    basis = np.stack([np.ones_like(x), x, y, t], -1).reshape(-1, 4)
    b = mean * np.exp(basis @ theta)
    design = np.concatenate([profile[:, None], b[:, None] * basis], 1)
    information = design.T @ (design / (j * profile + b)[:, None])
    information[1:, 1:] += np.diag([LEVEL_SD**-2, *[SLOPE_SD**-2] * 3])
    return information


@pytest.mark.parametrize("true", [0.0, 10.0, 100.0, 2000.0])
def test_intensity_and_its_error_are_calibrated(true):
    data = simulated(true, 500, seed=int(true))
    result = fit(data, start=max(true, 1.0) * 1.5)
    _, profile, _, _ = data
    own = profile**2 / (true * profile + result.background)
    sigma = (own.sum(1) * result.information_fraction) ** -0.5
    z = ((result.intensity - true) / sigma).numpy()
    assert 0.9 < robust_spread(z) < 1.1
    assert_within_se(z, 0.0)


@pytest.mark.parametrize("true", [10.0, 2000.0])
def test_coefficients_and_their_errors_are_calibrated(true):
    data = simulated(true, 500, seed=1)
    result = fit(data, start=true)
    error = result.coefficients.numpy() - data[3]
    z = error / result.covariance.diagonal(dim1=1, dim2=2).sqrt().numpy()
    for k in range(4):
        assert 0.9 < robust_spread(z[:, k]) < 1.1
    # a Gaussian prior's pull vanishes on average over coefficients drawn from it
    assert_within_se(error, 0.0)


def test_result_is_the_posterior_maximum():
    data = simulated(60.0, 5)
    counts, profile, mean, _ = data
    result = fit(data, start=60.0, n_rounds=10)
    theta = result.coefficients.clone().requires_grad_()
    j = result.intensity.clone().requires_grad_()
    basis = model().basis.double()
    rate = j[:, None] * profile + mean * torch.exp(theta @ basis.T)
    prior = torch.tensor([LEVEL_SD, SLOPE_SD, SLOPE_SD, SLOPE_SD]).double()
    log_posterior = (counts * rate.log() - rate).sum() - 0.5 * ((theta / prior) ** 2).sum()
    slopes = torch.autograd.grad(log_posterior, (j, theta))
    assert slopes[0].abs().max() < 1e-6
    assert slopes[1].abs().max() < 1e-3  # in units of 1 / theta, where the curvature is hundreds


def test_default_rounds_are_enough():
    """Far start, few rounds: within a tenth of sigma of the maximum."""
    for true in (5.0, 100.0, 2000.0):
        data = simulated(true, 20)
        few, many = fit(data, 3.0 * true, n_rounds=2), fit(data, true, n_rounds=10)
        sigma = (true + 30.0) ** 0.5
        assert ((few.intensity - many.intensity).abs() < 0.1 * sigma).all()


def test_information_fraction_and_covariance_equal_the_full_inverse():
    data = simulated(80.0, 6)
    result = fit(data, start=80.0, n_rounds=10)
    _, profile, mean, _ = (np.asarray(d) for d in data)
    for i in range(6):
        information = full_information(
            result.intensity[i].item(), result.coefficients[i].numpy(), profile[i], mean[i]
        )
        variance = np.linalg.inv(information)[0, 0]
        expected = 1 / (information[0, 0] * variance)
        assert result.information_fraction[i].item() == pytest.approx(expected, rel=1e-6)
        covariance = np.linalg.inv(information[1:, 1:])
        np.testing.assert_allclose(result.covariance[i], covariance, rtol=1e-5, atol=1e-9)
        assert 0.5 < expected < 1.0


def test_kl_equals_torch():
    result = fit(simulated(80.0, 6), start=80.0)
    prior = MultivariateNormal(
        torch.zeros(4).double(),
        torch.diag(torch.tensor([LEVEL_SD, SLOPE_SD, SLOPE_SD, SLOPE_SD]).double() ** 2),
    )
    expected = kl_divergence(result.q_background, prior)
    torch.testing.assert_close(model().kl(result), expected, rtol=1e-6, atol=1e-8)
    assert (expected > 0).all()


def test_prior_width_is_learned_from_the_spread_of_the_coefficients():
    """The stationary point of the KL is empirical Bayes: tau^2 = <cov + theta^2>."""
    background = model()
    result = fit(simulated(20.0, 300), start=20.0)
    optimizer = torch.optim.Adam(background.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        background.kl(result).mean().backward()
        optimizer.step()
    learned = background.log_prior_sd.exp().detach()
    expected = (result.covariance.diagonal(dim1=1, dim2=2) + result.coefficients**2).mean(0).sqrt()
    torch.testing.assert_close(learned, expected, rtol=0.01, atol=0)
    torch.testing.assert_close(
        learned, torch.tensor([LEVEL_SD, SLOPE_SD, SLOPE_SD, SLOPE_SD]).double(), rtol=0.15, atol=0
    )


def test_without_recorded_voxels_the_prior_comes_back():
    counts, profile, mean, _ = simulated(50.0, 3)
    invalid = torch.zeros_like(counts, dtype=torch.bool)
    result = model().fit(counts * 0, invalid, profile, mean, torch.zeros(3, 1).double())
    torch.testing.assert_close(result.coefficients, torch.zeros(3, 4).double())
    prior = torch.diag(torch.tensor([LEVEL_SD, *[SLOPE_SD] * 3]).double() ** 2)
    torch.testing.assert_close(result.covariance, prior.expand(3, 4, 4), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(model().kl(result), torch.zeros(3).double(), rtol=0, atol=1e-5)


def test_mean_background_reads_the_right_voxels():
    """Panels of two sizes, two sweeps, frame levels; a box beyond the edge repeats the edge."""
    rng = np.random.default_rng(0)
    images = [[torch.rand(20, 30) + 1, torch.rand(25, 15) + 1] for _ in range(2)]
    levels = [torch.rand(12) + 0.5, torch.rand(7) + 0.5]
    box = (3, 5, 4)
    background = MeanBackground(images, levels, box)
    data = spot_metadata(4, rng)
    changes = {
        "experiment": torch.tensor([0, 1, 1, 0]),
        "panel": torch.tensor([0, 1, 0, 1]),
        "corner": torch.tensor([[2, 10, 7], [1, 20, 3], [-1, -2, 5], [5, 0, 11]]),
    }
    data = type(data)(**{**vars(data), **changes})
    found = background(data)
    for i in range(4):
        image = images[data.experiment[i]][data.panel[i]]
        level = levels[data.experiment[i]]
        t, y, x = ((data.corner[i, a] + torch.arange(n)).clamp_min(0) for a, n in enumerate(box))
        expected = level[t][:, None, None] * image[y][:, x]
        torch.testing.assert_close(found[i], expected)


def test_layers_of_several_frames_add_their_levels():
    """Beyond the scan the level of the nearest frame goes on."""
    image, level = torch.rand(20, 20) + 1, torch.rand(30) + 0.5
    background = MeanBackground([[image]], [level], (3, 2, 2))
    data = spot_metadata(3, np.random.default_rng(0))
    changes = {
        "corner": torch.tensor([[4, 3, 3], [-3, 3, 3], [27, 3, 3]]),
        "frames_per_layer": torch.tensor([2, 4, 5]),
    }
    found = background(type(data)(**{**vars(data), **changes}))
    for row, per_layer in enumerate((2, 4, 5)):
        first = changes["corner"][row, 0]
        frames = (first + torch.arange(3 * per_layer)).clamp(0, 29)
        expected = level[frames].reshape(3, per_layer).sum(1)
        torch.testing.assert_close(found[row], expected[:, None, None] * image[3:5, 3:5])


def test_mean_background_has_a_floor():
    background = MeanBackground([[torch.zeros(20, 20)]], [torch.ones(5)], (3, 3, 3))
    data = spot_metadata(2, np.random.default_rng(0))
    assert (background(data) >= 1e-3 * (1 - tolerances.FLOAT32_SUM)).all()


def shining(data, counts_at_centre: float, seed: int = 3):
    """The boxes of :func:`simulated` with a place of 2.5 pixels that shines on frames 2 to 5."""
    counts, profile, mean, theta = data
    t, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SPOT.box), indexing="ij")
    blob = np.exp(-0.5 * ((x - 1.5) ** 2 + (y + 1.0) ** 2) / 2.5**2) * ((t >= -2) & (t < 2))
    added = np.random.default_rng(seed).poisson(counts_at_centre * blob, (len(counts), *SPOT.box))
    return counts + torch.as_tensor(added).reshape(counts.shape), profile, mean, theta


def narrow(data, start: float):
    """Fit with the prior that a sound sweep learns: 5 %."""
    counts, profile, mean, _ = data
    intensity = torch.full((len(counts), 1), start, dtype=torch.float64)
    own = BackgroundModel(SPOT.box, 0.05, 0.05, 4).double()
    return own.fit(counts, torch.ones_like(counts, dtype=torch.bool), profile, mean, intensity)


@pytest.mark.parametrize("true", [5.0, 60.0, 600.0])
def test_a_place_that_shines_for_a_while_is_background(true, monkeypatch):
    """A place that is dark before and after: of its photons under the spot two thirds are told."""
    data = simulated(true, 200)
    shines = shining(data, 4.0)
    alone, found = narrow(data, true), narrow(shines, true)
    monkeypatch.setattr(background_module, "CONTRADICTED", np.inf)
    before = narrow(shines, true)
    added, was_added = (np.median(r.intensity - alone.intensity) for r in (found, before))
    assert was_added > 80
    assert abs(added) < 0.4 * was_added
    # the rest of them is in sigma
    fraction, fraction_before = (r.information_fraction.mean() for r in (found, before))
    assert fraction < 0.9 * fraction_before


def test_what_the_profile_of_a_strong_spot_lacks_is_no_background():
    counts, profile, mean, _ = simulated(6e4, 20)
    tails = counts + 0.01 * 6e4 * (profile < 1e-3) / (profile < 1e-3).sum(1, keepdim=True)
    result = narrow((tails, profile, mean, None), 6e4)
    assert_is_a_plane(result)


def test_boxes_that_agree_with_the_prior_are_fitted_by_a_plane():
    assert_is_a_plane(fit(simulated(200.0, 400), 200.0))


def assert_is_a_plane(result):
    basis = model().basis.double()
    plane = LEVEL * torch.exp(result.coefficients @ basis.T)
    torch.testing.assert_close(result.background, plane)
