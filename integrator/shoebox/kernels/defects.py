"""Pixels of a sweep's background that stand out of those around."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.compiled import compiled

Array = NDArray[np.float64]


@compiled
def third_largest_around(mean: Array, ratio: float) -> Array:
    """Third largest of the 24 pixels around, for those that exceed ``ratio`` times that.

    Parameters
    ----------
    mean : ndarray, (slow, fast)
        Not negative. Beyond its edges it is mirrored about the outermost pixels.
    ratio : float

    Returns
    -------
    ndarray, (slow, fast)
        -1 where the pixel does not exceed it.
    """
    slow, fast = mean.shape
    result = np.full(mean.shape, -1.0)
    for y in range(slow):
        for x in range(fast):
            own = mean[y, x]
            if own <= 0:
                continue
            largest, second, third, n_near = -1.0, -1.0, -1.0, 0
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    if dy == 0 and dx == 0:
                        continue
                    value = mean[_mirrored(y + dy, slow), _mirrored(x + dx, fast)]
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
                result[y, x] = third
    return result


@compiled
def _mirrored(i: int, n: int) -> int:
    """Place of index ``i`` in a row of ``n`` pixels that is mirrored about its ends."""
    if n == 1:
        return 0
    period = 2 * (n - 1)
    i = abs(i) % period
    return min(i, period - i)
