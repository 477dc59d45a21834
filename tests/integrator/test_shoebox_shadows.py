"""Shadows: none where there is none, whatever else the background does; true ones are found.

Tiles of 250 pixels, as of a small panel, and of 17,000, as of an EIGER 16M.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from braggflux.integrator.shoebox.shadows import (
    DOUBTFUL,
    TOUCHING,
    chance,
    levels_and_ratio,
    shaded_tiles,
)

SCANS = [(16, (18, 18), 240), (120, (28, 28), 250), (16, (33, 32), 17_000)]
"""Frames, rows and columns of tiles, pixels of a tile."""
RATES = (0.005, 0.05, 0.5, 20.0)
BACKGROUNDS = {
    "quiet": (),
    "beam": ("flicker", "dump", "dark frame"),
    "structure": ("flicker", "structure", "overdispersed"),
    "ice": ("ice",),
    "tails": ("tails", "flicker"),
    "blob": ("blob", "dark frame"),
    "all": ("flicker", "dump", "dark frame", "structure", "overdispersed", "tails", "blob"),
}


def beam(rng, n_images, effects) -> np.ndarray:
    """Factor of each frame: flicker on a drift, the machine's dumps, a frame without beam."""
    phase = np.linspace(0, 2 * np.pi, n_images) + rng.uniform(0, 6)
    flicker = 0.05 if "flicker" in effects else 0.02
    factor = (1 + flicker * rng.normal(size=n_images)) * (1 + 0.1 * np.sin(phase))
    if "dump" in effects:
        factor[n_images // 3 : n_images // 3 + 3] *= (0.5, 0.1, 0.3)
    if "dark frame" in effects:
        factor[n_images // 2] = 0.0
    return factor.clip(0)


def scene(rng, scan, rate, effects) -> tuple[np.ndarray, np.ndarray]:
    """Counts and pixels, (n_images, n_tiles): air, a ring, and what ``effects`` name."""
    n_images, grid, n_pixels = scan
    y, x = np.mgrid[: grid[0], : grid[1]]
    y, x = y.ravel() - grid[0] / 2 + 0.3, x.ravel() - grid[1] / 2 + 0.2
    radius = np.hypot(y, x)
    ring = np.exp(-0.5 * ((radius - 0.35 * grid[0]) / 1.2) ** 2)
    each = np.full((n_images, 1), rate) * (0.3 + 2 * np.exp(-radius / 4) + 0.8 * ring)
    frame = np.arange(n_images)[:, None]
    if "structure" in effects:  # the loop turns: a fifth more or less, smooth in place and angle
        turn = 2 * np.pi * frame / n_images + rng.uniform(0, 6)
        each = each * (1 + 0.2 * np.sin(turn + 2 * np.arctan2(y, x)))
    if "ice" in effects:  # a ring that ends
        each[: int(0.6 * n_images), np.abs(radius - 0.3 * grid[0]) < 0.7] *= 4
    if "tails" in effects:  # of strong spots near the beam, over tiles and frames
        for _ in range(max(2 * n_images // 3, 8)):
            cy, cx = rng.normal(0, grid[0] / 10, 2)
            wide, long = rng.uniform(0.4, 1.5), rng.exponential(8) + 1
            along = np.exp(-0.5 * ((frame - rng.uniform(0, n_images)) / long) ** 2)
            spot = np.exp(-0.5 * ((y - cy) ** 2 + (x - cx) ** 2) / wide**2)
            each = each + rate * rng.exponential(3) * along * spot
    count = np.round(n_pixels * (1 - 0.4 * rng.random(each.shape) * (radius < grid[0] / 3)))
    mean = each * count * beam(rng, n_images, effects)[:, None]
    if "overdispersed" in effects:
        mean = mean * rng.gamma(1 / 0.1**2, 0.1**2, mean.shape)
    total = rng.poisson(mean).astype(float)
    if "blob" in effects:  # salt: as much as ten frames, in one tile
        total[n_images // 4, total.shape[1] // 3] += 10 * total[0].sum() + 48_000
    return total, count


@pytest.mark.parametrize("effects", BACKGROUNDS.values(), ids=BACKGROUNDS)
@pytest.mark.parametrize("scan", SCANS, ids=["small", "sweep", "large"])
def test_without_a_shadow_none_is_seen(scan, effects):
    """At the criterion's rate of 0.01 a sweep, one of these 168 is allowed; none is seen."""
    for rate in RATES:
        for seed in range(2):
            rng = np.random.default_rng(seed)
            assert not shaded_tiles(*scene(rng, scan, rate, effects), [scan[1]])[0].any()


def arm(n_images, grid) -> np.ndarray:
    """An edge that comes in over the last third of the scan, to a third of the panel."""
    start = 0.65 * n_images
    shade = np.zeros((n_images, *grid), bool)
    for frame in range(int(start) + 1, n_images):
        shade[
            frame, :, grid[1] - 1 - int(grid[1] / 3 * (frame - start) / (n_images - start)) :
        ] = 1
    return shade


def holder(n_images, grid) -> np.ndarray:
    """A bar of four tiles that crosses the panel."""
    shade = np.zeros((n_images, *grid), bool)
    for frame in range(n_images):
        left = frame * grid[1] // n_images
        shade[frame, 2 * grid[0] // 3, max(left - 1, 0) : left + 3] = True
    return shade


def quadrant(n_images, grid) -> np.ndarray:
    """A quarter of the panel over a third of the scan."""
    shade = np.zeros((n_images, *grid), bool)
    shade[n_images // 4 : 6 * n_images // 10, : grid[0] // 2, : grid[1] // 2] = True
    return shade


@pytest.mark.parametrize("shadow", [arm, holder, quadrant])
@pytest.mark.parametrize("scan", SCANS, ids=["small", "sweep", "large"])
@pytest.mark.parametrize(
    ("passed", "rate", "effects", "least"),
    [
        (0.02, 0.5, ("flicker", "dump"), 0.95),
        (0.15, 20.0, ("flicker",), 0.95),
        (0.02, 20.0, ("flicker", "structure", "overdispersed"), 0.9),
        (0.02, 0.5, ("flicker", "tails"), 0.8),  # tails are brighter than the shadow is dark
    ],
)
def test_true_shadows_are_found(scan, shadow, passed, rate, effects, least):
    rng = np.random.default_rng(0)
    n_images, grid, _ = scan
    total, count = scene(rng, scan, rate, effects)
    shade = shadow(n_images, grid)
    flat = shade.reshape(n_images, -1)
    total = np.where(flat, rng.poisson(passed * total), total)
    found = shaded_tiles(total, count, [grid])[0].reshape(shade.shape)
    # boxes lose a tile and a frame more on every side
    assert ndimage.binary_dilation(found, TOUCHING)[shade].mean() > least
    near = ndimage.binary_dilation(shade, TOUCHING, iterations=3)
    assert not (found & ~near).any()


def test_a_module_that_failed_on_one_frame():
    rng = np.random.default_rng(0)
    scan = SCANS[1]
    total, count = scene(rng, scan, 20.0, ("flicker",))
    failed = np.zeros((scan[0], *scan[1]), bool)
    failed[60, :5, :5] = True
    total[failed.reshape(scan[0], -1)] = 0
    found = shaded_tiles(total, count, [scan[1]])[0].reshape(failed.shape)
    assert np.array_equal(found, failed)


def test_panels_are_apart():
    """A shadow does not grow over the gap between panels that are next in the list."""
    rng = np.random.default_rng(0)
    pixels = np.full((40, 75), 250.0)
    total = rng.poisson(2.0 * pixels).astype(float)
    total[20:30, :25] = 0  # all of the first panel
    total[20:30, 25] = 0  # one tile of the second: no shadow
    is_shaded, _, _ = shaded_tiles(total, pixels, [(5, 5), (5, 5), (5, 5)])
    assert is_shaded[20:30, :25].all()
    assert is_shaded.sum() == 250


def test_the_level_is_that_without_the_shadow():
    rng = np.random.default_rng(0)
    pixels = np.full((80, 30), 200.0)
    level = rng.uniform(0.4, 0.6, 30)
    factor = 1 + 0.1 * rng.normal(size=80)
    through = np.ones((80, 30))
    through[50:, :8] = 0.05
    through[30:35, 20:24] = 0.85  # absorption, no shadow
    total = rng.poisson(pixels * level * factor[:, None] * through).astype(float)
    total[5:8, 25] *= 6  # a spot that lingers
    is_shaded, found, ratio = shaded_tiles(total, pixels, [(1, 30)])
    assert not is_shaded[:49].any()
    assert is_shaded[51:, :8].all()
    assert not is_shaded[:, 8:].any()
    np.testing.assert_allclose(found / found.mean(), level / level.mean(), rtol=0.06)
    assert np.corrcoef(ratio[10:48], factor[10:48])[0, 1] > 0.95
    assert ratio[60:].mean() == pytest.approx(ratio[:40].mean(), rel=0.06)


def test_a_bright_tile_changes_no_other_tile_and_no_frame():
    rng = np.random.default_rng(0)
    total, count = scene(rng, SCANS[0], 0.5, ())
    level, ratio = levels_and_ratio(total, count)
    bright = total.copy()
    bright[3, 40] += 1e6
    new_level, new_ratio = levels_and_ratio(bright, count)
    np.testing.assert_allclose(new_ratio, ratio, rtol=0.005)
    np.testing.assert_allclose(np.delete(new_level, 40), np.delete(level, 40), rtol=0.01)
    assert new_level[40] == pytest.approx(level[40], rel=0.05)


@pytest.mark.parametrize(("mean", "spread"), [(40.0, 0.1), (200.0, 0.2), (1e4, 0.05)])
def test_chance_is_that_of_overdispersed_counts(mean, spread):
    """Of 400,000 draws the share below is what the chance says, within four standard errors."""
    rng = np.random.default_rng(0)
    n, shape = 400_000, np.full(400_000, 1 / spread**2)
    counts = rng.poisson(mean * rng.gamma(1 / spread**2, spread**2, n)).astype(float)
    for alpha in (0.1, 0.01, DOUBTFUL):
        share = (chance(counts, np.full(n, mean), shape) < alpha).mean()
        assert share < alpha + 4 * np.sqrt(alpha / n)
        assert share > 0.6 * alpha  # counts are whole numbers: not all of it can be used


def test_nothing_seen_is_no_shadow():
    empty = np.zeros((20, 16))
    is_shaded, level, ratio = shaded_tiles(empty, empty, [(4, 4)])
    assert not is_shaded.any()
    assert not level.any()
    assert (ratio == 1).all()
    dark, _, _ = shaded_tiles(empty, empty + 200.0, [(4, 4)])  # recorded, but no photon
    assert not dark.any()
