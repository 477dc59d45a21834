"""The smoothed image of the background against SciPy's filters, and what it costs."""

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from braggflux.integrator.shoebox import background
from braggflux.integrator.shoebox.background import STRUCTURE_PX, mean_image

RING = np.ones((3, 3), dtype=bool)
RING[1, 1] = False


def of_scipy(total, count, sigma):
    """The definition, with whole images in double precision."""
    frames = np.maximum(count, 1)
    around = ndimage.rank_filter(total / frames, -3, footprint=RING, mode="mirror")
    total = np.minimum(total, 2.0 * around * frames + 5.0)
    counts, frames = (
        ndimage.gaussian_filter(a.astype(float), sigma, mode="constant") for a in (total, count)
    )
    smooth = np.divide(counts, frames, out=np.zeros_like(counts), where=frames > 1e-9)
    expected = smooth * count
    is_seen = expected > 0
    chi2 = np.divide((total - expected) ** 2, expected, out=np.zeros_like(smooth), where=is_seen)
    chi2, seen = (ndimage.uniform_filter(a, STRUCTURE_PX) for a in (chi2, 1.0 * is_seen))
    kept = 1 - 1 / np.maximum(chi2 / np.maximum(seen, 1e-9), 1.0)
    own = np.divide(total, count, out=smooth.copy(), where=is_seen)
    return np.where(is_seen, smooth + kept * (own - smooth), smooth).astype(np.float32)


def images(shape, seed=0):
    """Counts with gaps, a ring and lone bright pixels, also on edges, and their frames."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape)
    count = rng.poisson(20, shape).astype(np.float32)
    count[(rng.random(shape) < 0.1) | ((y // 15 % 4 == 0) & (x > 20))] = 0
    rate = 0.8 + 3.0 * (np.abs(np.hypot(y, x - 9) - 60) < 1)
    total = rng.poisson(count * rate).astype(np.float32)
    total[rng.random(shape) < 0.01] *= 20
    return total, count


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 2), (20, 5), (130, 70)])
def test_mean_image_is_what_it_is_defined_as(monkeypatch, shape):
    monkeypatch.setattr(background, "BAND_ROWS", 16)
    total, count = images(shape)
    for sigma in (0.5, 2.0):
        expected = of_scipy(total, count, sigma)
        # equal to the bit in all that was tried on 2026-11-30, 18 megapixels among it
        np.testing.assert_allclose(mean_image(total, count, sigma), expected, rtol=2e-7)
    if shape[0] > 100:
        frames = np.maximum(count, 1)
        around = ndimage.rank_filter(total / frames, -3, footprint=RING, mode="mirror")
        assert (total > 2 * around * frames + 5).sum() > 20
        assert (expected == 0).any()


def test_mean_image_needs_few_bytes_per_pixel():
    """4 of the image itself; 7 on 16 megapixels. Before 2026-11-30 there were 90."""
    mean_image(*images((30, 30)))  # what is compiled once
    peaks = []
    for rows in (600, 2400):
        total, count = images((rows, 200))
        tracemalloc.start()
        mean_image(total, count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (1800 * 200) < 4.1, peaks
