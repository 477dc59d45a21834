"""The profile on its grid: integrals, adjoints, centroids, and its start from strong spots."""

from dataclasses import replace

import numpy as np
import pytest
import tolerances
import torch
from helpers import (
    Spot,
    assert_within_se,
    gaussian_voxels,
    make_integrator,
    poisson_boxes,
    spot_metadata,
)
from scipy import integrate

from braggflux.integrator.model import build
from braggflux.integrator.model.profile import ProfileGrid, ProfileModel, SpotShape, hat_integral
from braggflux.integrator.model.start import spot_brightness, start_profile

SPOT = Spot()
# Hat functions on nodes half a sigma apart add a variance of step^2 / 6 to what they interpolate.
WIDENED = (1 + 0.5**2 / 6) ** 0.5


def shape_of(spot: Spot) -> SpotShape:
    return SpotShape(
        spot.sigma_x_px, spot.sigma_y_px, spot.sigma_m_deg, spot.box, (spot.frame_width_deg,)
    )


def profile_model(spot: Spot = SPOT) -> ProfileModel:
    """Gaussian in all of the grid; the model's own start is flat beyond 3 sigma."""
    model = ProfileModel(ProfileGrid(shape_of(spot), nodes_per_sigma=2.0, rotation_n_sigma=5.0))
    radius2 = sum(c**2 for c in model.grid.scaled_coordinates())
    with torch.no_grad():
        model.log_mean.copy_(-0.5 * radius2)
    return model


def metadata(n: int = 20, seed: int = 0, spot: Spot = SPOT):
    return spot_metadata(n, np.random.default_rng(seed), spot)


def centroid(profile: torch.Tensor) -> torch.Tensor:
    """Centroid (fast, slow, frame) in voxels from the corner of the box, (B, 3)."""
    axes = [torch.arange(n) + 0.5 for n in profile.shape[1:]]
    total = profile.sum((1, 2, 3))
    frame = (profile.sum((2, 3)) @ axes[0]) / total
    slow = (profile.sum((1, 3)) @ axes[1]) / total
    fast = (profile.sum((1, 2)) @ axes[2]) / total
    return torch.stack([fast, slow, frame], -1)


def test_hat_integral_equals_quadrature():
    for u in (-2.0, -0.7, 0.0, 0.4, 1.0, 3.0):
        exact = integrate.quad(lambda x: max(0.0, 1 - abs(x)), -1.5, u, points=[-1, 0, 1])[0]
        assert hat_integral(torch.tensor(u)).item() == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize(("left", "right"), [(1.0, 1.0), (0.5, 2.0), (3.0, 0.7)])
def test_uneven_hat_has_unit_area_and_the_integral_of_its_density(left, right):
    def density(x):
        inside = max(0.0, 1 + x / left) if x < 0 else max(0.0, 1 - x / right)
        return inside / (0.5 * (left + right))

    for u in (-4.0, -0.6, 0.0, 0.4, 5.0):
        exact = integrate.quad(density, -4.0, max(u, -4.0), points=[-left, 0, right], limit=200)[0]
        found = hat_integral(torch.tensor(u, dtype=torch.float64), left, right)
        assert found.item() == pytest.approx(exact, abs=1e-7)


def test_layer_of_several_frames_is_their_sum():
    """Three frames a layer: the profile of each layer is the sum of three single frames."""
    wide = Spot(SPOT.sigma_x_px, SPOT.sigma_y_px, 4 * SPOT.sigma_m_deg, SPOT.box)
    fine = replace(wide, box=(3 * SPOT.box[0], *SPOT.box[1:]))
    model, dense = profile_model(wide), profile_model(fine)
    single = metadata(spot=fine)
    summed = replace(single, frames_per_layer=torch.full((len(single.d),), 3))
    latent = 0.3 * torch.randn(len(single.d), model.n_latent)
    layers = model(model.grid.voxel_weights(summed), latent)
    frames = dense(dense.grid.voxel_weights(single), latent)
    expected = frames.unflatten(1, (SPOT.box[0], 3)).sum(2)
    torch.testing.assert_close(layers, expected, rtol=0, atol=2e-6)


def test_every_node_inside_the_box_has_integral_one():
    data = metadata()
    weights = profile_model().grid.voxel_weights(data)
    total = weights.fast.sum(1)  # over voxels: (B, G)
    nodes = profile_model().grid.nodes_fast
    step = nodes[1] - nodes[0]
    low = data.corner[:, 2] - data.xyz_px[:, 0]
    inside = (nodes - step >= low[:, None]) & (nodes + step <= low[:, None] + SPOT.box[2])
    assert inside.any(1).all()
    torch.testing.assert_close(total[inside], torch.ones_like(total[inside]), rtol=0, atol=3e-6)
    assert (total <= 1 + 3e-6).all()


