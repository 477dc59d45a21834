"""Passes over the pixels of a frame on its canvas, panel by panel.

``base`` is the first pixel of a panel in the flat array, ``stride`` the length of its padded rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.compiled import compiled

Bools = NDArray[np.bool_]
Integers = NDArray[np.signedinteger[Any]]
Index = NDArray[np.int64]


@compiled
def load_panel(
    image: Integers, usable: Bools, out: Integers, base: int, stride: int, invalid: int
) -> None:
    """Copy an image to its place; ``invalid`` where it is negative or not usable."""
    slow, fast = image.shape
    for y in range(slow):
        first = base + y * stride
        for x in range(fast):
            value = image[y, x]
            out[first + x] = value if usable[y, x] and value >= 0 else invalid


@compiled
def add_background(
    counts: Integers,
    is_watched: Bools,
    place: tuple[int, int, int, int, int],
    total: Index,
    excess: Index,
    unseen: NDArray[np.int32],
    tile_total: NDArray[np.float64],
    tile_unseen: NDArray[np.float64],
) -> None:
    """Add the watched pixels of one panel to the sums; those without a count to the unseen.

    Parameters
    ----------
    counts, is_watched : ndarray, (size,)
    place : (base, stride, slow, fast, side)
        Of the panel; side of its tiles.
    total, excess, unseen : ndarray, (size,)
        Sums of counts n, of n (n - 1), and number of frames without a count: most counts are 0
        or 1, so that only the first is touched by many.
    tile_total, tile_unseen : ndarray, (n_tiles of the panel,)
    """
    base, stride, slow, fast, side = place
    columns = (fast + side - 1) // side
    for y in range(slow):
        row = base + y * stride
        for column in range(columns):
            tile = (y // side) * columns + column
            sum_here, unseen_here = 0, 0
            for i in range(row + column * side, row + min((column + 1) * side, fast)):
                n = int(counts[i])
                if n != 0 and is_watched[i]:
                    if n > 0:
                        sum_here += n
                        total[i] += n
                        if n > 1:
                            excess[i] += n * (n - 1)
                    else:
                        unseen_here += 1
                        unseen[i] += 1
            tile_total[tile] += sum_here
            tile_unseen[tile] += unseen_here


@compiled
def take_background_back(
    pixels: Index,
    counts: Integers,
    is_watched: Bools,
    panels: Index,
    total: Index,
    excess: Index,
    unseen: NDArray[np.int32],
    tile_total: NDArray[np.float64],
    tile_unseen: NDArray[np.float64],
) -> None:
    """Undo :func:`add_background` for different pixels: they count as unseen on this frame.

    Parameters
    ----------
    pixels : ndarray, (K,)
        Flat indices, each once.
    panels : ndarray, (n_panels, 5)
        (base, stride, side, columns of tiles, first tile) of each panel.
    """
    panel = 0
    for k in range(len(pixels)):
        i = pixels[k]
        n = int(counts[i])
        if not is_watched[i] or n < 0:
            continue
        while panel + 1 < len(panels) and i >= panels[panel + 1, 0]:
            panel += 1
        while i < panels[panel, 0]:
            panel -= 1
        y, x = divmod(i - panels[panel, 0], panels[panel, 1])
        side = panels[panel, 2]
        tile = panels[panel, 4] + (y // side) * panels[panel, 3] + x // side
        total[i] -= n
        excess[i] -= n * (n - 1)
        unseen[i] += 1
        tile_total[tile] -= n
        tile_unseen[tile] += 1


@compiled
def sharp_candidates(
    counts: Integers,
    place: tuple[int, int, int, int],
    least: int,
    ratios: NDArray[np.float64],
    left_out: Index,
    min_share: float,
) -> Index:
    """Pixels whose count is above the mean that their neighbours allow, flat indices.

    Parameters
    ----------
    counts : ndarray, (size,)
    place : (base, stride, slow, fast)
        Of the panel.
    least : int
        Smaller counts are not looked at.
    ratios : ndarray, (S,)
        Of the allowed mean to what the neighbours hold, for each set of them.
    left_out : ndarray, (S, 2)
        Neighbours, of eight in a ring, that a set does not have; -1 for none.
    min_share : float
        Of a set's neighbours that must have a count.
    """
    base, stride, slow, fast = place
    found = [0 for _ in range(0)]
    ring = np.array(
        [-stride - 1, -stride, -stride + 1, -1, 1, stride - 1, stride, stride + 1], dtype=np.int64
    )
    for y in range(slow):
        row = base + y * stride
        for i in range(row, row + fast):
            if counts[i] < least:
                continue
            for k in range(len(ratios)):
                n, members, held = 0, 0, 0
                for j in range(8):
                    if j == left_out[k, 0] or j == left_out[k, 1]:
                        continue
                    members += 1
                    value = int(counts[i + ring[j]])
                    if value >= 0:
                        n += 1
                        held += value
                total = held * members / max(n, 1)
                upper = total + 3.0 * np.sqrt(total) + 3.0
                if n >= min_share * members and counts[i] > 0.999 * ratios[k] * upper:
                    found.append(i)
                    break
    return np.array(found, dtype=np.int64)
