"""Zingers, hot pixels, shadows and fine background: found where they are, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf

from braggflux.integrator.shoebox.background import mean_image
from braggflux.integrator.shoebox.canvas import SPIKE, FrameCanvas
from braggflux.integrator.shoebox.defects import (
    BoxGeometry,
    Defects,
    flaring_pixels,
    hot_pixels,
    report,
)
from braggflux.integrator.shoebox.spikes import (
    HOT_FRAMES,
    SpikeFilter,
    Windows,
    peak_ratios,
    take_windows,
)

SHAPE = (60, 70)
SIGMA = (0.8, 0.7, 0.5)


class Frames:
    """Frames in memory."""

    def __init__(self, images: np.ndarray, bad: np.ndarray | None = None) -> None:
        self.images = images.astype(np.int32)
        self.n_images = len(images)
        self.panel_shapes = [images.shape[1:]]
        self.bad = np.zeros(images.shape[1:], bool) if bad is None else bad

    def read(self, frame: int) -> list[np.ndarray]:
        return [self.images[frame]]

    def static_mask(self) -> list[np.ndarray]:
        return [~self.bad]


def filtered(frames: Frames, sigma=SIGMA, **options) -> tuple[SpikeFilter, np.ndarray]:
    """Filter, and the frames that it lets through (n, slow, fast), SPIKE for spikes."""
    canvas = FrameCanvas(frames.panel_shapes, 4)
    source = SpikeFilter(frames, canvas, sigma, **options)
    seen = []
    for frame in range(frames.n_images):
        source.load(frame)
        seen.append(canvas.panel_view(canvas.counts, 0).copy())
    return source, np.stack(seen)


def whole(frames: Frames) -> Windows:
    """One window that is all of the frames."""
    n, zeros = frames.n_images, np.zeros((1, 3), np.int64)
    return Windows((0, n), zeros[:, 0], zeros, (n, *SHAPE))


def spot(centre, sigma, shape) -> np.ndarray:
    """Gaussian integrated over (frame, slow, fast) voxels; sums to 1."""
    parts = []
    for axis, n in enumerate(shape):
        edges = (np.arange(n + 1) - centre[axis]) / sigma[axis] / np.sqrt(2)
        parts.append(np.diff(erf(edges)) / 2)
    return np.einsum("i,j,k->ijk", *parts)


@pytest.mark.parametrize("n_pixels", [1, 2, 3])
def test_tracks_are_spikes_and_nothing_else_is(n_pixels):
    rng = np.random.default_rng(n_pixels)
    images = rng.poisson(0.6, (5, *SHAPE))
    images[2, 20 : 20 + n_pixels, 30] += 900
    images[4, 40, 10 : 10 + n_pixels] += 4000  # on the last frame
    _, seen = filtered(Frames(images))
    wrong = np.argwhere(seen < 0)
    expected = [(2, 20 + k, 30) for k in range(n_pixels)]
    expected += [(4, 40, 10 + k) for k in range(n_pixels)]
    assert {tuple(w) for w in wrong.tolist()} == set(expected)
    untouched = seen >= 0
    assert np.array_equal(seen[untouched], images[untouched])
    source, passed = filtered(Frames(images), is_active=False)
    assert np.array_equal(passed, images)
    assert source.n_spikes == 0


@pytest.mark.parametrize("photons", [50.0, 3e3, 2e5, 1e6])
@pytest.mark.parametrize("sigma", [(0.5, 0.7, 0.8), (0.2, 0.5, 0.5), (1.5, 0.3, 0.3)])
def test_no_spot_is_a_spike(photons, sigma):
    """Even where it is much sharper than the measured extent, at any place in its pixel."""
    rng = np.random.default_rng(1)
    rate = np.full((9, *SHAPE), 0.5)
    for slow in range(6, 60, 9):
        for fast in range(6, 70, 9):
            centre = np.array([4, slow, fast]) + rng.random(3)
            rate += photons * spot(centre, sigma, rate.shape)
    frames = Frames(rng.poisson(rate))
    source, seen = filtered(frames)
    assert (seen >= 0).all()
    assert source.n_spikes == 0
    assert not source.hot_pixels().any()


def test_real_spots_of_one_pixel_are_supported_by_their_rocking_curve():
    """Counts of a Pilatus: 0.9 of a spot in one pixel, on three frames."""
    images = np.random.default_rng(0).poisson(0.1, (6, *SHAPE))
    patch = np.array([[5, 18, 0], [17, 1259, 8], [1, 30, 11]])
    for frame, share in ((2, 0.1), (3, 1.0), (4, 1.4), (5, 0.12)):
        images[frame, 19:22, 19:22] += (patch * share).astype(int)
    source, seen = filtered(Frames(images), sigma=(1.1, 1.0, 0.9))
    assert source.n_spikes == 0
    alone = images.copy()
    alone[[2, 4, 5]] = alone[0]
    _, seen = filtered(Frames(alone), sigma=(1.1, 1.0, 0.9))
    assert np.argwhere(seen < 0).tolist() == [[3, 20, 20]]


def test_beside_gaps_and_overloads_nothing_is_said():
    images = np.random.default_rng(0).poisson(0.5, (3, *SHAPE))
    bad = np.zeros(SHAPE, bool)
    bad[:, 31:40] = True
    images[1, 20, 30] = 3000  # beside the gap: a spike all the same
    images[1, 40, 10:12] = (50_000, -1)  # beside an overload: part of a strong spot
    _, seen = filtered(Frames(images, bad))
    assert seen[1, 20, 30] == SPIKE
    assert seen[1, 40, 10] == 50_000


def test_hot_pixels_are_those_that_are_always_sharp():
    rng = np.random.default_rng(0)
    images = rng.poisson(0.5, (20, *SHAPE))
    images[:, 15, 15] = rng.poisson(20_000, 20)
    images[3, 40, 40] += 2000
    source, seen = filtered(Frames(images))
    canvas = FrameCanvas([SHAPE], 4)
    assert np.argwhere(canvas.panel_view(source.hot_pixels(), 0)).tolist() == [[15, 15]]
    assert seen[3, 40, 40] == SPIKE
    short, _ = filtered(Frames(images[: HOT_FRAMES - 1]))
    assert not short.hot_pixels().any()


def test_ratios_are_those_of_a_centred_gaussian():
    in_frame, across = peak_ratios((0.3, 0.25, 0.6))
    density = spot((1.5, 1.5, 1.5), (0.42, 0.7 * 0.25, 0.7 * 0.3), (3, 3, 3))
    plane = density.sum(0) / density.sum(0)[1, 1]
    assert in_frame[0] == pytest.approx(1 / (plane.sum() - 1), rel=1e-6)
    assert in_frame[2] == pytest.approx(1 / (plane.sum() - 1 - 2 * plane[0, 1]), rel=1e-6)
    assert across == pytest.approx(density[1, 1, 1] / (density[0] + density[2]).sum(), rel=1e-6)
    # measured much wider: small spots are allowed for all the same
    assert peak_ratios((2.0, 2.0, 0.6))[0][0] == pytest.approx(4.494, abs=0.01)


def test_a_mild_hot_pixel_stands_out_of_the_background_statistic():
    rng = np.random.default_rng(0)
    rate = np.full((50, *SHAPE), 0.5)
    rate[:, :, 33] += 5.0  # a ring or streak, one pixel wide
    rate[:, 10, 12] = 9.0
    rate[:2, 30, 50:53] += (20.0, 60.0, 20.0)  # a reflection that nobody predicted
    images = rng.poisson(rate)
    count = np.full(SHAPE, 50.0)
    found = hot_pixels(images.sum(0).astype(float), (images**2).sum(0).astype(float), count)
    assert np.argwhere(found).tolist() == [[10, 12]]


def test_few_counts_in_an_empty_place_are_no_hot_pixel():
    """Five counts where the 24 around have none: of 18 million pixels that see one in two."""
    count = np.full((60, 60), 16.0)
    total = np.zeros((60, 60))
    total[20, 20], total[40, 40] = 6, 60
    is_hot = hot_pixels(total, total + total**2 / 16, count)
    assert np.argwhere(is_hot).tolist() == [[40, 40]]
    rng = np.random.default_rng(0)
    for rate in (0.003, 0.04, 1.0):
        total = rng.poisson(16 * rate, (1500, 1500)).astype(float)
        count = np.full(total.shape, 16.0)
        assert not hot_pixels(total, total + total**2 / 16, count).any()


def test_flaring_pixels_are_those_of_few_frames():
    rng = np.random.default_rng(0)
    frames = rng.poisson(0.3, (40, *SHAPE)).astype(float)
    frames[:12, :20] *= 0.05  # a shadow
    frames[7, 30:34, 40:44] += 3000  # salt
    frames[:, 50, 50] += 40  # hot
    frames[10:30, 5, 60] += 5  # half of the scan
    sums = (frames.sum(0), (frames**2).sum(0), np.full(SHAPE, 40.0))
    expected = np.zeros(SHAPE, bool)
    expected[30:34, 40:44] = True
    assert np.array_equal(flaring_pixels(*sums), expected)
    strong = rng.poisson(1000 * (1 + 0.05 * rng.normal(size=(40, 1, 1))), (40, *SHAPE))
    strong[:16, :20] = 0  # a shadow on strong background
    strong = strong.astype(float)
    sums = (strong.sum(0), (strong**2).sum(0), np.full(SHAPE, 40.0))
    assert not flaring_pixels(*sums).any()


@pytest.mark.parametrize("sigma", [(0.08, 0.12, 0.12), (0.2, 0.2, 0.2), (0.4, 0.27, 0.27)])
def test_spots_of_any_size_are_whole_before_their_size_is_known(sigma):
    rng = np.random.default_rng(1)
    rate = np.full((9, *SHAPE), 0.1)
    for slow in range(6, 60, 9):
        for fast in range(6, 70, 9):
            rate += 3e4 * spot(np.array([4, slow, fast]) + rng.random(3), sigma, rate.shape)
    frames = Frames(rng.poisson(rate))
    windows = whole(frames)
    take_windows(frames, [windows], find_hot=True)
    assert np.array_equal(windows.counts[0], frames.images)
    # and none is a zinger once it is
    source, _ = filtered(frames, sigma=sigma[::-1])
    assert source.n_spikes == 0


def test_hot_pixels_are_masked_before_the_spots_are_measured():
    images = np.random.default_rng(0).poisson(0.5, (30, *SHAPE))
    images[:, 15, 15] += 20_000
    windows = whole(Frames(images))
    take_windows(Frames(images), [windows], find_hot=True)
    assert np.argwhere((windows.counts[0] < 0).all(0)).tolist() == [[15, 15]]
    assert (windows.counts >= 0).sum() == 30 * (images[0].size - 1)


def test_a_loss_of_more_than_a_per_mille_is_a_warning(caplog):
    is_shaded = np.zeros((50, 4), bool)
    is_shaded[9:12, 2] = True
    found = Defects(np.zeros(9, bool), np.zeros(9, np.int32), is_shaded)
    with caplog.at_level("INFO"):
        report(found, 3, 999, 1_000_000, first_image=101)
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "3 zingers, 0 hot pixels, 3 of 200 tiles and frames in a shadow" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        report(found, 3, 15_000, 1_000_000, first_image=101)
    assert "1.5 % of the recorded voxels" in caplog.text
    assert "images 110 to 112" in caplog.text
    assert "extraction.find_defects=false" in caplog.text


def test_mean_image_keeps_rings_and_smooths_what_is_flat():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:120, :120]
    radius = np.hypot(y - 20, x - 10)
    rate = 0.5 + 3.0 * np.exp(-0.5 * ((radius - 60) / 1.0) ** 2)
    count = np.full(rate.shape, 60.0, np.float32)
    total = rng.poisson(rate * 60).astype(np.float32)
    image = mean_image(total, count, 2.0)
    ring, flat = np.abs(radius - 60) < 0.5, np.abs(radius - 60) > 20
    assert image[ring].mean() == pytest.approx(rate[ring].mean(), rel=0.03)
    # raw pixels scatter by 18 %, the smoothed image by 2.6 %
    assert image[flat].mean() == pytest.approx(0.5, rel=0.01)
    assert image[flat].std() < 0.05 * 0.5


def test_voxels_in_a_shadow_are_those_of_its_tiles_and_frames():
    """Layers of one to five frames, boxes over the ends of the scan and the edge of the panel."""
    rng = np.random.default_rng(0)
    n, n_images, box, side = 60, 40, (5, 7, 9), 16
    canvas = FrameCanvas([SHAPE], 15)
    hot, tile = np.zeros(canvas.size, bool), np.zeros(canvas.size, np.int32)
    canvas.panel_view(hot, 0)[30, 40] = True
    tiles = (np.arange(SHAPE[0]) // side)[:, None] * 5 + np.arange(SHAPE[1]) // side
    canvas.panel_view(tile, 0)[...] = tiles
    is_shaded = rng.random((n_images, 20)) < 0.1
    per_layer = rng.choice([1, 2, 5], n)
    corner = np.column_stack([rng.integers(-8, 40, n), rng.integers(0, 54, (n, 2))])
    terms = [np.zeros((n, length), np.float32) for length in (9, 7, 25)]
    boxes = BoxGeometry(
        box, np.zeros(n, np.int64), per_layer, corner, lambda rows: [t[rows] for t in terms]
    )
    found = boxes.bad_voxels(Defects(hot, tile, is_shaded), canvas, slice(0, n))
    for row, (frame, slow, fast) in enumerate(corner):
        for layer in range(box[0]):
            first = frame + layer * per_layer[row]
            frames = range(max(first, 0), min(first + per_layer[row], n_images))
            for y, x in np.ndindex(min(7, SHAPE[0] - slow), min(9, SHAPE[1] - fast)):
                place = tiles[slow + y, fast + x]
                expected = any(is_shaded[f, place] for f in frames)
                expected |= (slow + y, fast + x) == (30, 40)
                assert found[row, layer, y, x] == expected


def test_what_stays_beside_a_lasting_spot_is_no_hot_pixel():
    """Its fringes count steadily; it covers the pixels beside for half of the scan."""
    total, count = np.full(SHAPE, 8.0), np.full(SHAPE, 100.0)
    total[20, 20] = total[40, 40] = 900.0
    squares = total**2 / count + total
    assert [tuple(p) for p in np.argwhere(hot_pixels(total, squares, count))] == [
        (20, 20),
        (40, 40),
    ]
    count[40, 41:43] = 40.0
    total[40, 41:43] = 3.2
    assert [tuple(p) for p in np.argwhere(hot_pixels(total, squares, count))] == [(20, 20)]
