"""Spot extent recovered from frames drawn with known Gaussian spots."""

import gemmi
import numpy as np
import pytest
import torch
from scipy.special import ndtr

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.crystal.geometry import (
    Beam,
    Crystal,
    Experiment,
    Goniometer,
    Panel,
    Scan,
)
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.io.images import open_frames
from braggflux.integrator.prediction.predict import Prediction, predict_reflections
from braggflux.integrator.prediction.rocking import frame_sigma
from braggflux.integrator.shoebox.extent import SpotExtent, measure_extent
from braggflux.integrator.shoebox.sweep import Sweep

SHAPE = (260, 300)
SIGMA_X, SIGMA_Y, SIGMA_M = 1.1, 0.7, 0.12


class DrawnFrames:
    """Gaussian spots, integrated over pixels and frames, on a flat Poisson background."""

    def __init__(self, xyz, zeta, photons, width, n_images, sigma=(SIGMA_X, SIGMA_Y, SIGMA_M)):
        rng = np.random.default_rng(0)
        self.n_images, self.panel_shapes = n_images, [SHAPE]
        expected = np.full((n_images, *SHAPE), 0.4, np.float32)
        for centre, z, total in zip(xyz, zeta, photons, strict=True):
            corner = np.floor(centre).astype(int) - (7, 7, 12)
            widths = (sigma[0], sigma[1], sigma[2] / z / width)
            parts = [
                np.diff(ndtr((corner[a] + np.arange(n + 1) - centre[a]) / widths[a]))
                for a, n in enumerate((15, 15, 25))
            ]
            spot = total * np.einsum("z,y,x->zyx", parts[2], parts[1], parts[0])
            low = np.maximum(corner[2], 0)
            high = min(corner[2] + 25, n_images)
            expected[low:high, corner[1] : corner[1] + 15, corner[0] : corner[0] + 15] += spot[
                low - corner[2] : high - corner[2]
            ]
        self.panels = rng.poisson(expected).astype(np.int32)

    def static_mask(self):
        return [np.ones(SHAPE, bool)]

    def read(self, frame):
        return [self.panels[frame]]


def make_sweep(n_spots, width=0.2, n_images=120, photons=2000.0, **drawn):
    rng = np.random.default_rng(1)
    xyz = rng.uniform((10, 10, 0), (SHAPE[1] - 10, SHAPE[0] - 10, n_images), (n_spots, 3))
    zeta = rng.uniform(0.35, 1.0, n_spots)
    strength = photons * rng.uniform(0.5, 2, n_spots)
    frames = DrawnFrames(xyz, zeta, strength, width, n_images, **drawn)
    panel = Panel(
        "p", np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), np.array([0, 0, 100.0]), (0.1, 0.1),
        SHAPE[::-1],
    )  # fmt: skip
    experiment = Experiment(
        Beam(np.array([0, 0, -1.0]), 1.0),
        (panel,),
        Goniometer(np.array([1.0, 0, 0])),
        Scan((1, n_images), (0.0, width)),
        Crystal(np.eye(3) / 50, gemmi.SpaceGroup("P 1")),
    )
    vectors, numbers = torch.zeros(n_spots, 3), torch.ones(n_spots)
    prediction = Prediction(
        miller_index=vectors.long(),
        panel=numbers.long() * 0,
        xyz_px=torch.from_numpy(xyz),
        xyz_mm=vectors,
        s1=vectors,
        d=numbers,
        zeta=torch.from_numpy(zeta),
        lp=numbers,
        entering=numbers.bool(),
        s0_crystal=vectors,
        s1_crystal=vectors,
    )
    return Sweep(experiment, frames, prediction)


@pytest.mark.parametrize("width", [0.1, 0.2, 0.5])
def test_known_sigmas_are_recovered_without_pixel_and_frame_width(width):
    """Crowding leaves neighbours in the windows; they must not count."""
    extent = measure_extent([make_sweep(400, width)])
    # 2025-11-22: within 3 % at widths 0.1 and 0.2, 5 % at 0.5, where a frame spans two sigma
    assert extent.sigma_x_px == pytest.approx(SIGMA_X, rel=0.06)
    assert extent.sigma_y_px == pytest.approx(SIGMA_Y, rel=0.06)
    assert extent.sigma_m_deg == pytest.approx(SIGMA_M, rel=0.1)


