"""What the pixel mask does not know, found over the whole scan: hot pixels and shadows.

Both are read off the statistic of the background between the spots. A pixel is hot if its mean is
many times that of its surroundings, of which it is allowed the third largest (rings and streaks
are never one pixel wide), and if it counts steadily, as no reflection does that nobody predicted.
A tile of pixels is shaded on a frame if its background is far below
what tile and frame let expect: a goniometer's arm, a beam stop's holder, ice on the loop's pin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import pdtr, pdtrc

from integrator.io.shoebox_store import ShoeboxWriter
from integrator.shoebox.canvas import FrameCanvas
from integrator.shoebox.mask import MaskBit, MaskSettings
from integrator.types import Flag

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

HOT_RATIO = 5.0
"""To the third largest mean of the 24 pixels around."""
HOT_CHANCE = 1e-9
HOT_DISPERSION = 3.0
"""Variance over mean of its counts, 1 for a steady rate."""
SHADED_RATIO = 0.6
"""Of the expected background; absorption in loop and crystal takes less away."""
SHADED_CHANCE = 1e-6
SHADED_COUNTS = 200.0
"""Expected in a tile, over as many frames as it takes (an eighth of the scan at most)."""
ROWS = 4096
"""Boxes worked on at a time."""


@dataclass(frozen=True)
class Defects:
    """Bad pixels of a sweep.

    Parameters
    ----------
    is_hot : ndarray, (canvas.size,) bool
    tile : ndarray, (canvas.size,) int32
        Tile of every pixel of the panels.
    is_shaded : ndarray, (n_images, n_tiles) bool
    """

    is_hot: Bools
    tile: NDArray[np.int32]
    is_shaded: Bools

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
    terms : sequence of ndarray, (N, W), (N, H), (N, n_frames)
        Squared distance to the centroid of pixels (fast, slow) and frames, in standard deviations.
    """

    box: tuple[int, int, int]
    panel: NDArray[np.int64]
    per_layer: NDArray[np.int64]
    corner: NDArray[np.int64]
    terms: Sequence[NDArray[np.float32]]

    def layers(self, rows: slice) -> NDArray[np.int64]:
        """Layer of every frame of the longest box, (K, n_frames); ``box[0]`` beyond the end."""
        steps = np.arange(self.terms[2].shape[1])
        return np.minimum(steps // self.per_layer[rows, None], self.box[0])

    def along(self, rows: slice) -> tuple[Array, Array]:
        """Weight of a Gaussian spot in each layer, and its least squared distance, (K, D) each."""
        layer, terms = self.layers(rows), self.terms[2][rows]
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
        n_images = len(defects.is_shaded)
        frame = corner[:, :1] + np.arange(self.terms[2].shape[1])
        layer = self.layers(rows)
        on_scan = (frame >= 0) & (frame < n_images) & (layer < self.box[0])
        shaded = defects.is_shaded[frame.clip(0, n_images - 1)] & on_scan[..., None]
        by_layer = np.zeros((len(corner), self.box[0] + 1, shaded.shape[2]), dtype=bool)
        np.logical_or.at(by_layer, (np.arange(len(corner))[:, None], layer), shaded)
        each = np.arange(len(corner))[:, None, None]
        bad = by_layer[:, :-1].swapaxes(1, 2)[each, defects.tile[pixel]]  # (K, H, W, D)
        return np.moveaxis(bad, 3, 1) | defects.is_hot[pixel][:, None]


def hot_pixels(total: Array, squares: Array, count: Array) -> Bools:
    """Pixels of a panel that stand out of their surroundings, (slow, fast).

    Parameters
    ----------
    total, squares, count : ndarray, (slow, fast)
        Sums of background counts and of their squares, and the frames that they are from.
    """
    frames = np.maximum(count, 1)
    mean = total / frames
    dispersion = (squares / frames - mean**2) / np.maximum(mean, 1e-9)
    ring = np.ones((5, 5), dtype=bool)
    ring[2, 2] = False
    around = ndimage.rank_filter(mean, -3, footprint=ring, mode="mirror")
    is_above = mean > HOT_RATIO * around
    chance = pdtrc(np.maximum(total - 1.0, 0.0), np.maximum(2 * around, 1e-3) * count)
    return is_above & (total > 0) & (chance < HOT_CHANCE) & (dispersion < HOT_DISPERSION)


def shaded_tiles(total: Array, count: Array) -> tuple[Bools, Array, Array]:
    """Frames on which tiles are in a shadow.

    Parameters
    ----------
    total, count : ndarray, (n_images, n_tiles)
        Background counts of each tile and frame, and the pixels that they are from.

    Returns
    -------
    is_shaded : ndarray, (n_images, n_tiles) bool
    level : ndarray, (n_tiles,)
        Background of a pixel where there is no shadow [counts].
    ratio : ndarray, (n_images,)
        Level of each frame, from tiles without a shadow.
    """
    is_shaded = np.zeros(total.shape, dtype=bool)
    for _ in range(6):
        seen = np.where(is_shaded, 0.0, count)
        kept = np.where(is_shaded, 0.0, total)
        level = _level(kept, seen)
        ratio = _ratio(kept.sum(1), seen @ level, 1.0)
        expected = count * level * ratio[:, None]
        width = _window(expected)
        s, e = (ndimage.uniform_filter1d(a, width, axis=0) * width for a in (total, expected))
        found = (s < SHADED_RATIO * e) & (pdtr(np.round(s), 0.8 * e) < SHADED_CHANCE)
        if np.array_equal(found, is_shaded):
            break
        is_shaded = found
    return is_shaded, level, ratio


def _ratio(a: Array, b: Array, otherwise: float) -> Array:
    return np.divide(a, b, out=np.full(np.shape(a), otherwise), where=b > 0)


def _level(total: Array, count: Array) -> Array:
    """Median over the scan of the background of each tile, (n_tiles,).

    Not the mean: the tails of reflections that linger near the rotation axis would raise it.
    """
    width = _window(count * _ratio(total.sum(0), count.sum(0), 0.0))
    pooled = [ndimage.uniform_filter1d(a, width, axis=0) for a in (total, count)]
    pooled[1][pooled[1] < 1e-6] = 0.0  # what running sums leave of nothing
    seen = (count > 0).any(axis=0)
    level = np.zeros(total.shape[1])
    level[seen] = np.nanmedian(_ratio(pooled[0], pooled[1], np.nan)[:, seen], axis=0)
    return level


def _window(expected: Array) -> int:
    """Frames whose expected counts in a tile suffice."""
    typical = np.median(expected[expected > 0]) if (expected > 0).any() else SHADED_COUNTS
    longest = max(len(expected) // 8, 1)
    return int(np.clip(np.ceil(SHADED_COUNTS / max(typical, 1e-9)), 1, longest))


def remove_from_boxes(
    writer: ShoeboxWriter,
    first_row: int,
    boxes: BoxGeometry,
    defects: Defects,
    canvas: FrameCanvas,
    settings: MaskSettings,
) -> tuple[Array, NDArray[np.int64]]:
    """Make the voxels with defects invalid in the file.

    Returns
    -------
    lost : ndarray, (N,)
        Weight of a Gaussian spot (1 at its centre) on voxels that were valid before.
    flags : ndarray, (N,) int64
        Bits of ``integrator.types.Flag`` to add.
    """
    n = len(boxes.corner)
    lost, flags = np.zeros(n), np.zeros(n, dtype=np.int64)
    for first in range(0, n, ROWS):
        rows = slice(first, min(first + ROWS, n))
        bad = boxes.bad_voxels(defects, canvas, rows)
        if not bad.any():
            continue
        counts, mask = writer.read_boxes(first_row + rows.start, rows.stop - rows.start)
        gone = bad & (mask & MaskBit.VALID > 0)
        weight, least = boxes.along(rows)
        fast, slow = (boxes.terms[axis][rows] for axis in (0, 1))
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
    return lost, flags
