"""Offset and width of the spots by place: found by the start, used by the profile."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Spot, gaussian_voxels, make_integrator, poisson_boxes, spot_metadata

from braggflux.integrator.model.integrator import Integrator
from braggflux.integrator.model.local_shape import LocalShape, PlaceFeatures
from braggflux.integrator.model.profile import VoxelWeights
from braggflux.integrator.model.start import (
    DIFFERENCE,
    SHAPE_ROUNDS,
    slopes_of_profile,
    start_local_shape,
    start_profile,
)
from braggflux.integrator.types import ReflectionMetadata

SPOT = Spot(sigma_x_px=0.9, sigma_y_px=0.8, sigma_m_deg=0.1, box=(9, 13, 13))
LEVEL = 0.3


def spread_over_a_detector(n: int, rng: np.random.Generator) -> ReflectionMetadata:
    """Spots whose beams leave up to 30 degrees from the z axis."""
    across = torch.as_tensor(rng.uniform(-0.5, 0.5, (n, 2)), dtype=torch.float32)
    s1 = torch.cat([across, (1 - (across**2).sum(1, keepdim=True)).sqrt()], 1)
    return replace(spot_metadata(n, rng, SPOT), s1=s1)


def mosaic_boxes(data: ReflectionMetadata, rng: np.random.Generator, photons: tuple[float, float]):
    """Spots that widen along y with x and along e3 with y, and lie off along x with y.

    Returns boxes, true photons (N,) and true relative widths along (e3, slow, fast), (N, 3).
    """
    x, y = (2 * data.s1[:, :2]).double().numpy().T  # -1 to 1
    width = np.stack([np.exp(0.3 * y), np.exp(0.35 * x**2), np.ones(len(x))], 1)
    offset = torch.as_tensor(0.3 * SPOT.sigma_x_px * y, dtype=torch.float32)
    moved = replace(data, xyz_px=data.xyz_px + torch.stack([offset, 0 * offset, 0 * offset], 1))
    one = [slice(k, k + 1) for k in range(len(x))]
    shape = np.concatenate(
        [
            gaussian_voxels(
                moved[k],
                replace(
                    SPOT,
                    sigma_y_px=SPOT.sigma_y_px * width[k, 1].item(),
                    sigma_m_deg=SPOT.sigma_m_deg * width[k, 0].item(),
                ),
            )
            for k in one
        ]
    )
    brightness = rng.uniform(*photons, len(x))
    batch = poisson_boxes(brightness[:, None, None, None] * shape + LEVEL, data, rng)
    return batch, brightness, width


def integrator_at(data: ReflectionMetadata) -> Integrator:
    fixed = make_integrator(data, SPOT, LEVEL)
    return Integrator(
        fixed.profile.grid.shape,
        fixed.mean_background,
        fixed.features,
        fixed.config,
        PlaceFeatures.from_metadata(data, 1),
    )


def test_start_finds_widths_and_offsets_by_place():
    rng = np.random.default_rng(0)
    data = spread_over_a_detector(600, rng)
    batch, _, true_width = mosaic_boxes(data, rng, (300, 3000))
    integrator = integrator_at(data)
    start_profile(integrator, batch)
    offset, width = (
        t.detach().double().numpy() for t in integrator.profile.grid.local_shape(data)
    )
    # the mean profile holds what all spots share
    log_ratio = np.log(width / true_width)
    spread = log_ratio.std(0)
    assert np.log(true_width).std(0)[:2].min() > 0.09
    assert spread.max() < 0.03
    expected = 0.3 * SPOT.sigma_x_px * 2 * data.s1[:, 1].numpy()
    assert np.std(offset[:, 2] - expected) < 0.03 * SPOT.sigma_x_px
    assert (
        np.abs(offset[:, :2] / integrator.profile.grid.local_shape.sigma[:2].numpy()).max() < 0.1
    )


@pytest.mark.slow
@pytest.mark.parametrize("photons", [30.0, 1000.0])
def test_intensities_are_free_of_the_bias_that_one_profile_has(photons):
    rng = np.random.default_rng(1)
    strong = spread_over_a_detector(600, rng)
    data = spread_over_a_detector(3000, rng)
    boxes = mosaic_boxes(strong, rng, (300, 3000))[0]
    batch, true, width = mosaic_boxes(data, rng, (photons, photons))
    worst = {}
    for name, integrator in (("one", make_integrator(strong, SPOT, LEVEL)), ("local", None)):
        integrator = integrator or integrator_at(strong)
        start_profile(integrator, boxes)
        with torch.no_grad():
            found = integrator.inference(batch).marginal_likelihood
        ratio = (
            (found.effective_counts / found.exposure - found.effective_background) / true
        ).numpy()
        groups = np.array_split(np.argsort(width[:, 0] * width[:, 1]), 5)
        worst[name] = max(abs(ratio[g].mean() - 1) for g in groups)
    # a group mean is known to 1 % at 30 photons and to 0.15 % at 1000
    assert worst["local"] < (0.03 if photons < 100 else 0.006)
    assert worst["one"] > 2 * worst["local"]


def test_no_place_means_one_profile_and_zero_coefficients_change_nothing():
    data = spread_over_a_detector(20, np.random.default_rng(2))
    here, fixed = integrator_at(data).profile.grid, make_integrator(data, SPOT, LEVEL).profile.grid
    for a, b in zip(here.voxel_edges(data), fixed.voxel_edges(data), strict=True):
        torch.testing.assert_close(a, b)


def test_offset_and_width_stay_within_their_bounds():
    data = spread_over_a_detector(20, np.random.default_rng(3))
    local = LocalShape(PlaceFeatures.from_metadata(data, 1), torch.tensor([0.1, 0.8, 0.9]))
    torch.nn.init.constant_(local.coefficients, 100.0)
    offset, width = local(data)
    assert (offset.abs() <= local.max_offset * local.sigma + 1e-6).all()
    assert (width <= np.exp(local.max_log_width) + 1e-6).all()


def test_every_sweep_has_its_own_width():
    data = spread_over_a_detector(20, np.random.default_rng(4))
    data = replace(data, experiment=torch.arange(20) % 2)
    local = LocalShape(PlaceFeatures.from_metadata(data, 2), torch.tensor([0.1, 0.8, 0.9]))
    with torch.no_grad():
        local.coefficients[1, 3:] = 0.2
    _, width = local(data)
    assert torch.allclose(width[0::2], torch.ones(10, 3))
    assert (width[1::2] > 1.15).all()


def test_slopes_are_those_of_the_profile():
    """Differences of whole profiles whose edges are moved and stretched."""
    data = spread_over_a_detector(5, np.random.default_rng(1))
    integrator = integrator_at(data)
    grid = integrator.profile.grid
    node_weights = integrator.profile.node_weights(0.3 * torch.randn(5, 12))
    weights = grid.voxel_weights(data)
    slopes = slopes_of_profile(grid, weights, node_weights)
    for k, slope in enumerate(slopes):
        ends = []
        for step in (DIFFERENCE, -DIFFERENCE):
            edges = list(weights.edges)
            sigma = grid.shape.sigma[k % 3]
            edges[k % 3] = edges[k % 3] - step * sigma if k < 3 else edges[k % 3] * np.exp(-step)
            ends.append(grid.weights_between(tuple(edges)).project(node_weights))
        expected = (ends[0] - ends[1]) / (2 * DIFFERENCE)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)


def test_start_of_a_trained_profile_projects_it_seven_times_a_round(monkeypatch):
    """Once for the profile, once for each slope; 13 times before 2026-11-30."""
    rng = np.random.default_rng(2)
    data = spread_over_a_detector(40, rng)
    batch, _, _ = mosaic_boxes(data, rng, (300, 3000))
    integrator, calls, project = integrator_at(data), [], VoxelWeights.project
    monkeypatch.setattr(
        VoxelWeights, "project", lambda self, nodes: calls.append(1) or project(self, nodes)
    )
    start_local_shape(integrator, batch, chunk=20)
    assert len(calls) == 7 * 2 * len(SHAPE_ROUNDS)
