"""Which voxels belong to which spot.

A spot is an ellipsoid around its predicted centroid with the measured standard deviations
(fast, slow, frame); distances are counted in those. Neighbours are decided in three dimensions:
on every frame, each pixel knows the distance to the nearest spot, so that a neighbour counts only
where it truly reaches, in rotation angle too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.prediction.rocking import frame_sigma
from braggflux.integrator.shoebox.canvas import FrameCanvas
from braggflux.integrator.shoebox.kernels.boxes import draw_spots
from braggflux.integrator.types import Flag

if TYPE_CHECKING:
    from braggflux.integrator.crystal.geometry import Experiment
    from braggflux.integrator.prediction.predict import Prediction
    from braggflux.integrator.shoebox.extent import SpotExtent
    from braggflux.integrator.shoebox.sweep import Frames

FloatArray = NDArray[np.float32]

BLOCK_FRAMES = 64
"""Frames whose spots are listed at a time: of all frames the lists would be longer than the rest
of what is known of the spots."""


class MaskBit:
    """Bits of a voxel in the shoebox store (those of DIALS' shoebox masks)."""

    VALID = 1  # recorded, not masked, not overloaded
    BACKGROUND = 2  # valid, and outside of every predicted spot
    FOREGROUND = 4  # inside of the reflection's own ellipsoid, recorded or not
    OVERLAPPED = 32  # inside of a neighbour's ellipsoid, nearer to it, and not shared with it


@dataclass(frozen=True)
class MaskSettings:
    """Sizes of the ellipsoids in standard deviations.

    Parameters
    ----------
    foreground : float
        Own spot, and what is kept out of the background statistic.
    overlap : float
        How far a neighbour reaches.
    core : float
        Voxels that must be recorded for the spot to be whole.
    shared : float
        Own voxels that stay when a neighbour is nearer, where neighbours are modelled: spots
        whose ellipsoids of this size touch are solved together. 0 masks all neighbours.
    """

    foreground: float = 4.0
    overlap: float = 4.0
    core: float = 2.5
    shared: float = 3.0


@dataclass(frozen=True)
class Spots:
    """Predicted spots of a sweep.

    Parameters
    ----------
    panel : ndarray, (N,) int64
    centre, sigma : ndarray, (N, 3)
        (fast, slow, frame) centroid, and standard deviation including the width of pixel or
        frame [pixels, pixels, frames].
    """

    panel: NDArray[np.int64]
    centre: NDArray[np.float64]
    sigma: NDArray[np.float64]

    def join(self, other: Spots) -> Spots:
        """Join two sets, these first."""
        return Spots(
            np.concatenate([self.panel, other.panel]),
            np.concatenate([self.centre, other.centre]),
            np.concatenate([self.sigma, other.sigma]),
        )

    def __getitem__(self, rows: slice) -> Spots:
        """Give some of them, not copied."""
        return Spots(self.panel[rows], self.centre[rows], self.sigma[rows])

    def axis_terms(
        self, axis: int, rows: slice | NDArray[np.int64], first: NDArray[np.int64], length: int
    ) -> FloatArray:
        """Squared distances along one axis of the voxels ``first .. first + length - 1``.

        Parameters
        ----------
        axis : int
            0 for fast, 1 for slow, 2 for frames.
        rows : slice or ndarray, (K,)
            Of the spots.
        first : ndarray, (K,)
        length : int

        Returns
        -------
        ndarray, (K, length) float32
            ``((voxel centre - centre) / sigma)^2``.
        """
        position = first[:, None] + (np.arange(length) + 0.5)
        centre, sigma = self.centre[rows, axis, None], self.sigma[rows, axis, None]
        return (((position - centre) / sigma) ** 2).astype(np.float32)


class SpotMap:
    """Squared distance of every pixel of a frame to the nearest spot.

    Parameters
    ----------
    canvas : FrameCanvas
        Its margin must exceed the half window by two pixels.
    spots : Spots
    reach : float
        Distances above this many standard deviations are not told apart (infinite).
    n_images : int
        Frames of the sweep.

    Attributes
    ----------
    nearest : ndarray, (canvas.size,) float32
        For the frame of the last :meth:`update`.
    touched : ndarray, (K,) int64
        Flat indices of the pixels where it is not infinite.
    """

    def __init__(self, canvas: FrameCanvas, spots: Spots, reach: float, n_images: int) -> None:
        self.nearest = np.full(canvas.size, np.inf, dtype=np.float32)
        self._canvas, self._spots, self._reach, self._n_images = canvas, spots, reach, n_images
        half = window_half(spots, reach)
        self._shape = (2 * half[1] + 1, 2 * half[0] + 1)
        self._half = half
        self._block = range(0)  # of frames whose spots are listed in rows
        self._rows = self._starts = self.touched = np.zeros(0, dtype=np.int64)

    def update(self, frame: int) -> None:
        """Recompute :attr:`nearest` for a frame."""
        self.nearest[self.touched] = np.inf
        spots, rows = self._spots, self._rows_on(frame)
        fast, slow = (
            np.floor(spots.centre[rows, axis]).astype(np.int64) - self._half[axis]
            for axis in (0, 1)
        )
        self.touched = draw_spots(
            self.nearest,
            *self._canvas.first(spots.panel[rows], slow, fast),
            spots.axis_terms(1, rows, slow, self._shape[0]),
            spots.axis_terms(0, rows, fast, self._shape[1]),
            spots.axis_terms(2, rows, np.full(len(rows), frame), 1).ravel(),
            np.float32(self._reach**2),
        )

    def close(self) -> None:
        """Let go of the map."""
        self.nearest, self.touched = np.zeros(0, np.float32), self.touched[:0]

    def _rows_on(self, frame: int) -> NDArray[np.int64]:
        """Spots lit on a frame."""
        if frame not in self._block:
            end = min(frame + BLOCK_FRAMES, self._n_images)
            self._block = range(frame, end)
            self._rows, self._starts = _rows_per_frame(self._spots, self._reach, self._block)
        place = frame - self._block.start
        return self._rows[self._starts[place] : self._starts[place + 1]]


def window_half(spots: Spots, reach: float) -> tuple[int, int]:
    """Half size (fast, slow) of the windows that hold every spot's ellipse."""
    largest = spots.sigma[:, :2].max(axis=0)
    fast, slow = np.ceil(reach * largest).astype(int)
    return int(fast), int(slow)


def _rows_per_frame(
    spots: Spots, reach: float, frames: range
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Spots lit on each of some frames: rows sorted by frame, and where each starts (n + 1,)."""
    extent, (first, end) = reach * spots.sigma[:, 2], (frames.start, frames.stop)
    low = np.ceil(spots.centre[:, 2] - extent - 0.5).clip(first, end).astype(np.int32)
    high = np.floor(spots.centre[:, 2] + extent - 0.5).clip(first - 1, end - 1).astype(np.int32)
    lit = np.flatnonzero(high >= low)
    low, length = low[lit], (high - low + 1)[lit]
    rows = np.repeat(lit, length)
    step = np.arange(len(rows)) - np.repeat(np.cumsum(length) - length, length)
    frame = np.repeat(low, length) + step
    order = np.argsort(frame, kind="stable")
    starts = np.searchsorted(frame[order], np.arange(first, end + 1))
    return rows[order], starts


def edge_flags(
    corner: NDArray[np.int64],
    n_frames: NDArray[np.int64],
    panel: NDArray[np.int64],
    frames: Frames,
    box: tuple[int, int, int],
) -> NDArray[np.int64]:
    """Flag boxes that reach over the edge of the panel or of the scan, (N,) int64."""
    shapes = np.array(frames.panel_shapes, dtype=np.int64)[panel]
    limit = np.column_stack([np.full(len(corner), frames.n_images), shapes])
    size = np.column_stack([n_frames, np.broadcast_to(box[1:], (len(corner), 2))])
    is_cut = ((corner < 0) | (corner + size > limit)).any(axis=1)
    return np.where(is_cut, Flag.PARTIAL_EDGE, 0).astype(np.int64)


def predicted_spots(prediction: Prediction, extent: SpotExtent, experiment: Experiment) -> Spots:
    """Ellipsoids of predicted spots; pixels and frames of finite width broaden them."""
    zeta = prediction.zeta.numpy().astype(np.float64)
    rocking = extent.rocking_width.at(prediction.d.numpy().astype(np.float64))
    along = frame_sigma(rocking, zeta, experiment.rotation.scan.oscillation[1])
    across = np.hypot([extent.sigma_x_px, extent.sigma_y_px], np.sqrt(1 / 12))
    sigma = np.column_stack([np.broadcast_to(across, (len(zeta), 2)), along])
    centre = prediction.xyz_px.numpy().astype(np.float64)
    return Spots(prediction.panel.numpy(), centre, sigma)
