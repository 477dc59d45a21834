"""Shadows that move with the scan: a goniometer's arm, a cryostream's nozzle, a failed module.

A shadow takes light away from neighbouring tiles of pixels; all else adds to it: tails of strong
spots, ice, salt, cosmic rays. So a tile is compared with its own background on other frames, and
with no more than its neighbours have, and what is brighter than usual decides nothing. With

    E = level * sum over the window of (pixels * ratio of the frame),

and the counts S of the window, the hypothesis to refuse is that a tile gets :data:`LIT` of its
light or more, times a Gamma factor of the tile's own measured variance ``s^2`` over the scan:
``S ~ NegativeBinomial(mean LIT * E, shape 1 / s^2)``. It is refused where the chance of so few
counts is below :data:`FALSE_ALARM` over the number of tiles and frames (Bonferroni): under that
hypothesis one sweep in a hundred has a tile refused by accident. Only refused tiles that touch
on the panel, :data:`FEWEST_TILES` of them at least, are a shadow; from there it grows to those
beside that are doubtful by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

LIT = 0.6
"""Share of the background that reaches a tile without a shadow at least: absorption in loop and
crystal takes less away."""
FALSE_ALARM = 0.01
"""Chance that any tile of a sweep without a shadow is refused."""
FEWEST_TILES = 3
"""Of a shadow."""
DOUBTFUL = 1e-3
"""Chance of the counts of a fully lit tile below which a shadow grows to it."""
WINDOW_COUNTS = 200.0
"""Expected in a tile, over as many frames as it takes (an eighth of the scan at most)."""
LEAST_SPREAD = 0.05
"""Of a tile's background over the scan, beside counting noise."""
FEWEST_GROUPS = 9
GROUP_COUNTS = 100.0
"""Expected on a frame in each group of tiles, of which the median is the frame's ratio."""
AROUND = 2
"""Neighbours on each side, whose median no tile exceeds."""
MOST_ROUNDS = 6
TOUCHING = np.ones((3, 3, 3), dtype=bool)


def shaded_tiles(
    total: Array, count: Array, grids: Sequence[tuple[int, int]]
) -> tuple[Bools, Array, Array]:
    """Frames on which tiles are in a shadow.

    Parameters
    ----------
    total, count : ndarray, (n_images, n_tiles)
        Background counts of each tile and frame, and the pixels that they are from.
    grids : sequence of (int, int)
        Rows and columns of tiles of each panel; the tiles are in this order.

    Returns
    -------
    is_shaded : ndarray, (n_images, n_tiles) bool
    level : ndarray, (n_tiles,)
        Background of a pixel where there is no shadow [counts].
    ratio : ndarray, (n_images,)
        Level of each frame, from tiles without a shadow.
    """
    is_shaded = np.zeros(total.shape, dtype=bool)
    for _ in range(MOST_ROUNDS):
        lit = [np.where(is_shaded, 0.0, a) for a in (total, count)]
        level, ratio = levels_and_ratio(*lit)
        width = _window(lit[1] * level)
        spread = _levels(lit[0], lit[1] * ratio[:, None], width)[1]
        shape = 1 / _at_least_typical(spread, level) ** 2
        counts = running_sum(total, width)
        expected = running_sum(count * ratio[:, None], width) * _base(level, grids)
        refused, doubtful = _tested(counts, expected, shape)
        found = _connected(refused, doubtful, grids)
        if np.array_equal(found, is_shaded):
            break
        is_shaded = found
    return is_shaded, level, ratio


def levels_and_ratio(total: Array, count: Array) -> tuple[Array, Array]:
    """Typical background of every tile, and level of every frame, each robust.

    Parameters
    ----------
    total, count : ndarray, (n_images, n_tiles)
        As for :func:`shaded_tiles`.

    Returns
    -------
    level : ndarray, (n_tiles,)
        [counts/pixel], 0 where nothing was seen.
    ratio : ndarray, (n_images,)
        1 where nothing was seen.
    """
    width = _window(count * divide(total.sum(0), count.sum(0), 0.0))
    ratio = np.ones(len(total))
    for _ in range(2):
        level, _ = _levels(total, count * ratio[:, None], width)
        ratio = _frame_ratio(total, count * level)
    return level, ratio


def _frame_ratio(total: Array, expected: Array) -> Array:
    """Background of each frame over what is expected, (n_images,); 1 where nothing is.

    The median of groups of neighbouring tiles: neither a bright place, however bright, nor a
    shadow decides it.
    """
    n_tiles = total.shape[1]
    counts = np.median(expected.sum(1))
    n_groups = int(np.clip(counts / GROUP_COUNTS, min(FEWEST_GROUPS, n_tiles), n_tiles))
    start = np.arange(n_groups) * n_tiles // n_groups
    sums, means = (np.add.reduceat(a, start, axis=1) for a in (total, expected))
    median = _quantiles(divide(sums, means, np.nan).T, (0.5,))[0]
    return np.where(means.any(1), median, 1.0)


