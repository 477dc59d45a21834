"""Passes over the pixels of a frame on its canvas, panel by panel.

``base`` is the first pixel of a panel in the flat array, ``stride`` the length of its padded rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.compiled import compiled

BLOCK = 32
"""Words of eight bytes that are looked at together."""

Bools = NDArray[np.bool_]
Integers = NDArray[np.signedinteger[Any]]
Index = NDArray[np.int64]


@compiled
def load_panel(
    image: Integers, usable: Bools, out: Integers, base: int, stride: int, invalid: int
) -> None:
    """Copy an image to its place; ``invalid`` where it is negative or not usable."""
    nothing = out.dtype.type(invalid)
    for y in range(len(image)):
        row, good = image[y], usable[y]
        to = out[base + y * stride : base + y * stride + len(row)]
        for x in range(len(row)):
            to[x] = row[x] if good[x] & (row[x] >= 0) else nothing


@compiled
def add_background(
    counts: Integers,
    is_watched: Bools,
    place: tuple[int, int, int, int, int],
    total: Integers,
    excess: NDArray[np.float32],
    unseen: NDArray[np.unsignedinteger[Any]],
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
        or 1, so that only the first is touched by many. The first holds a tile's column too.
    tile_total, tile_unseen : ndarray, (n_tiles of the panel,)
    """
    base, stride, slow, fast, side = place
    words, per_word = counts.view(np.uint64), 8 // counts.itemsize
    notable = _words_with(~1, counts.itemsize)
    columns = (fast + side - 1) // side
    nothing = total.dtype.type(0)
    of_columns = np.zeros(fast, dtype=total.dtype)
    for y in range(slow):
        first = base + y * stride
        row, watched = counts[first : first + fast], is_watched[first : first + fast]
        sums = total[first : first + fast]
        for x in range(fast):
            n = max(total.dtype.type(row[x]) * total.dtype.type(watched[x]), nothing)
            sums[x] += n
            of_columns[x] += n
        for word in range(first // per_word, (first + fast + per_word - 1) // per_word):
            if words[word] & notable == 0:  # zeros and ones
                continue
            for i in range(word * per_word, (word + 1) * per_word):
                if is_watched[i]:
                    value = int(counts[i])
                    if value > 1:
                        excess[i] += value * (value - 1)
                    elif value < 0:
                        unseen[i] += 1
                        tile_unseen[(y // side) * columns + (i - first) // side] += 1
        if (y + 1) % side == 0 or y + 1 == slow:
            for x in range(fast):
                tile_total[(y // side) * columns + x // side] += of_columns[x]
                of_columns[x] = 0


@compiled
def _has_bits(words: NDArray[np.uint64], start: int, stop: int, bits: np.uint64) -> bool:
    """Whether any of some words, :data:`BLOCK` at most, has one of the bits."""
    found = np.uint64(0)
    if stop - start == BLOCK:  # a length that the compiler knows: vectors without a branch
        block = words[start:stop]
        for k in range(BLOCK):
            found |= block[k]
    else:
        for k in range(start, stop):
            found |= words[k]
    return (found & bits) != 0


@compiled
def _words_with(bits: int, itemsize: int) -> np.uint64:
    """Repeat the bits of an integer of so many bytes over a word of eight."""
    if itemsize == 2:
        return np.uint64(bits & 0xFFFF) * np.uint64(0x0001000100010001)
    return np.uint64(bits & 0xFFFFFFFF) * np.uint64(0x0000000100000001)


@compiled
def count_in_tiles(
    flags: Bools, place: tuple[int, int, int, int, int], of_tiles: NDArray[np.float64]
) -> None:
    """Add up the flags of one panel by tile.

    Parameters
    ----------
    flags : ndarray, (size,)
    place : (base, stride, slow, fast, side)
        As for :func:`add_background`.
    of_tiles : ndarray, (n_tiles of the panel,)
    """
    base, stride, slow, fast, side = place
    columns = (fast + side - 1) // side
    for y in range(slow):
        first = base + y * stride
        for column in range(columns):
            n = 0
            for x in range(column * side, min((column + 1) * side, fast)):
                n += flags[first + x]
            of_tiles[(y // side) * columns + column] += n


@compiled
def count_unseen(
    pixels: Index,
    panels: Index,
    unseen: NDArray[np.unsignedinteger[Any]],
    tile_unseen: NDArray[np.float64],
) -> None:
    """Count pixels (flat indices, each once) as unseen on a frame.

    Parameters
    ----------
    panels : ndarray, (n_panels, 5)
        (base, stride, side, columns of tiles, first tile) of each panel.
    """
    panel = 0
    for i in pixels:
        while panel + 1 < len(panels) and i >= panels[panel + 1, 0]:
            panel += 1
        while i < panels[panel, 0]:
            panel -= 1
        y, x = divmod(i - panels[panel, 0], panels[panel, 1])
        side = panels[panel, 2]
        unseen[i] += 1
        tile_unseen[panels[panel, 4] + (y // side) * panels[panel, 3] + x // side] += 1


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
    words, per_word = counts.view(np.uint64), 8 // counts.itemsize
    bits = 1
    while 2 * bits <= least:
        bits *= 2
    notable = _words_with(~(bits - 1), counts.itemsize)  # a larger count has one of these
    for y in range(slow):
        first, end = base + y * stride, base + y * stride + fast
        end_word = (end + per_word - 1) // per_word
        for start in range(first // per_word, end_word, BLOCK):
            stop = min(start + BLOCK, end_word)
            if not _has_bits(words, start, stop, notable):
                continue
            for word in range(start, stop):
                if words[word] & notable == 0:
                    continue
                for i in range(max(word * per_word, first), min((word + 1) * per_word, end)):
                    if counts[i] >= least and _is_candidate(
                        counts, i, ring, ratios, left_out, min_share
                    ):
                        found.append(i)
    return np.array(found, dtype=np.int64)


@compiled
def _is_candidate(
    counts: Integers,
    i: int,
    ring: Index,
    ratios: NDArray[np.float64],
    left_out: Index,
    min_share: float,
) -> bool:
    """Whether a count is above the mean that some set of its neighbours allows."""
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
            return True
    return False
