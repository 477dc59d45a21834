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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, pdtrc

from braggflux.integrator.shoebox.canvas import INVALID, FrameCanvas
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
NONE = np.zeros(0, dtype=np.int64)
_LEFT_OUT = np.array([out or (-1, -1) for out in OPPOSITE], dtype=np.int64)

Integers = NDArray[np.signedinteger[Any]]


class SpikeFilter:
    """Reads frames in order and takes the spikes out of them.

    Parameters
    ----------
    frames : Frames
    canvas : FrameCanvas
        Loaded by :meth:`load`.
    sigma : (float, float, float)
        Standard deviation of the spots along fast, slow [pixels] and rotation [frames], without
        the width of pixel and frame.
    is_active : bool
        False passes the frames on as they are.
    """

    def __init__(
        self,
        frames: Frames,
        canvas: FrameCanvas,
        sigma: tuple[float, float, float],
        *,
        is_active: bool = True,
    ) -> None:
        self._frames, self._canvas, self._usable = frames, canvas, frames.static_mask()
        self._is_active = is_active
        self._ratios, self._across = peak_ratios(sigma)
        self._ahead = FrameCanvas(canvas.panel_shapes, canvas.margin)
        self._before = FrameCanvas(canvas.panel_shapes, canvas.margin)
        self._static = np.zeros(canvas.size, dtype=bool)
        for panel, good in enumerate(self._usable):
            canvas.panel_view(self._static, panel)[...] = good
        self._next = -1
        self._spikes, self._taken = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
        self._sharp: list[NDArray[np.int64]] = []  # of each frame
        self.n_spikes = 0
        self.is_spike = np.zeros(canvas.size, dtype=bool)  # on the loaded frame
        self.odd = np.zeros(0, dtype=np.int64)  # flat indices, too sharp for background

    def load(self, frame: int) -> None:
        """Load a frame (each in turn) into the canvas, without its spikes."""
        canvas, ahead = self._canvas, self._ahead
        if not self._is_active:
            canvas.load(self._frames.read(frame), self._usable)
            return
        if self._next != frame:
            self._before.counts[...] = INVALID
            ahead.load(self._frames.read(frame), self._usable)
        else:
            canvas.counts[self._spikes] = self._taken
            self._before.counts, canvas.counts = canvas.counts, self._before.counts
        canvas.counts, ahead.counts = ahead.counts, canvas.counts
        if frame + 1 < self._frames.n_images:
            ahead.load(self._frames.read(frame + 1), self._usable)
        else:
            ahead.counts[...] = INVALID
        self._next = frame + 1
        self.is_spike[self._spikes] = False
        candidates = self._candidates(canvas.counts)
        sharp, is_supported = self._find(canvas.counts, candidates)
        self.odd = self._sharp_of(canvas.counts, candidates, ODD_RATIOS)
        self._spikes = sharp[~is_supported]
        self.is_spike[self._spikes] = True
        self._sharp.append(sharp)
        self.n_spikes += len(self._spikes)
        self._taken = canvas.counts[self._spikes]
        canvas.counts[self._spikes] = INVALID

    def hot_pixels(self) -> NDArray[np.bool_]:
        """Pixels that were sharp on most frames, (size,)."""
        pixels, n_sharp = np.unique(np.concatenate([NONE, *self._sharp]), return_counts=True)
        is_hot = np.zeros(self._canvas.size, dtype=bool)
        is_hot[pixels[n_sharp >= max(HOT_SHARE * self._frames.n_images, HOT_FRAMES)]] = True
        return is_hot

    def _find(
        self, now: Integers, candidates: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Flat indices of sharp counts, (K,), and whether the frames beside support them."""
        index = self._sharp_of(now, candidates, self._ratios)
        around = self._canvas.around(index)
        support, n_frames = np.zeros(len(index)), np.zeros(len(index))
        for frame in (self._before.counts, self._ahead.counts):
            window = np.maximum(frame[around], 0)
            # all of a spot in one pixel, nothing of one that has a third there, as most have
            support += np.maximum(1.5 * window.max(axis=1) - 0.5 * window.sum(axis=1), 0.0)
            n_frames += frame[index] >= 0
        support *= 2.0 / np.maximum(n_frames, 1.0)
        return index, ~exceeds(now[index], self._across, support)

    def find_sharp(self, now: Integers) -> NDArray[np.int64]:
        """Flat indices of the sharp counts of a frame (canvas.size,)."""
        return self._sharp_of(now, self._candidates(now), self._ratios)

    def _candidates(self, now: Integers) -> NDArray[np.int64]:
        """Flat indices of counts above the mean that their neighbours allow."""
        canvas = self._canvas
        least = ALLOWANCE * np.minimum(self._ratios, ODD_RATIOS)
        places = zip(canvas.base, canvas.stride, canvas.panel_shapes, strict=True)
        found = [
            sharp_candidates(
                now, (int(base), int(stride), *shape), MIN_COUNTS, least, _LEFT_OUT, MIN_SHARE
            )
            for base, stride, shape in places
        ]
        return np.concatenate(found)

    def _sharp_of(
        self, now: Integers, index: NDArray[np.int64], ratios: Sequence[float]
    ) -> NDArray[np.int64]:
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
        is_sharp &= ~((values < 0) & self._static[ring]).any(axis=1)
        return index[is_sharp]


class QuietFrames:
    """Frames without hot pixels, for looks at some of them before all are read.

    Hot are pixels that are sharp on most of some frames from all over the scan. Zingers stay: as
    long as the size of the spots is not known, a spot of a fifth of a pixel would be one.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self.n_images, self.panel_shapes = frames.n_images, frames.panel_shapes
        canvas = FrameCanvas(frames.panel_shapes, 2)
        spikes = SpikeFilter(frames, canvas, (1.0, 1.0, 1.0))
        n_sharp, usable = np.zeros(canvas.size, dtype=np.int32), frames.static_mask()
        looks = np.unique(np.linspace(0, frames.n_images - 1, 2 * HOT_FRAMES).astype(int))
        for frame in looks:
            canvas.load(frames.read(int(frame)), usable)
            n_sharp[spikes.find_sharp(canvas.counts)] += 1
        is_hot = n_sharp >= max(HOT_SHARE * len(looks), HOT_FRAMES)
        self._usable = [good & ~canvas.panel_view(is_hot, p) for p, good in enumerate(usable)]

    def static_mask(self) -> list[NDArray[np.bool_]]:
        """Pixels usable on every frame, per panel."""
        return self._usable

    def read(self, frame: int) -> list[NDArray[np.int32]]:
        """Photons of a frame per panel, hot pixels among them: the mask knows those."""
        return self._frames.read(frame)


def _sums(neighbours: Integers) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
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


def exceeds(count: Integers, ratio: float, total: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether counts (K,) are too large for neighbours that hold ``total``."""
    # the neighbours' own rate may be larger than what they counted
    upper = total + 3.0 * np.sqrt(total) + 3.0
    return pdtrc(count - 1.0, ALLOWANCE * ratio * upper) < CHANCE
