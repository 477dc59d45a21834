"""Pixels of a sweep's background that stand out of those around."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.compiled import compiled

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@compiled
def standing_out(total: Array, count: Array, ratio: float, least: float) -> tuple[Index, Array]:
    """Pixels whose mean exceeds ``ratio`` times the third largest of the 24 around.

    Parameters
    ----------
    total, count : ndarray, (slow, fast)
        Counts of each pixel and the frames they are from. Beyond the edges the mean is mirrored
        about the outermost pixels.
    ratio : float
    least : float
        Pixels of fewer counts, of none at least, are not looked at.

    Returns
    -------
    index : ndarray, (K, 2)
        (slow, fast) of each.
    around : ndarray, (K,)
        Third largest mean around.
    """
    slow, fast = total.shape
    found = [(0, 0) for _ in range(0)]
    around = [0.0 for _ in range(0)]
    for y in range(slow):
        for x in range(fast):
            if total[y, x] < least or total[y, x] <= 0:
                continue
            own = total[y, x] / max(count[y, x], 1.0)
            largest, second, third, n_near = -1.0, -1.0, -1.0, 0
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    if dy == 0 and dx == 0:
                        continue
                    j, i = _mirrored(y + dy, slow), _mirrored(x + dx, fast)
                    value = total[j, i] / max(count[j, i], 1.0)
                    n_near += ratio * value >= own
                    if value > largest:
                        largest, second, third = value, largest, second
                    elif value > second:
                        second, third = value, second
                    elif value > third:
                        third = value
                if n_near >= 3:
                    break
            if n_near < 3:
                found.append((y, x))
                around.append(third)
    index = np.empty((len(found), 2), dtype=np.int64)
    for k in range(len(found)):
        index[k, 0], index[k, 1] = found[k]
    return index, np.array(around, dtype=np.float64)


@compiled
def flaring(
    total: Array, squares: Array, count: Array, share: float, dispersion: float
) -> NDArray[np.bool_]:
    """Pixels whose counts vary by more than ``dispersion``, variance over mean.

    Parameters
    ----------
    total, squares, count : ndarray, (slow, fast)
        Sums of counts and of their squares, and the frames that they are from.
    share : float
        Of the square of the sum that the sum of squares must exceed.
    dispersion : float
    """
    slow, fast = total.shape
    result = np.zeros(total.shape, dtype=np.bool_)
    for y in range(slow):
        for x in range(fast):
            if squares[y, x] <= share * (total[y, x] * total[y, x]):
                continue
            frames = max(count[y, x], 1.0)
            mean = total[y, x] / frames
            variance = squares[y, x] / frames - mean * mean
            result[y, x] = variance / max(mean, 1e-9) > dispersion
    return result


@compiled
def _mirrored(i: int, n: int) -> int:
    """Place of index ``i`` in a row of ``n`` pixels that is mirrored about its ends."""
    if n == 1:
        return 0
    period = 2 * (n - 1)
    i = abs(i) % period
    return min(i, period - i)
