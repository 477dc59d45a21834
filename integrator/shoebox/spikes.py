"""Counts that no photons of the scene can have made: zingers and hot pixels, frame by frame.

Optics and sensor spread a reflection over neighbouring pixels, its rocking curve over neighbouring
frames; rings and shadows are wider still. A cosmic ray or a faulty pixel is sharper. A count is
*sharp* if it exceeds what the pixels around it allow at the centre of a very small spot: under the
Poisson law of that largest rate its chance is below :data:`CHANCE`. The pixels around it are the
eight on the frame, or these less two opposite ones, since a particle leaves a track of a few
pixels. A sharp count is a *spike*, and taken out, unless the frames before and after support it:
detectors without any spread of their own show real spots of one pixel, but these are as sharp on
the frames beside.
A pixel that is sharp on most frames is *hot*. What is neither, small or under a strong spot, is
left to the outlier part of the merge's likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, pdtrc

from braggflux.integrator.shoebox.canvas import INVALID, SPIKE, Counts, FrameCanvas, read_ahead
from braggflux.integrator.shoebox.kernels.frames import sharp_candidates

if TYPE_CHECKING:
    from braggflux.integrator.shoebox.sweep import Frames

CHANCE = 1e-9
"""Of a count as large or larger, under the largest rate that its surroundings allow."""
NARROWEST = 0.7
"""A spot may be so much narrower than the measured extent, which holds errors of prediction."""
SMALLEST = 0.3
"""Standard deviation of spots in pixels that are expected at least: 0.8 of them in one pixel."""
MAX_ACROSS = 8.0
"""Photons on one frame over those on both beside it that still count as support."""
ALLOWANCE = 1.5
"""On the rate, for profiles that are more peaked than Gaussians."""
MIN_COUNTS = 12
"""Smaller counts are never sharp: their chance is above :data:`CHANCE` on any background."""
MIN_SHARE = 0.6
"""Of the neighbours that must be recorded; with fewer nothing is said."""
ODD_RATIO = 0.5
"""Where no spot is predicted: to the sum of the eight around, four times their mean."""
OPPOSITE = ((), (0, 7), (1, 6), (2, 5), (3, 4))
"""Neighbours on the frame that are left out, by their place in the ring of eight."""
HOT_SHARE, HOT_FRAMES = 0.5, 10
"""A pixel is hot when it is sharp on a larger share of the frames, and on so many at least."""

ODD_RATIOS = (ODD_RATIO,) * len(OPPOSITE)
KEPT = 3
"""Frames in hand: before, now and ahead."""
ANY_SIZE = (1.0, 1.0, 1.0)
"""Standard deviations that allow for spots of any size."""
NONE = np.zeros(0, dtype=np.int64)
_LEFT_OUT = np.array([out or (-1, -1) for out in OPPOSITE], dtype=np.int64)

Index = NDArray[np.int64]


class SharpCounts:
    """Finds counts that exceed what the pixels around them allow.

    Parameters
    ----------
    canvas : FrameCanvas
        Layout of the frames.
    usable : sequence of ndarray, (slow, fast) bool
        Static mask of each panel.
    sigma : (float, float, float)
        Standard deviation of the spots along fast, slow [pixels] and rotation [frames], without
        the width of pixel and frame.
    """

    def __init__(
        self,
        canvas: FrameCanvas,
        usable: Sequence[NDArray[np.bool_]],
        sigma: tuple[float, float, float],
    ) -> None:
        self._canvas, self._usable = canvas, usable
        self._ratios, self.across = peak_ratios(sigma)

    def find(self, now: Counts) -> tuple[Index, Index]:
        """Flat indices of the sharp counts of a frame (canvas.size,), and of the odd ones.

        Odd are those that are too sharp where no spot is predicted.
        """
        canvas = self._canvas
        least = ALLOWANCE * np.minimum(self._ratios, ODD_RATIOS)
        places = zip(canvas.base, canvas.stride, canvas.panel_shapes, strict=True)
        found = [
            sharp_candidates(
                now, (int(base), int(stride), *shape), MIN_COUNTS, least, _LEFT_OUT, MIN_SHARE
            )
            for base, stride, shape in places
        ]
        index = np.concatenate(found)
        return self._above(now, index, self._ratios), self._above(now, index, ODD_RATIOS)

    def _above(self, now: Counts, index: Index, ratios: Sequence[float]) -> Index:
        """Those of some pixels whose counts are above ``ratios`` to each set of neighbours."""
        around = self._canvas.around(index)
        ring = np.delete(around, 4, axis=1)  # without the pixel itself
        values = now[ring]
        is_sharp = np.zeros(len(index), dtype=bool)
        for left_out, ratio in zip(OPPOSITE, ratios, strict=True):
            beside = np.delete(values, left_out, axis=1)
            total, n = _sums(beside)
            is_sharp |= exceeds(now[index], ratio, total) & (n >= MIN_SHARE * beside.shape[1])
        # beside an overload the largest neighbour is missing: nothing can be said
        has_gap = np.flatnonzero(is_sharp & (values < 0).any(axis=1))
        is_missing = values[has_gap] < 0
        is_missing &= self._canvas.flags_at(self._usable, ring[has_gap])
        is_sharp[has_gap] = ~is_missing.any(axis=1)
        return index[is_sharp]


class SpikeFilter:
    """Reads frames in order, and puts :data:`SPIKE` in place of the spikes in them.

    Parameters
    ----------
    frames : Frames
    canvas : FrameCanvas
        Loaded by :meth:`load`.
    sigma : (float, float, float)
        As for :class:`SharpCounts`.
    span : (range, int), optional
        Frames whose sharp counts are kept, from the first that is loaded, and the end of those
        that are; all by default.
    is_active : bool
        False passes the frames on as they are.

    Attributes
    ----------
    odd : ndarray, (K,) int64
        Flat indices of counts of the loaded frame that are too sharp for background.
    n_spikes : int
        So far.
    """

    def __init__(
        self,
        frames: Frames,
        canvas: FrameCanvas,
        sigma: tuple[float, float, float],
        span: tuple[range, int] | None = None,
        *,
        is_active: bool = True,
    ) -> None:
        self._canvas, self._is_active, self._n_images = canvas, is_active, frames.n_images
        self._sharp_counts = SharpCounts(canvas, frames.static_mask(), sigma)
        self._kept, end = span or (range(frames.n_images), frames.n_images)
        self._next = self._kept.start
        # a frame is compared with those beside it
        beside = int(is_active)
        numbers = range(max(self._next - beside, 0), min(end + beside, frames.n_images))
        self._reader = read_ahead(frames, numbers, canvas, keep=KEPT)
        self._nothing = canvas.counts
        self._before, self._now, self._ahead = self._nothing, self._nothing, self._nothing
        self._spikes, self._taken = NONE, np.zeros(0, dtype=np.int32)
        self._sharp: list[Index] = []  # of each frame
        self.n_spikes = 0
        self.odd = NONE

    def load(self, frame: int) -> None:
        """Load a frame (each in turn) into the canvas, without its spikes."""
        if frame != self._next:
            raise ValueError(f"frames are loaded in turn: {self._next}, not {frame}")
        self._next += 1
        if not self._is_active:
            self._canvas.counts = next(self._reader)[1]
            return
        if frame == self._kept.start:
            if frame > 0:
                self._now = next(self._reader)[1]
            self._ahead = next(self._reader)[1]
        if len(self._spikes):
            self._now[self._spikes] = self._taken
        self._before, now = self._now, self._ahead
        self._now, self._ahead = now, next(self._reader, (0, self._nothing))[1]
        sharp, self.odd = self._sharp_counts.find(now)
        self._spikes = sharp[~self._are_supported(sharp)]
        if frame in self._kept:
            self._sharp.append(sharp)
            self.n_spikes += len(self._spikes)
        self._taken = now[self._spikes]
        now[self._spikes] = SPIKE
        self._canvas.counts = now

    def close(self) -> None:
        """Stop reading, and let go of the frames."""
        self._reader.close()
        self._before = self._now = self._ahead = self._canvas.counts = self._nothing

    @property
    def sharp(self) -> Index:
        """Flat indices of the sharp counts of all frames that are kept, (K,)."""
        return np.concatenate([NONE, *self._sharp])

    def add_sharp(self, sharp: Index, n_spikes: int) -> None:
        """Add what a filter of other frames has found."""
        self._sharp.append(sharp)
        self.n_spikes += n_spikes

    def hot_pixels(self) -> NDArray[np.bool_]:
        """Pixels that were sharp on most frames, (size,)."""
        return often_sharp(self._sharp, self._n_images, self._canvas.size)

    def _are_supported(self, index: Index) -> NDArray[np.bool_]:
        """Whether the frames beside support sharp counts, (K,)."""
        around = self._canvas.around(index)
        support, n_frames = np.zeros(len(index)), np.zeros(len(index))
        for frame in (self._before, self._ahead):
            window = np.maximum(frame[around], 0)
            # all of a spot in one pixel, nothing of one that has a third there, as most have
            support += np.maximum(1.5 * window.max(axis=1) - 0.5 * window.sum(axis=1), 0.0)
            n_frames += frame[index] >= 0
        support *= 2.0 / np.maximum(n_frames, 1.0)
        return ~exceeds(self._now[index], self._sharp_counts.across, support)


def often_sharp(sharp: Sequence[Index], n_frames: int, size: int) -> NDArray[np.bool_]:
    """Pixels that are in most of ``n_frames`` lists of sharp ones, (size,): hot ones."""
    pixels, n_sharp = np.unique(np.concatenate([NONE, *sharp]), return_counts=True)
    is_hot = np.zeros(size, dtype=bool)
    is_hot[pixels[n_sharp >= max(HOT_SHARE * n_frames, HOT_FRAMES)]] = True
    return is_hot


@dataclass(frozen=True)
class Windows:
    """Windows around some spots in a block of frames, for a first look at these.

    Parameters
    ----------
    block : (int, int)
        Half-open range of frames.
    panel : ndarray, (N,) int64
    corner : ndarray, (N, 3) int64
        First (frame, slow, fast) of each window.
    shape : (int, int, int)
        (D, H, W) of each window.

    Attributes
    ----------
    counts : ndarray, (N, D, H, W) int32
        Photons; negative where invalid or outside of the block.
    """

    block: tuple[int, int]
    panel: NDArray[np.int64]
    corner: NDArray[np.int64]
    shape: tuple[int, int, int]
    counts: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        counts = np.full((len(self.corner), *self.shape), INVALID, dtype=np.int32)
        object.__setattr__(self, "counts", counts)

    def take(self, frame: int, counts: Counts, canvas: FrameCanvas) -> None:
        """Take what a frame holds of the windows."""
        if not self.block[0] <= frame < self.block[1]:
            return
        step = frame - self.corner[:, 0]
        active = np.nonzero((step >= 0) & (step < self.shape[0]))[0]
        self.counts[active, step[active]] = counts[self._pixels(active, canvas)]

    def leave_out(self, is_bad: NDArray[np.bool_], canvas: FrameCanvas) -> None:
        """Make pixels (canvas.size,) invalid."""
        rows = np.arange(len(self.corner))
        self.counts.swapaxes(0, 1)[:, is_bad[self._pixels(rows, canvas)]] = INVALID

    def _pixels(self, rows: NDArray[np.int64], canvas: FrameCanvas) -> NDArray[np.int64]:
        _, slow, fast = self.corner[rows].T
        return canvas.windows(self.panel[rows], slow, fast, self.shape[1:])


def take_windows(frames: Frames, windows: Sequence[Windows], *, find_hot: bool) -> None:
    """Fill windows, without hot pixels if these are to be found; each frame is read once.

    Hot are pixels that are sharp on most of some frames from all over the scan. Zingers stay: as
    long as the size of the spots is not known, a spot of a fifth of a pixel would be one.

    Parameters
    ----------
    frames : Frames
    windows : sequence of Windows
    find_hot : bool
    """
    margin = max((max(w.shape[1:]) for w in windows), default=0) + 3
    canvas = FrameCanvas(frames.panel_shapes, margin)
    n_looks = 2 * HOT_FRAMES if find_hot else 0
    looks = {int(n) for n in np.linspace(0, frames.n_images - 1, n_looks)}
    search, sharp = SharpCounts(canvas, frames.static_mask(), ANY_SIZE), []
    numbers = looks.union(*(range(*w.block) for w in windows))
    for frame, counts in read_ahead(frames, sorted(numbers), canvas):
        if frame in looks:
            sharp.append(search.find(counts)[0])
        for window in windows:
            window.take(frame, counts, canvas)
    is_hot = often_sharp(sharp, len(sharp), canvas.size)
    if is_hot.any():
        for window in windows:
            window.leave_out(is_hot, canvas)


def _sums(neighbours: Counts) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sum over neighbours (K, M), missing ones (negative) like the others, and how many are."""
    n = (neighbours >= 0).sum(axis=1)
    total = np.maximum(neighbours, 0).sum(axis=1) * neighbours.shape[1] / np.maximum(n, 1)
    return total, n


