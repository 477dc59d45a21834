"""Mean image of the background, smoothed in bands of rows: no copy of a large panel is made."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.compiled import compiled

Image = NDArray[np.float32]
Array = NDArray[np.float64]


@compiled
def cut_to_surroundings(total: Image, count: Image, first: int, end: int) -> Image:
    """Give counts of some rows; a pixel far above its surroundings is cut to their level.

    That is twice the third largest mean of the eight pixels around, and five counts. Beyond the
    edges the image is mirrored about the outermost pixels.

    Parameters
    ----------
    total, count : ndarray, (slow, fast)
        Counts of each pixel and the frames they are from.
    first, end : int
        Rows.
    """
    slow, fast = total.shape
    result = total[first:end].copy()
    one, two, five = np.float32(1), np.float32(2), np.float32(5)
    for y in range(first, end):
        for x in range(fast):
            own = total[y, x]
            if own <= five:
                continue
            frames = max(count[y, x], one)
            largest, second, third, n_near = -one, -one, -one, 0
            for k in range(9):
                if k == 4:
                    continue
                j, i = _mirrored(y + k // 3 - 1, slow), _mirrored(x + k % 3 - 1, fast)
                mean = total[j, i] / max(count[j, i], one)
                n_near += two * mean * frames + five >= own
                if n_near >= 3:
                    break
                if mean > largest:
                    largest, second, third = mean, largest, second
                elif mean > second:
                    second, third = mean, second
                elif mean > third:
                    third = mean
            if n_near < 3:
                result[y - first, x] = two * third * frames + five
    return result


@compiled
def gaussian_average(image: Image, start: int, first: int, end: int, weights: Array) -> Array:
    """Rows ``first`` to ``end`` of a Gaussian average, (end - first, fast).

    Parameters
    ----------
    image : ndarray, (rows, fast)
        Rows from ``start`` on; what lies beyond them and beyond its columns is zero.
    weights : ndarray, (reach + 1,)
        Of a pixel, and of those at each distance on either side.
    """
    rows, fast = image.shape
    reach = len(weights) - 1
    result = np.empty((end - first, fast))
    line = np.zeros(fast + 2 * reach)  # averaged along slow
    inner = line[reach : reach + fast]
    for y in range(first - start, end - start):
        for x in range(fast):
            inner[x] = image[y, x] * weights[0]
        for d in range(reach, 0, -1):
            has_before, has_after = y >= d, y + d < rows
            weight = weights[d]
            if has_before and has_after:
                before, after = image[y - d], image[y + d]
                for x in range(fast):
                    inner[x] += (np.float64(before[x]) + np.float64(after[x])) * weight
            elif has_before or has_after:
                only = image[y - d] if has_before else image[y + d]
                for x in range(fast):
                    inner[x] += only[x] * weight
        to = result[y - first + start]
        for x in range(fast):
            to[x] = inner[x] * weights[0]
        for d in range(reach, 0, -1):
            before, after = line[reach - d : reach - d + fast], line[reach + d : reach + d + fast]
            weight = weights[d]
            for x in range(fast):
                to[x] += (before[x] + after[x]) * weight
    return result


@compiled
def keep_structure(
    total: Image, count: Image, smooth: Array, first: int, end: int, reach: int
) -> Image:
    """Rows ``first`` to ``end``: the smooth image, with what differs from it by more than noise.

    Parameters
    ----------
    total, count, smooth : ndarray, (rows, fast)
        Counts, the frames they are from, and smooth mean.
    first, end : int
        Of the rows given; the others are their surroundings. At the ends of the rows given, and
        of the columns, the surroundings are mirrored about the edge.
    reach : int
        Of the square over which the variance is compared with that of counting, on either side.

    Returns
    -------
    ndarray, (end - first, fast)
    """
    rows, fast = total.shape
    result = np.empty((end - first, fast), dtype=np.float32)
    chi2, seen = np.zeros((rows, fast)), np.zeros((rows, fast))
    for y in range(rows):
        for x in range(fast):
            expected = smooth[y, x] * count[y, x]
            if expected > 0:
                chi2[y, x] = (total[y, x] - expected) ** 2 / expected
                seen[y, x] = 1.0
    side = 2 * reach + 1
    line = np.zeros((2, fast + 2 * reach))  # sums along slow, mirrored beyond the columns
    for y in range(first, end):
        line[:] = 0.0
        for d in range(-reach, reach + 1):
            j = _reflected(y + d, rows)
            for x in range(fast):
                line[0, reach + x] += chi2[j, x]
                line[1, reach + x] += seen[j, x]
        for d in range(reach):
            line[:, d] = line[:, reach + _reflected(d - reach, fast)]
            line[:, reach + fast + d] = line[:, reach + _reflected(fast + d, fast)]
        for x in range(fast):
            value, mean = smooth[y, x], smooth[y, x]
            if seen[y, x]:
                of_chi2, of_seen = 0.0, 0.0
                for d in range(side):
                    of_chi2 += line[0, x + d]
                    of_seen += line[1, x + d]
                ratio = max(of_chi2 / of_seen, 1.0)
                own = np.float64(total[y, x] / count[y, x])
                value = mean + (1 - 1 / ratio) * (own - mean)
            result[y - first, x] = value
    return result


@compiled
def _mirrored(i: int, n: int) -> int:
    """Place of index ``i``, at most one outside, in ``n`` pixels mirrored about the outermost."""
    if n == 1:
        return 0
    return 1 if i < 0 else n - 2 if i >= n else i


@compiled
def _reflected(i: int, n: int) -> int:
    """Place of index ``i`` in a row of ``n`` pixels mirrored about its edges."""
    i = i % (2 * n)
    return min(i, 2 * n - 1 - i)
