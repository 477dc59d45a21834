"""Rocking width by resolution: mosaicity and domains of finite size told apart."""

import numpy as np
import pytest
import torch
from helpers import Spot, spot_metadata

from braggflux.integrator.model.profile import ProfileGrid, SpotShape
from braggflux.integrator.prediction.rocking import RockingWidth, frames_per_layer, min_zeta

D = np.array([2.3, 2.5, 2.8, 3.1, 3.5, 4.2, 5.1, 8.0])
NOISE = 1 + 0.02 * np.array([1, -1, -1, 1, 1, -1, 1, -1])
FRAME = np.full(len(D), 0.05)
SPOT = Spot(0.8, 0.8, 0.1, (9, 9, 9))


@pytest.mark.parametrize(("mosaic", "rate"), [(0.05, 0.02), (0.08, 0.03), (0.001, 0.024)])
def test_both_parts_are_recovered(mosaic, rate):
    fitted = RockingWidth.fitted(RockingWidth(mosaic, rate).at(D) * NOISE, D, FRAME)
    far = np.array([2.3, 8.0, 40.0])
    np.testing.assert_allclose(fitted.at(far), RockingWidth(mosaic, rate).at(far), rtol=0.05)


def test_without_a_clear_rise_all_reflections_have_one_width():
    """The lowest orders lie far beyond the groups: a slope of noise would spoil them."""
    for seed in range(20):
        sigma = 0.08 * (1 + 0.03 * np.random.default_rng(seed).normal(size=len(D)))
        fitted = RockingWidth.fitted(sigma, D, FRAME)
        assert fitted.size_rate == 0
        assert fitted.at(D) == pytest.approx(0.08, rel=0.03)
    assert RockingWidth.fitted(np.array([0.1, 0.2]), D[:2], FRAME[:2]).size_rate == 0


@pytest.mark.parametrize("rate", [0.0, 0.024])
def test_curves_thinner_than_a_frame_do_not_decide(rate):
    """Frames of a degree record 0.29; of 3 % of that, thin curves are known by chance only."""
    true = RockingWidth(0.03, rate)
    for seed in range(20):
        noise = 1 + 0.02 * np.random.default_rng(seed).normal(size=len(D))
        recorded = np.sqrt(true.at(D) ** 2 + 1 / 12) * noise
        sigma = np.sqrt(np.maximum(recorded**2 - 1 / 12, (0.05 * recorded) ** 2))
        fitted = RockingWidth.fitted(sigma, D, np.ones(len(D)))
        assert fitted.at(np.array([30.0])) < (1.3 * true.at(np.array([30.0])) + 0.05)
        assert fitted.at(np.array([2.3])) < 0.15


def test_wide_curves_get_wide_layers_and_are_left_out_earlier():
    width = RockingWidth(0.05, 0.024).at(np.array([2.5, 30.0]))
    assert list(frames_per_layer(width / 0.25, 11)) == [1, 2]
    near, far = min_zeta(width)
    assert near < 0.1 < far < 0.3


def test_the_profile_grid_counts_in_the_width_of_each_reflection():
    """Twice the width at half the zeta: the same voxels of the profile."""
    rocking = RockingWidth(0.0, 0.025)
    shape = SpotShape(0.8, 0.8, 0.1, SPOT.box, (0.1,), rocking)
    grid = ProfileGrid(shape, 1.5, 4.0)
    row = spot_metadata(1, np.random.default_rng(0), SPOT)
    at = {
        (d, zeta): grid.voxel_weights(
            row.__class__(**{**row.__dict__, "d": torch.tensor([d]), "zeta": torch.tensor([zeta])})
        ).rotation
        for d, zeta in ((4.0, 0.4), (8.0, 0.8), (8.0, 0.4))
    }
    torch.testing.assert_close(at[4.0, 0.4], at[8.0, 0.8])
    plain = ProfileGrid(SpotShape(0.8, 0.8, 0.1, SPOT.box, (0.1,)), 1.5, 4.0)
    weights = plain.voxel_weights(
        row.__class__(**{**row.__dict__, "d": torch.tensor([4.0]), "zeta": torch.tensor([0.4])})
    )
    torch.testing.assert_close(at[4.0, 0.4], weights.rotation)  # 0.1 deg at 4 A
    assert not torch.allclose(at[8.0, 0.4], at[4.0, 0.4], atol=1e-3)