def peak_ratios(sigma: tuple[float, float, float]) -> tuple[list[float], float]:
    """Largest ratio of a spot's central voxel to the sum of its neighbours.

    Of a Gaussian that is narrower than measured, and small, and centred in a voxel.

    Parameters
    ----------
    sigma : (float, float, float)
        Fast, slow and rotation [pixels, pixels, frames].

    Returns
    -------
    in_frame : list of float
        To the ring on the frame less each entry of :data:`OPPOSITE`.
    across : float
        To the nine pixels on both frames beside it.
    """
    width = NARROWEST * np.asarray(sigma, dtype=float) * np.sqrt(2.0)
    width[:2] = np.minimum(width[:2], SMALLEST * np.sqrt(2.0))
    centre, three = erf(0.5 / width), erf(1.5 / width)
    side = (three - centre) / 2
    fast, slow = (np.array([side[k], centre[k], side[k]]) for k in (0, 1))
    window = np.outer(slow, fast).ravel()
    peak, ring = window[4], np.delete(window, 4)
    in_frame = [float(peak / max(ring.sum() - ring[list(o)].sum(), 1e-6)) for o in OPPOSITE]
    across = peak * centre[2] / max(window.sum() * 2 * side[2], 1e-6)
    return in_frame, min(float(across), MAX_ACROSS)


def exceeds(count: Counts, ratio: float, total: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether counts (K,) are too large for neighbours that hold ``total``."""
    # the neighbours' own rate may be larger than what they counted
    upper = total + 3.0 * np.sqrt(total) + 3.0
    return pdtrc(count - 1.0, ALLOWANCE * ratio * upper) < CHANCE