def _tested(counts: Array, expected: Array, shape: Array) -> tuple[Bools, Bools]:
    """Tiles and frames that cannot be lit, and those that hardly can, (n_images, n_tiles) each."""
    refused, doubtful = np.zeros((2, *counts.shape), dtype=bool)
    n_tests = np.count_nonzero(expected)
    dark = np.nonzero(counts < LIT * expected)
    few, many, own = counts[dark], expected[dark], shape[dark[1]]
    refused[dark] = chance(few, LIT * many, own) < FALSE_ALARM / max(n_tests, 1)
    doubtful[dark] = chance(few, many, own) < DOUBTFUL
    return refused, doubtful


def chance(counts: Array, mean: Array, shape: Array) -> Array:
    """Chance of ``counts`` or fewer under a negative binomial law of a positive mean."""
    return betainc(shape, np.round(counts) + 1, shape / (shape + mean))


def running_sum(values: Array, width: int) -> Array:
    """Sum over ``width`` frames around each, fewer at the ends of the scan, (n_images, ...)."""
    sums = np.cumsum(np.concatenate([np.zeros_like(values[:1]), values]), axis=0)
    first = np.arange(len(values)) - width // 2
    return sums[(first + width).clip(0, len(values))] - sums[first.clip(0)]


def divide(a: Array, b: Array, otherwise: float) -> Array:
    """Give ``a / b``, and ``otherwise`` where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), otherwise), where=b > 0)


def _window(expected: Array) -> int:
    """Frames whose expected counts in a tile suffice."""
    typical = np.median(expected[expected > 0]) if (expected > 0).any() else WINDOW_COUNTS
    longest = max(len(expected) // 8, 1)
    return int(np.clip(np.ceil(WINDOW_COUNTS / max(typical, 1e-9)), 1, longest))


def _levels(total: Array, exposure: Array, width: int) -> tuple[Array, Array]:
    """Median over the scan of each tile's background, and its relative spread, (n_tiles,) each.

    Not the mean: spots that nobody predicted would raise it. The spread is that of the brighter
    frames, which no shadow has made, less counting noise.
    """
    counts, pixels = (running_sum(a, width) for a in (total, exposure))
    pixels[pixels < 1e-6] = 0.0  # what running sums leave of nothing
    seen = np.where(pixels > 0, pixels, np.nan)
    level, bright = _quantiles(counts / seen, (0.5, 0.84))
    noise = divide(np.ones_like(level), _quantiles(seen, (0.5,))[0] * level, 0.0)
    variance = (divide(bright, level, 1.0) - 1) ** 2 - noise
    return level, np.sqrt(np.maximum(variance, 0.0))


def _quantiles(values: Array, which: Sequence[float]) -> list[Array]:
    """Quantiles along the first axis without those that are not numbers; 0 where none is."""
    ordered = np.sort(values, axis=0)
    n = np.isfinite(ordered).sum(axis=0)
    result = []
    for q in which:
        place = q * np.maximum(n - 1, 0)
        low = place.astype(int)
        a, b = (
            np.take_along_axis(ordered, np.minimum(k, np.maximum(n - 1, 0))[None], axis=0)[0]
            for k in (low, low + 1)
        )
        result.append(np.where(n > 0, a + (place - low) * (b - a), 0.0))
    return result


def _at_least_typical(spread: Array, level: Array) -> Array:
    """Spread of each tile, no smaller than most have: few windows may happen to agree."""
    typical = np.median(spread[level > 0]) if (level > 0).any() else 0.0
    return np.maximum(spread, max(typical, LEAST_SPREAD))


def _base(level: Array, grids: Sequence[tuple[int, int]]) -> Array:
    """Level of each tile, of its neighbours' median at most, (n_tiles,).

    More than that is not background, and may end without a shadow.
    """
    base = np.empty_like(level)
    for part, shape in tiles_of_panels(grids):
        seen = np.where(level[part] > 0, level[part], np.nan).reshape(shape)
        wide = np.pad(seen, AROUND, constant_values=np.nan)
        side = 2 * AROUND + 1
        around = np.lib.stride_tricks.sliding_window_view(wide, (side, side)).reshape(-1, side**2)
        base[part] = np.minimum(level[part], _quantiles(around.T, (0.5,))[0])
    return base


def _connected(refused: Bools, doubtful: Bools, grids: Sequence[tuple[int, int]]) -> Bools:
    """Refused tiles that touch enough others, grown to those that are doubtful."""
    found = np.zeros_like(refused)
    if not refused.any():  # most scans do without loading what follows
        return found
    from scipy import ndimage

    for part, shape in tiles_of_panels(grids):
        core = refused[:, part].reshape(-1, *shape)
        labels, n = ndimage.label(core, TOUCHING)
        frame, tile = np.nonzero(refused[:, part])
        members = np.unique(np.stack([labels.reshape(len(labels), -1)[frame, tile], tile]), axis=1)
        is_large = np.bincount(members[0], minlength=n + 1) >= FEWEST_TILES
        allowed = core | doubtful[:, part].reshape(core.shape)
        grown = ndimage.binary_propagation(is_large[labels] & core, TOUCHING, mask=allowed)
        found[:, part] = grown.reshape(len(core), -1)
    return found


def tiles_of_panels(grids: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Places of each panel's tiles, and their rows and columns."""
    first = 0
    for rows, columns in grids:
        yield slice(first, first + rows * columns), (rows, columns)
        first += rows * columns