def test_box_holds_the_spots():
    sweep = make_sweep(400)
    extent = measure_extent([sweep])
    depth, height, width = extent.box
    assert all(n % 2 for n in extent.box)
    # four sigma of the recorded spot on each side, and background around it
    assert width // 2 >= 4 * np.hypot(SIGMA_X, np.sqrt(1 / 12)) + 1
    assert height // 2 >= 4 * np.hypot(SIGMA_Y, np.sqrt(1 / 12)) + 1
    spread = frame_sigma(SIGMA_M, sweep.prediction.zeta.numpy(), 0.2)
    assert (4 * spread <= depth // 2).mean() > 0.85


def test_few_spots_of_several_sweeps_are_pooled():
    sweeps = [make_sweep(n, n_images=30) for n in (6, 7)]
    with pytest.raises(UserError, match="only 6 strong spots"):
        measure_extent(sweeps[:1])
    extent = measure_extent(sweeps)
    assert extent.sigma_x_px == pytest.approx(SIGMA_X, rel=0.25)


def test_sweep_with_larger_spots_sets_the_box():
    small = make_sweep(200, n_images=60, sigma=(0.5, 0.5, 0.05))
    large = make_sweep(200, n_images=60)
    extent = measure_extent([small, large])
    assert extent.sigma_x_px == pytest.approx(SIGMA_X, rel=0.1)


@pytest.mark.parametrize(("width", "n_images"), [(1.0, 8), (2.0, 6)])
def test_dense_spots_on_coarse_images_are_told_from_neighbours(tmp_path, width, n_images):
    """Six pixels apart; before, the whole window: 4.9 x 4.2 pixels and boxes of 15 x 39 x 45."""
    files = simulate(
        tmp_path, "tiny", 0, overrides={"scan.width": width, "scan.n_images": n_images}
    )
    (experiment,) = read_experiments(files.expt)
    prediction = predict_reflections(experiment)
    with open_frames(experiment) as frames:
        extent = measure_extent([Sweep(experiment, frames, prediction)])
    # images of half a degree and of a quarter: 0.66 x 0.54
    assert extent.sigma_x_px == pytest.approx(0.66, abs=0.04)
    assert extent.sigma_y_px == pytest.approx(0.54, abs=0.04)
    assert extent.sigma_m_deg < 0.12
    assert extent.box == (5, 9, 11)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_wide_spots_are_told_from_neighbours(tmp_path, seed):
    """Three standard deviations apart; before, 5.1 x 4.9 pixels and boxes of 15 x 45 x 45.

    The true widths, medians over the spots, are 1.07 pixels and 0.36 degree.
    """
    files = simulate(tmp_path, "crowded", seed, overrides={"scan.n_images": 16})
    (experiment,) = read_experiments(files.expt)
    prediction = predict_reflections(experiment, 2.5)
    with open_frames(experiment) as frames:
        extent = measure_extent([Sweep(experiment, frames, prediction)])
    assert 0.8 < extent.sigma_x_px < 1.2
    assert 0.8 < extent.sigma_y_px < 1.2
    assert extent.sigma_m_deg == pytest.approx(0.36, abs=0.04)


def test_scans_without_whole_spots_are_named():
    with pytest.raises(UserError, match="scans of 3 images hold no whole spots"):
        measure_extent([make_sweep(200, width=0.5, n_images=3)])


def test_no_spot_is_a_user_error():
    with pytest.raises(UserError, match="strong spots stand where reflections are predicted"):
        measure_extent([make_sweep(200, photons=0.0)])


@pytest.mark.parametrize(
    ("values", "message"),
    [((1.0, 1.0, 0.1, (5, 8, 7)), "odd"), ((0.0, 1.0, 0.1, (5, 7, 7)), "positive")],
)
def test_impossible_extents_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        SpotExtent(*values)


def test_frame_sigma_follows_its_formula():
    recorded = frame_sigma(0.1, np.array([1.0, 0.5]), -0.25)
    np.testing.assert_allclose(recorded, np.sqrt(np.array([0.4, 0.8]) ** 2 + 1 / 12))
