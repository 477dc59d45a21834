"""Background between the spots: one image per sweep and one factor per frame.

A later model takes ``image(pixel) * ratio(frame)`` as its prior mean. The image is the mean over
the frames on which no spot is predicted at the pixel. The ratio compares a frame's background
pixels with those of other frames at the same places, tile by tile, so that one pass suffices, and
no bright place decides it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.io.shoebox_store import BackgroundField
from braggflux.integrator.shoebox.canvas import FrameCanvas
from braggflux.integrator.shoebox.defects import Defects, flaring_pixels, hot_pixels
from braggflux.integrator.shoebox.shadows import (
    TOUCHING,
    divide,
    levels_and_ratio,
    shaded_tiles,
    tiles_of_panels,
)
from braggflux.integrator.shoebox.sweep import Sweep

MAX_TILES = 1024
"""Over all panels: bounds the memory of the per-frame sums."""
STRUCTURE_PX = 7
"""Side of the square over which structure finer than the smoothing is looked for."""


class BackgroundAccumulator:
    """Sums of counts outside of predicted spots.

    Parameters
    ----------
    canvas : FrameCanvas
        Holds the frame when :meth:`add` is called.
    n_images : int
    is_watched : sequence of ndarray, (slow, fast) bool
        Pixels of each panel where all spots are known: beyond the resolution limit, spots that
        nobody predicted would pass for background.
    """

    def __init__(
        self, canvas: FrameCanvas, n_images: int, is_watched: Sequence[NDArray[np.bool_]]
    ) -> None:
        self._canvas = canvas
        self._is_watched = np.zeros(canvas.size, dtype=bool)
        for panel, watched in enumerate(is_watched):
            canvas.panel_view(self._is_watched, panel)[...] = watched
        self._total = np.zeros(canvas.size, dtype=np.int64)
        self._squares = np.zeros(canvas.size, dtype=np.int64)
        self._count = np.zeros(canvas.size, dtype=np.int32)
        self._side = _tile_side(canvas)
        self._grids = [(-(-a // self._side), -(-b // self._side)) for a, b in canvas.panel_shapes]
        n_tiles = sum(rows * columns for rows, columns in self._grids)
        self._lit = np.ones(n_tiles)  # share of the background that shadows let through
        self._frame_total = np.zeros((n_images, n_tiles))
        self._frame_count = np.zeros((n_images, n_tiles))

    def add(self, frame: int, is_dark: NDArray[np.bool_]) -> None:
        """Add a frame's pixels where ``is_dark`` (size of the canvas) and recorded."""
        counts = self._canvas.counts
        is_used = is_dark & self._is_watched
        is_used &= counts >= 0
        values = counts * is_used
        self._total += values
        self._squares += values.astype(np.int64) ** 2
        self._count += is_used
        self._frame_total[frame] = self._tile_sums(values)
        self._frame_count[frame] = self._tile_sums(is_used)

    def _tile_sums(self, flat: NDArray[Any]) -> NDArray[np.float64]:
        """Sum an array of the canvas' size over square tiles of the panels, (n_tiles,)."""
        sums = []
        for panel in range(len(self._canvas.panel_shapes)):
            view = self._canvas.panel_view(flat, panel)
            rows, columns = (np.arange(0, n, self._side) for n in view.shape)
            partial = np.add.reduceat(view, rows, axis=0, dtype=np.float64)
            sums.append(np.add.reduceat(partial, columns, axis=1).ravel())
        return np.concatenate(sums)

    def find_defects(self, is_hot: NDArray[np.bool_]) -> Defects:
        """Hot pixels and shadows of the frames added; :meth:`result` is free of them from now on.

        ``is_hot``, (canvas.size,), are hot pixels that are known already.
        """
        canvas = self._canvas
        is_hot, is_flaring = is_hot.copy(), np.zeros_like(is_hot)
        for panel in range(len(canvas.panel_shapes)):
            sums = (self._total, self._squares, self._count)
            views = [canvas.panel_view(a, panel).astype(float) for a in sums]
            canvas.panel_view(is_hot, panel)[...] |= hot_pixels(*views)
            canvas.panel_view(is_flaring, panel)[...] = flaring_pixels(*views)
        self._total[is_hot | is_flaring] = 0
        self._count[is_hot | is_flaring] = 0
        is_shaded, level, ratio = shaded_tiles(self._frame_total, self._frame_count, self._grids)
        is_shaded = self._with_margin(is_shaded)
        # what the tile's pixels saw counts as so many frames without a shadow
        normal = self._frame_count * ratio[:, None]
        in_shadow = self._frame_total / np.where(level > 0, level, 1.0)
        lit = np.where(is_shaded, in_shadow, normal).sum(0)
        all_frames = normal.sum(0)
        self._lit = divide(lit, all_frames, 1.0)
        self._lit[(level <= 0) | ~is_shaded.any(0)] = 1.0
        self._frame_total[is_shaded] = 0.0
        self._frame_count[is_shaded] = 0.0
        return Defects(is_hot, self._tile_map(), is_shaded)

    def _tile_map(self) -> NDArray[np.int32]:
        """Tile of every pixel of the panels, (canvas.size,); 0 in the padding."""
        tile, first = np.zeros(self._canvas.size, dtype=np.int32), 0
        for panel, (slow, fast) in enumerate(self._canvas.panel_shapes):
            rows, columns = np.arange(slow) // self._side, np.arange(fast) // self._side
            grid = first + rows[:, None] * (columns[-1] + 1) + columns
            self._canvas.panel_view(tile, panel)[...] = grid
            first = int(grid.max()) + 1
        return tile

    def _with_margin(self, is_shaded: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Add the tiles and frames beside: the shadow's edge lies in one of them."""
        result = is_shaded.copy()
        for part, shape in tiles_of_panels(self._grids):
            grid = is_shaded[:, part].reshape(-1, *shape)
            result[:, part] = ndimage.binary_dilation(grid, TOUCHING).reshape(len(grid), -1)
        return result

    def result(self) -> BackgroundField:
        """Return the statistic of all frames added."""
        level, ratio = levels_and_ratio(self._frame_total, self._frame_count)
        expected = self._frame_count @ level
        if (expected * ratio).any():
            ratio = ratio / np.average(ratio, weights=expected)
        panels = range(len(self._canvas.panel_shapes))
        frames = self._count * self._lit[self._tile_map()]
        return BackgroundField(
            [self._canvas.panel_view(self._total, p).astype(np.float32) for p in panels],
            [self._canvas.panel_view(frames, p).astype(np.float32) for p in panels],
            ratio,
        )


def pixel_inv_d(experiment: Experiment, panel: int) -> NDArray[np.float64]:
    """1/d at the pixel centres of a panel, (slow, fast) [1/A].

    ``1/d^2 = 2 |s0|^2 (1 - cos 2theta)``, cosine and distance being polynomials in x and y.
    """
    geometry, s0 = experiment.panels[panel], experiment.beam.s0
    x = (np.arange(geometry.image_size[0]) + 0.5) * geometry.pixel_size[0]
    y = (np.arange(geometry.image_size[1]) + 0.5)[:, None] * geometry.pixel_size[1]
    gram = geometry.d_matrix.T @ geometry.d_matrix
    along = x * (geometry.fast_axis @ s0) + y * (geometry.slow_axis @ s0) + geometry.origin @ s0
    distance2 = x * x + y * y + 2 * (x * gram[0, 2] + y * gram[1, 2]) + gram[2, 2]
    cos = along / np.sqrt(distance2 * (s0 @ s0))
    return np.sqrt(2 * (s0 @ s0) * (1 - cos).clip(0))


def where_spots_are_known(sweep: Sweep) -> list[NDArray[np.bool_]]:
    """Pixels inside of the resolution limit of all known spots, per panel."""
    known = sweep.prediction if sweep.neighbours is None else sweep.neighbours
    d_min = float(torch.cat([known.d, sweep.prediction.d]).min())
    panels = range(len(sweep.experiment.panels))
    return [pixel_inv_d(sweep.experiment, panel) < 0.97 / d_min for panel in panels]


def mean_image(
    total: NDArray[np.float32], count: NDArray[np.float32], smoothing_px: float = 2.0
) -> NDArray[np.float32]:
    """Background of a panel [counts/pixel], (slow, fast).

    A Gaussian average of counts over one of frames: pixels weigh by how often they were seen, and
    gaps are filled from their surroundings; 0 where nothing is near. Where pixels differ from it
    by more than counting noise (ice rings, the shadow of a wire), they keep that part of the
    difference which is not noise: ``1 - 1/chi^2``, the mean being taken over the pixels around
    (James & Stein's shrinkage, 1961, with a local variance). A pixel far above all but two of the
    eight around it is no structure, and cut to their level.
    """
    frames = np.maximum(count, 1)
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    around = ndimage.rank_filter(total / frames, -3, footprint=ring, mode="mirror")
    total = np.minimum(total, 2.0 * around * frames + 5.0)
    counts = ndimage.gaussian_filter(total.astype(np.float64), smoothing_px, mode="constant")
    frames = ndimage.gaussian_filter(count.astype(np.float64), smoothing_px, mode="constant")
    smooth = np.divide(counts, frames, out=np.zeros_like(counts), where=frames > 1e-9)
    expected = smooth * count
    is_seen = expected > 0
    chi2 = np.divide((total - expected) ** 2, expected, out=np.zeros_like(smooth), where=is_seen)
    chi2, seen = (ndimage.uniform_filter(a, STRUCTURE_PX) for a in (chi2, 1.0 * is_seen))
    kept = 1 - 1 / np.maximum(chi2 / np.maximum(seen, 1e-9), 1.0)
    own = np.divide(total, count, out=smooth.copy(), where=is_seen)
    return np.where(is_seen, smooth + kept * (own - smooth), smooth).astype(np.float32)


def _tile_side(canvas: FrameCanvas) -> int:
    """Choose the size of tiles [pixels] so that there are about :data:`MAX_TILES`."""
    area = sum(slow * fast for slow, fast in canvas.panel_shapes)
    return max(16, math.ceil(math.sqrt(area / MAX_TILES)))