def test_back_project_is_the_adjoint_of_project():
    weights = profile_model().grid.voxel_weights(metadata())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *profile_model().grid.size, generator=generator)
    y = torch.randn(20, *SPOT.box, generator=generator)
    left = (weights.project(x) * y).sum()
    right = (x * weights.back_project(y)).sum()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-2)


def test_project_equals_the_explicit_sum():
    weights = profile_model().grid.voxel_weights(metadata(3))
    x = torch.rand(3, *profile_model().grid.size)
    explicit = torch.einsum(
        "bdi,bhj,bwk,bijk->bdhw", weights.rotation, weights.slow, weights.fast, x
    )
    torch.testing.assert_close(weights.project(x), explicit, rtol=1e-5, atol=1e-6)


def test_profile_sums_to_one_wherever_the_spot_lies():
    """In a box that holds the whole spot, sub-pixel position and zeta do not change the sum."""
    long = replace(SPOT, box=(25, 13, 13))
    model = profile_model(long)
    total = model(model.grid.voxel_weights(metadata(400, spot=long))).sum((1, 2, 3))
    assert (1 - total).abs().max() < 1e-5
    # 11 frames cut the rotation at 3.5 of its widest rocking curves
    model = profile_model()
    total = model(model.grid.voxel_weights(metadata(400))).sum((1, 2, 3))
    assert total.max() < 1 + 1e-5
    assert total.min() > 0.998


def test_masked_voxels_do_not_change_the_norm():
    """The profile knows nothing of masks: its sum over recorded voxels is the exposure."""
    model = profile_model()
    profile = model(model.grid.voxel_weights(metadata(5)))
    assert profile[:, :, :5].sum((1, 2, 3)).max() < 0.9


def test_gaussian_voxels_equal_differences_of_the_error_function():
    data = metadata(50)
    profile = profile_model()(profile_model().grid.voxel_weights(data)).detach().numpy()
    wide = Spot(WIDENED * SPOT.sigma_x_px, WIDENED * SPOT.sigma_y_px, WIDENED * SPOT.sigma_m_deg)
    exact = gaussian_voxels(data, wide)
    assert np.abs(profile - exact).max() < 0.01 * exact.max()
    # the same without the known widening: 2 % wider along each axis, 6 % lower at the peak
    plain = gaussian_voxels(data, SPOT)
    assert np.abs(profile - plain).max() < 0.06 * plain.max()


def test_spots_narrower_than_a_voxel():
    narrow = Spot(sigma_x_px=0.2, sigma_y_px=0.15, sigma_m_deg=0.02, box=(7, 7, 7))
    data = metadata(100, spot=narrow)
    model = profile_model(narrow)
    profile = model(model.grid.voxel_weights(data)).detach()
    wide = replace(narrow, sigma_x_px=0.2 * WIDENED, sigma_y_px=0.15 * WIDENED)
    wide = replace(wide, sigma_m_deg=0.02 * WIDENED)
    assert np.abs(profile.numpy() - gaussian_voxels(data, wide)).max() < 0.01
    torch.testing.assert_close(profile.sum((1, 2, 3)), torch.ones(100), rtol=0, atol=1e-4)


def test_centroid_moves_with_the_prediction():
    spot = replace(SPOT, box=(15, 13, 13))
    data = metadata(50, spot=spot)
    data = replace(data, zeta=torch.ones(50))
    model = profile_model(spot)
    with torch.no_grad():
        found = centroid(model(model.grid.voxel_weights(data)))
    predicted = data.xyz_px - data.corner[:, [2, 1, 0]]
    torch.testing.assert_close(found, predicted, rtol=0, atol=2e-3)
    moved = replace(data, xyz_px=data.xyz_px + torch.tensor([0.3, -0.2, 0.4]))
    with torch.no_grad():
        shift = centroid(model(model.grid.voxel_weights(moved))) - found
    torch.testing.assert_close(
        shift, torch.tensor([0.3, -0.2, 0.4]).expand(50, 3), rtol=0, atol=2e-3
    )


def test_latents_shift_widen_and_skew():
    spot = replace(SPOT, box=(21, 21, 21))
    data = replace(metadata(1, spot=spot), zeta=torch.ones(1))
    model = profile_model(spot)
    weights = model.grid.voxel_weights(data)

    def moments(k, size):
        latent = torch.zeros(1, model.n_latent)
        latent[0, k] = size
        with torch.no_grad():
            p = model(weights, latent)
        c = centroid(p)
        x = torch.arange(21) + 0.5 - c[0, 0]
        line = p.sum((1, 2))[0]
        return c[0], (line @ x**2).item(), (line @ x**3).item()

    rest = moments(0, 0.0)
    # z_0: log-density + z x shifts a Gaussian by z sigma along fast
    shifted = moments(0, 0.2)
    assert (shifted[0] - rest[0])[0].item() == pytest.approx(0.2 * SPOT.sigma_x_px, rel=0.06)
    assert (shifted[0] - rest[0])[1:].abs().max() < 1e-3
    # z_3: log-density + z (x^2 - 1) / 2 gives the variance sigma^2 / (1 - z)
    grown = moments(3, 0.2)[1] - rest[1]
    assert grown == pytest.approx(SPOT.sigma_x_px**2 * (1 / 0.8 - 1), rel=0.12)
    # z_9: third order in x: skew to the right, and only that axis
    assert moments(9, 0.2)[2] > 0.05
    assert abs(moments(10, 0.2)[2] - rest[2]) < 0.01


