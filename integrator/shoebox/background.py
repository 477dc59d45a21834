"""Background between the spots: one image per sweep and one factor per frame.

A later model takes ``image(pixel) * ratio(frame)`` as its prior mean. The image is the mean over
the frames on which no spot is predicted at the pixel. The ratio compares a frame's background
pixels with those of other frames at the same places, tile by tile, so that one pass suffices, and
no bright place decides it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.io.shoebox_store import BackgroundField
from braggflux.integrator.shoebox.canvas import Counts, FrameCanvas
from braggflux.integrator.shoebox.defects import (
    HOT_REACH,
    Defects,
    flaring_pixels,
    hot_pixels,
)
from braggflux.integrator.shoebox.kernels.frames import (
    add_background,
    count_in_tiles,
    count_unseen,
)
from braggflux.integrator.shoebox.kernels.smoothing import (
    cut_to_surroundings,
    gaussian_average,
    keep_structure,
)
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
BAND_ROWS, INV_D_ROWS = 256, 16
"""Rows of a panel worked on at a time: no copy of a large panel is made, and caches hold them."""
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
    highest : float
        Largest count there can be on a frame.
    """

    def __init__(
        self,
        canvas: FrameCanvas,
        n_images: int,
        is_watched: Sequence[NDArray[np.bool_]],
        highest: float,
    ) -> None:
        self._canvas = canvas
        self._is_watched = np.zeros(canvas.size, dtype=bool)
        for panel, watched in enumerate(is_watched):
            canvas.panel_view(self._is_watched, panel)[...] = watched
        self._n_frames = 0
        self._side = _tile_side(canvas)
        # sums of counts n and of n (n - 1), and frames on which a pixel was not seen
        fits = highest * max(n_images, self._side) <= np.iinfo(np.int32).max
        self._total: Counts = np.zeros(canvas.size, dtype=np.int32 if fits else np.int64)
        self._excess = np.zeros(canvas.size, dtype=np.float32)
        few = n_images <= np.iinfo(np.uint16).max
        self._unseen: NDArray[np.unsignedinteger[Any]] = np.zeros(
            canvas.size, dtype=np.uint16 if few else np.uint32
        )
        self._grids = [(-(-a // self._side), -(-b // self._side)) for a, b in canvas.panel_shapes]
        n_tiles = sum(rows * columns for rows, columns in self._grids)
        self._lit = np.ones(n_tiles)  # share of the background that shadows let through
        self._frame_total = np.zeros((n_images, n_tiles))
        self._frame_count = np.zeros((n_images, n_tiles))
        parts = [part for part, _ in tiles_of_panels(self._grids)]
        self._places = [
            (int(base), int(stride), *shape, self._side)
            for base, stride, shape in zip(
                canvas.base, canvas.stride, canvas.panel_shapes, strict=True
            )
        ]
        self._panels = np.array(
            [
                (base, stride, self._side, grid[1], part.start)
                for (base, stride, *_), grid, part in zip(
                    self._places, self._grids, parts, strict=True
                )
            ]
        )
        self._watched_pixels = np.zeros(n_tiles)
        for place, part in zip(self._places, parts, strict=True):
            count_in_tiles(self._is_watched, place, self._watched_pixels[part])

    def add(self, frame: int, hidden: NDArray[np.int64]) -> None:
        """Add a frame's pixels where recorded, but for ``hidden`` ones (flat indices, unique)."""
        counts, watched = self._canvas.counts, self._is_watched
        sums = self._total, self._excess, self._unseen
        of_tiles = self._frame_total[frame], self._frame_count[frame]
        parts = (part for part, _ in tiles_of_panels(self._grids))
        hidden = hidden[watched[hidden]]
        watched[hidden] = False
        for place, part in zip(self._places, parts, strict=True):
            add_background(counts, watched, place, *sums, *(a[part] for a in of_tiles))
        watched[hidden] = True
        count_unseen(hidden, self._panels, self._unseen, of_tiles[1])
        np.subtract(self._watched_pixels, of_tiles[1], out=of_tiles[1])
        self._n_frames += 1

    def sums(self, frames: range) -> dict[str, NDArray[Any]]:
        """Return the sums of the frames added, all from a range; for :meth:`add_sums`."""
        rows = slice(frames.start, frames.stop)
        return {
            "total": self._total,
            "excess": self._excess,
            "unseen": self._unseen,
            "frame_total": self._frame_total[rows],
            "frame_count": self._frame_count[rows],
        }

    def add_sums(self, frames: range, sums: Mapping[str, NDArray[Any]]) -> None:
        """Add the sums of a range of frames.

        Whole numbers, and so the same whatever the ranges; those of squares are rounded from
        2^24 on.
        """
        rows = slice(frames.start, frames.stop)
        self._total += sums["total"]
        self._excess += sums["excess"]
        self._unseen += sums["unseen"]
        self._frame_total[rows], self._frame_count[rows] = sums["frame_total"], sums["frame_count"]
        self._n_frames += len(frames)

    def _sums(self, panel: int, rows: slice) -> tuple[NDArray[np.float64], ...]:
        """Give sums of counts and of their squares of some rows, and the frames they are from."""
        view = self._canvas.panel_view
        total, excess, unseen, watched = (
            view(a, panel)[rows]
            for a in (self._total, self._excess, self._unseen, self._is_watched)
        )
        count = (self._n_frames - unseen) * watched
        photons = total.astype(float)
        return photons, photons + excess, count.astype(float)

    def find_defects(self, is_hot: NDArray[np.bool_]) -> Defects:
        """Hot pixels and shadows of the frames added; :meth:`result` is free of them from now on.

        ``is_hot``, (canvas.size,), are hot pixels that are known already.
        """
        canvas = self._canvas
        is_hot, is_flaring = is_hot.copy(), np.zeros_like(is_hot)
        for panel, (slow, _) in enumerate(canvas.panel_shapes):
            hot, flaring = (canvas.panel_view(a, panel) for a in (is_hot, is_flaring))
            for first in range(0, slow, BAND_ROWS):
                # a band with the rows around that its pixels are compared with
                start, end = max(first - HOT_REACH, 0), min(first + BAND_ROWS, slow)
                sums = self._sums(panel, slice(start, end + HOT_REACH))
                own = slice(first - start, end - start)
                hot[first:end] |= hot_pixels(*sums)[own]
                flaring[first:end] = flaring_pixels(*sums)[own]
        bad = np.flatnonzero(is_hot | is_flaring)
        self._total[bad] = 0
        self._is_watched[bad] = False
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

    def _tile_map(self) -> NDArray[np.unsignedinteger[Any]]:
        """Tile of every pixel of the panels, (canvas.size,); 0 in the padding."""
        tile, first = np.zeros(self._canvas.size, np.min_scalar_type(len(self._lit))), 0
        for panel, (slow, fast) in enumerate(self._canvas.panel_shapes):
            rows, columns = np.arange(slow) // self._side, np.arange(fast) // self._side
            grid = first + rows[:, None] * (columns[-1] + 1) + columns
            self._canvas.panel_view(tile, panel)[...] = grid
            first = int(grid.max()) + 1
        return tile

    def _with_margin(self, is_shaded: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Add the tiles and frames beside: the shadow's edge lies in one of them."""
        result = is_shaded.copy()
        if not result.any():  # most scans do without loading what follows
            return result
        from scipy import ndimage

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
        images = [self._images(panel) for panel in range(len(self._canvas.panel_shapes))]
        return BackgroundField([i[0] for i in images], [i[1] for i in images], ratio)

    def _images(self, panel: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Give the counts of a panel's pixels, and their frames less what shadows took."""
        (slow, fast), (part, grid) = (
            self._canvas.panel_shapes[panel],
            list(tiles_of_panels(self._grids))[panel],
        )
        total, count = np.empty((2, slow, fast), dtype=np.float32)
        for tile_row, lit in enumerate(self._lit[part].reshape(grid)):
            rows = slice(tile_row * self._side, (tile_row + 1) * self._side)
            total[rows], _, seen = self._sums(panel, rows)
            count[rows] = seen * np.repeat(lit, self._side)[:fast]
        return total, count


def within_resolution(
    experiment: Experiment, panel: int, d_min: float, rows: slice = slice(None)
) -> NDArray[np.bool_]:
    """Whether d at the pixel centres of a panel, or of some of its rows, is larger than ``d_min``.

    ``1/d^2 = 2 |s0|^2 (1 - cos 2theta)``, cosine and distance being polynomials in x and y.

    Returns
    -------
    ndarray, (slow, fast) bool
    """
    geometry, s0 = experiment.panels[panel], experiment.beam.s0
    x = (np.arange(geometry.image_size[0]) + 0.5) * geometry.pixel_size[0]
    y = (np.arange(geometry.image_size[1])[rows, None] + 0.5) * geometry.pixel_size[1]
    gram = geometry.d_matrix.T @ geometry.d_matrix
    along = x * (geometry.fast_axis @ s0) + (y * (geometry.slow_axis @ s0) + geometry.origin @ s0)
    # the least cosine goes into the polynomial: few passes over a large panel
    least = 1 - 1 / (2 * (s0 @ s0) * d_min**2)
    of_slow = y * y + 2 * y * gram[1, 2] + gram[2, 2]
    distance = (x * x + 2 * x * gram[0, 2]) * (s0 @ s0) + of_slow * (s0 @ s0)
    np.sqrt(distance, out=distance)
    distance *= least
    return along > distance


def where_spots_are_known(sweep: Sweep) -> list[NDArray[np.bool_]]:
    """Usable pixels inside of the resolution limit of all known spots, per panel."""
    known = sweep.prediction if sweep.neighbours is None else sweep.neighbours
    d_min = float(torch.cat([known.d, sweep.prediction.d]).min())
    images = []
    for panel, usable in enumerate(sweep.frames.static_mask()):
        image = np.empty(usable.shape, dtype=bool)
        for first in range(0, len(image), INV_D_ROWS):
            rows = slice(first, first + INV_D_ROWS)
            image[rows] = within_resolution(sweep.experiment, panel, d_min / 0.97, rows)
        image &= usable  # the others would be counted as unseen on every frame
        images.append(image)
    return images


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
    weights = _gaussian_weights(smoothing_px)
    slow, reach = len(total), STRUCTURE_PX // 2
    image = np.empty_like(total)
    for start in range(0, slow, BAND_ROWS):
        stop = min(start + BAND_ROWS, slow)
        # the rows whose smooth image is compared with, and those that are averaged in it
        first, end = max(start - reach, 0), min(stop + reach, slow)
        before, after = max(first - len(weights) + 1, 0), min(end + len(weights) - 1, slow)
        cut = cut_to_surroundings(total, count, before, after)
        counts = gaussian_average(cut, before, first, end, weights)
        frames = gaussian_average(count[before:after], before, first, end, weights)
        smooth = np.divide(counts, frames, out=np.zeros_like(counts), where=frames > 1e-9)
        own = cut[first - before : end - before], count[first:end]
        image[start:stop] = keep_structure(*own, smooth, start - first, stop - first, reach)
    return image


def _gaussian_weights(sigma: float) -> NDArray[np.float64]:
    """Weights of a pixel and of those up to four standard deviations beside it."""
    reach = int(4.0 * sigma + 0.5)
    weights = np.exp(-0.5 / (sigma * sigma) * np.arange(-reach, reach + 1) ** 2)
    return (weights / weights.sum())[reach:]


def _tile_side(canvas: FrameCanvas) -> int:
    """Choose the size of tiles [pixels] so that there are about :data:`MAX_TILES`."""
    area = sum(slow * fast for slow, fast in canvas.panel_shapes)
    return max(16, math.ceil(math.sqrt(area / MAX_TILES)))
