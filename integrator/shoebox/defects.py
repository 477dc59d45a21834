"""What the pixel mask does not know, found over the whole scan: hot pixels and shadows.

Both are read off the statistic of the background between the spots. A pixel is hot if its mean is
many times that of its surroundings, of which it is allowed the third largest (rings and streaks
are never one pixel wide), and if it counts steadily, as no reflection does that nobody predicted.
Where a spot stays for half of the scan, its fringes may do both: there nothing is said.
Shadows are looked for in tiles of pixels, see :mod:`braggflux.integrator.shoebox.shadows`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import pdtrc

from braggflux.integrator.io.shoebox_store import ShoeboxWriter
from braggflux.integrator.shoebox.canvas import FrameCanvas
from braggflux.integrator.shoebox.kernels.defects import flaring, standing_out
from braggflux.integrator.shoebox.mask import MaskBit, MaskSettings
from braggflux.integrator.types import Flag

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

HOT_RATIO = 5.0
"""To the third largest mean of the 24 pixels around."""
HOT_REACH = 2
"""Pixels on each side that are looked at."""
HOT_CHANCE = 1e-9
LEAST_HOT = float(np.argmax(pdtrc(np.arange(100.0), 3.0) < HOT_CHANCE) + 1)
"""Fewer counts have a larger chance even where the surroundings have none: at most 3 are due."""
HOT_DISPERSION = 3.0
"""Variance over mean of its counts, 1 for a steady rate."""
HOT_SEEN = 0.6
"""Share of the usual number of frames on which the pixels beside a hot one are seen at least."""
FLARE_DISPERSION = 10.0
"""Variance over mean of a pixel that flares up."""
FLARE_SHARE = 0.3
"""Of the square of all its counts in the sum of their squares: 1 / n for n equal frames."""
NOTABLE = 1e-3
"""Share of the voxels that no sound sweep loses."""
ROWS = 1024
"""Boxes worked on at a time, about."""


@dataclass(frozen=True)
class Defects:
    """Bad pixels of a sweep.

    Parameters
    ----------
    is_hot : ndarray, (canvas.size,) bool
    tile : ndarray, (canvas.size,) unsigned
        Tile of every pixel of the panels.
    is_shaded : ndarray, (n_images, n_tiles) bool
    """

    is_hot: Bools
    tile: NDArray[np.unsignedinteger[Any]]
    is_shaded: Bools

    @cached_property
    def shaded_before(self) -> NDArray[np.int32]:
        """Frames before each on which each tile was in a shadow, (n_images + 1, n_tiles)."""
        n_shaded = self.is_shaded.cumsum(axis=0, dtype=np.int32)
        return np.concatenate([np.zeros_like(n_shaded[:1]), n_shaded])

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.is_hot.any() or self.is_shaded.any())


@dataclass(frozen=True)
class BoxGeometry:
    """Where the boxes of a sweep lie, N rows in the order of the store.

    Parameters
    ----------
    box : (int, int, int)
        (layers, slow, fast).
    panel, per_layer : ndarray, (N,) int64
        Panel, and frames that a layer sums.
    corner : ndarray, (N, 3) int64
        (frame, slow, fast).
    terms : callable
        Gives for a slice of K rows the squared distance to the centroid of pixels (fast, slow)
        and frames, in standard deviations: ndarray, (K, W), (K, H), (K, n_frames).
    """

    box: tuple[int, int, int]
    panel: NDArray[np.int64]
    per_layer: NDArray[np.int64]
    corner: NDArray[np.int64]
    terms: Callable[[slice], Sequence[NDArray[np.float32]]]

    def along(self, rows: slice, terms: NDArray[np.float32]) -> tuple[Array, Array]:
        """Weight of a Gaussian spot in each layer, and its least squared distance, (K, D) each.

        ``terms``, (K, n_frames), are those of the rows' frames.
        """
        steps = np.arange(terms.shape[1])  # beyond the end of a box, a layer that it has not
        layer = np.minimum(steps // self.per_layer[rows, None], self.box[0])
        each = np.arange(len(layer))[:, None]
        weight = np.zeros((len(layer), self.box[0] + 1))
        least = np.full_like(weight, np.inf)
        np.add.at(weight, (each, layer), np.exp(-0.5 * terms))
        np.minimum.at(least, (each, layer), terms)
        return weight[:, :-1], least[:, :-1]

    def bad_voxels(self, defects: Defects, canvas: FrameCanvas, rows: slice) -> Bools:
        """Voxels of some boxes that hold a defect, (K, D, H, W)."""
        corner = self.corner[rows]
        pixel = canvas.windows(self.panel[rows], corner[:, 1], corner[:, 2], self.box[1:])
        edge = corner[:, :1] + np.arange(self.box[0] + 1) * self.per_layer[rows, None]
        edge = edge.clip(0, len(defects.is_shaded))[:, :, None, None]
        shaded = np.diff(defects.shaded_before[edge, defects.tile[pixel][:, None]], axis=1)
        return (shaded > 0) | defects.is_hot[pixel][:, None]


def hot_pixels(total: Array, squares: Array, count: Array) -> Bools:
    """Pixels of a panel that stand out of their surroundings, (slow, fast).

    Parameters
    ----------
    total, squares, count : ndarray, (slow, fast)
        Sums of background counts and of their squares, and the frames that they are from.
    """
    is_hot = np.zeros(total.shape, dtype=bool)
    index, around = standing_out(total, count, HOT_RATIO, LEAST_HOT)
    if not len(index):
        return is_hot
    is_seen = count > 0
    usual = np.median(count[is_seen]) if is_seen.any() else 0.0
    least = _least_around(np.where(is_seen, count, np.inf), index)
    kept = least >= HOT_SEEN * usual
    at, around = tuple(index[kept].T), around[kept]
    total, squares, count = total[at], squares[at], count[at]
    _, dispersion = _moments(total, squares, count)
    # the surroundings' own rate may be larger than what they counted
    expected = 2 * around * count
    upper = expected + 3 * np.sqrt(expected) + 3
    chance = pdtrc(np.maximum(total - 1.0, 0.0), upper)
    is_hot[at] = (chance < HOT_CHANCE) & (dispersion < HOT_DISPERSION)
    return is_hot


def flaring_pixels(total: Array, squares: Array, count: Array) -> Bools:
    """Pixels of a panel whose counts are from one to three frames, (slow, fast): no background.

    A crystal of salt or ice, a cosmic ray's cluster, a spot that nobody predicted: the frames that
    it spares are as good as others.

    Parameters
    ----------
    total, squares, count : ndarray, (slow, fast)
        As for :func:`hot_pixels`.
    """
    return flaring(total, squares, count, FLARE_SHARE, FLARE_DISPERSION)


def _least_around(values: Array, index: NDArray[np.int64]) -> Array:
    """Least of the 3 x 3 pixels around some (K, 2) that are on the panel, (K,)."""
    step = np.array([-1, 0, 1])
    last = np.array(values.shape) - 1
    slow, fast = ((index[:, k, None] + step).clip(0, last[k]) for k in range(2))
    return values[slow[:, :, None], fast[:, None, :]].min(axis=(1, 2))


def _moments(total: Array, squares: Array, count: Array) -> tuple[Array, Array]:
    """Mean, and variance over mean."""
    frames = np.maximum(count, 1)
    mean = total / frames
    return mean, (squares / frames - mean**2) / np.maximum(mean, 1e-9)


def remove_from_boxes(
    writer: ShoeboxWriter,
    first_row: int,
    boxes: BoxGeometry,
    defects: Defects,
    canvas: FrameCanvas,
    settings: MaskSettings,
) -> tuple[Array, NDArray[np.int64], int]:
    """Make the voxels with defects invalid in the file.

    Returns
    -------
    lost : ndarray, (N,)
        Weight of a Gaussian spot (1 at its centre) on voxels that were valid before.
    flags : ndarray, (N,) int64
        Bits of ``braggflux.integrator.types.Flag`` to add.
    n_gone : int
        Voxels that were valid before.
    """
    n = len(boxes.corner)
    lost, flags, n_gone = np.zeros(n), np.zeros(n, dtype=np.int64), 0
    step = max(ROWS // writer.chunk_rows, 1) * writer.chunk_rows  # no chunk is packed twice
    for first in range(0, n if defects else 0, step):
        rows = slice(first, min(first + step, n))
        bad = boxes.bad_voxels(defects, canvas, rows)
        if not bad.any():
            continue
        counts, mask = writer.read_boxes(first_row + rows.start, rows.stop - rows.start)
        gone = bad & (mask & MaskBit.VALID > 0)
        n_gone += int(np.count_nonzero(gone))
        fast, slow, frames = boxes.terms(rows)
        weight, least = boxes.along(rows, frames)
        lost[rows] = np.einsum(
            "kdhw,kd,kh,kw->k", gone, weight, np.exp(-0.5 * slow), np.exp(-0.5 * fast)
        )
        own = least[:, :, None, None] + slow[:, None, :, None] + fast[:, None, None, :]
        axes = (1, 2, 3)
        flags[rows] |= np.where((gone & (own <= settings.core**2)).any(axes), Flag.MASKED_CORE, 0)
        flags[rows] |= np.where((gone & (own <= settings.foreground**2)).any(axes), Flag.DEFECT, 0)
        mask[gone] &= ~np.uint8(MaskBit.VALID | MaskBit.BACKGROUND)
        counts[gone] = 0
        writer.write_boxes(first_row + rows.start, counts, mask)
    return lost, flags, n_gone


def report(defects: Defects, n_spikes: int, n_gone: int, n_valid: int, first_image: int) -> None:
    """Say what was found, and warn where it costs more than :data:`NOTABLE`.

    Parameters
    ----------
    defects : Defects
    n_spikes : int
        Counts that were taken for zingers, on all frames.
    n_gone, n_valid : int
        Voxels of the boxes that are left out, and that were recorded.
    first_image : int
        Number of the scan's first image.
    """
    logger.info(
        "%d zingers, %d hot pixels, %d of %d tiles and frames in a shadow",
        n_spikes,
        defects.is_hot.sum(),
        defects.is_shaded.sum(),
        defects.is_shaded.size,
    )
    if n_gone <= NOTABLE * n_valid:
        return
    images = np.flatnonzero(defects.is_shaded.any(axis=1)) + first_image
    where = f"; shadows on images {images[0]} to {images[-1]}" if len(images) else ""
    logger.warning(
        "%.1f %% of the recorded voxels are left out as zingers, hot pixels or shadows%s: look at "
        "the images there; where they show none, --set extraction.find_defects=false keeps all",
        100 * n_gone / n_valid,
        where,
    )