def test_sensitivity_is_the_derivative_by_the_latents():
    model = profile_model()
    weights = model.grid.voxel_weights(metadata(4))
    pixel = torch.rand(4, *SPOT.box)
    latent = (0.3 * torch.randn(4, model.n_latent)).requires_grad_()
    exact = torch.autograd.grad((pixel * model(weights, latent)).sum(), latent)[0]
    ours = model.sensitivity(weights, model.node_weights(latent), pixel)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5)


def test_node_weights_sum_to_one_for_any_latent():
    model = profile_model()
    w = model.node_weights(5 * torch.randn(7, model.n_latent))
    torch.testing.assert_close(w.sum((1, 2, 3)), torch.ones(7), rtol=0, atol=1e-5)
    assert (w >= 0).all()


def test_start_recovers_a_profile_that_is_no_gaussian():
    """EM from 300 Poisson boxes of a split spot, starting at a Gaussian of another width."""
    rng = np.random.default_rng(5)
    data = spot_metadata(300, rng, SPOT)
    shift = torch.tensor([0.9, 0.0, 0.0])
    narrow = replace(SPOT, sigma_x_px=0.5, sigma_y_px=0.7, sigma_m_deg=0.08)
    left = gaussian_voxels(replace(data, xyz_px=data.xyz_px - shift), narrow)
    right = gaussian_voxels(replace(data, xyz_px=data.xyz_px + shift), narrow)
    truth = 0.65 * left + 0.35 * right
    brightness = rng.uniform(300, 5000, 300)[:, None, None, None]
    batch = poisson_boxes(brightness * truth + 0.5, data, rng)
    integrator = make_integrator(data, SPOT, 0.5)
    weights = integrator.profile.grid.voxel_weights(data)

    def distance():
        profile = integrator.profile(weights).detach().numpy()
        return 0.5 * np.abs(profile - truth).sum((1, 2, 3)).mean()

    assert distance() > 0.25
    start_profile(integrator, batch)
    # 2025-11-22: 0.033 (total variation); hat functions half a sigma wide blur the two parts
    assert distance() < 0.06
    estimate = spot_brightness(integrator, batch).numpy()
    ratio = estimate / brightness.ravel()
    assert ratio.mean() == pytest.approx(1.0, abs=0.01)


def test_start_leaves_nodes_that_no_voxel_sees():
    data = metadata(60)
    batch = poisson_boxes(2000 * gaussian_voxels(data, SPOT) + 0.5, data, np.random.default_rng(1))
    integrator = make_integrator(data, SPOT, 0.5)
    start_profile(integrator, batch)
    log_mean = integrator.profile.log_mean
    assert torch.isfinite(log_mean).all()
    total = integrator.profile.node_weights().sum()
    assert total.item() == pytest.approx(1, abs=tolerances.FLOAT32_SUM)


def test_brightness_is_the_sum_above_background():
    rng = np.random.default_rng(1)
    data = spot_metadata(200, rng, SPOT)
    is_valid = rng.random((200, *SPOT.box)) > 0.1
    rate = 1000 * gaussian_voxels(data, SPOT)
    batch = poisson_boxes(rate + 0.5, data, rng, is_valid)
    excess = spot_brightness(make_integrator(data, SPOT, 0.5), batch).numpy()
    assert_within_se(excess - (rate * is_valid).sum((1, 2, 3)), 0.0)


class BrightSpots:
    """What the start of a profile asks of a store; takes note of what is read."""

    def __init__(self, batch):
        self.batch, self.asked = batch, []
        self.flags = torch.zeros(len(batch), dtype=torch.int64)

    def __len__(self):
        return len(self.batch)

    def read(self, rows):
        self.asked.append(rows)
        return self.batch[rows]


def test_start_of_a_long_scan_looks_at_parts_from_all_over_it(monkeypatch):
    rng = np.random.default_rng(0)
    data = spot_metadata(100, rng, SPOT)
    batch = poisson_boxes(500 * gaussian_voxels(data, SPOT) + 0.3, data, rng)
    store = BrightSpots(batch)
    monkeypatch.setattr(build, "CHUNK", 10)
    monkeypatch.setattr(build, "MAX_CHUNKS", 4)
    n_used = build.start_from_strong_spots(make_integrator(data, SPOT, 0.3), store, seed=0)
    *looks, rows = store.asked
    assert looks == [slice(first, first + 10) for first in (0, 30, 60, 90)]
    assert len(rows) == n_used == 40
    assert set((rows // 10).tolist()) == {0, 3, 6, 9}
