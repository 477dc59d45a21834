"""Photons of frames whose stored values are counts: one pass, in the type that holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.compiled import compiled
from braggflux.integrator.io.hdf5.photons import NO_COUNT

Stored = NDArray[np.unsignedinteger[Any]]
Signed = NDArray[np.signedinteger[Any]]


def photons_of_stored(
    stored: Stored, usable: NDArray[np.bool_], last: int, *, in_place: bool = False
) -> tuple[Signed, int]:
    """Give the counts of a panel, and how many of its usable pixels are overloaded.

    Parameters
    ----------
    stored : ndarray, (slow, fast) uint16 or uint32
        The two highest values of the type, and what 31 bits do not hold, are no counts.
    usable : ndarray, (slow, fast) bool
    last : int
        Highest trusted count.
    in_place : bool
        Write over ``stored``.

    Returns
    -------
    photons : ndarray, (slow, fast)
        int16 if the counts of the frame fit, else int32; NO_COUNT where there is none.
    n_overloads : int
    """
    bits = 8 * stored.dtype.itemsize
    signed = stored.view(f"i{stored.dtype.itemsize}")
    # as signed numbers, codes are -2 and -1; of 32 bits, all that is negative is no count
    limit, lowest = (2**16 - 3, -2) if bits == 16 else (2**31 - 1, -(2**31))
    last = min(last, limit)
    photons = signed if in_place else np.empty_like(signed)
    highest, n_overloads = _take_counts(signed, usable, last, limit, lowest, photons, in_place)
    if highest > np.iinfo(signed.dtype).max:
        photons = np.where(stored <= last, stored, NO_COUNT).astype(np.int32)
    return photons, n_overloads


@compiled
def _take_counts(
    signed: Signed,
    usable: NDArray[np.bool_],
    last: int,
    limit: int,
    lowest: int,
    photons: Signed,
    in_place: bool,
) -> tuple[int, int]:
    """Fill ``photons``; return the highest count, and how many usable pixels exceed ``last``.

    A row where no number is below ``lowest`` or above ``last`` has no overload, and no count that
    the signed type does not hold.
    """
    highest, n_overloads = 0, 0
    period = 2**16 if limit < 2**16 else 2**32
    for y in range(signed.shape[0]):
        row, out = signed[y], photons[y]
        smallest, largest = row[0], row[0]
        for x in range(len(row)):
            smallest = min(smallest, row[x])
            largest = max(largest, row[x])
        if smallest >= lowest and largest <= last:
            highest = max(highest, int(largest))
            if not in_place or smallest < -1:  # else they are the photons as they stand
                for x in range(len(row)):
                    out[x] = max(row[x], photons.dtype.type(-1))
            continue
        for x in range(len(row)):
            value = int(row[x])
            value += period if value < 0 else 0
            is_count = value <= last
            out[x] = value if is_count else -1
            highest = max(highest, value if is_count else 0)
            n_overloads += usable[y, x] and last < value <= limit
    return highest, n_overloads
