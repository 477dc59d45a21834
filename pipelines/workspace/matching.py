"""The same observation in two reflection tables: equal Miller index, nearest position."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Array = NDArray[np.float64]

#: Farther apart than this, two entries are not one observation [pixels, frames]. Crossings of one
#: reflection lie much farther apart, predictions of two programs much nearer.
MAX_DISTANCE = 5.0
#: Makes unequal indices or sweeps farther apart than any position.
_KEY_SPACING = 1.0e5


def match_observations(
    miller_a: NDArray[Any],
    xyz_a: Array,
    miller_b: NDArray[Any],
    xyz_b: Array,
    *,
    sweeps: tuple[NDArray[Any] | None, NDArray[Any] | None] = (None, None),
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair rows of two tables.

    Parameters
    ----------
    miller_a, miller_b : (N, 3), (M, 3) int
        Miller indices as observed.
    xyz_a, xyz_b : (N, 3), (M, 3)
        Position (fast, slow, frame) [px, px, frames].
    sweeps : pair of (N,) and (M,) int, optional
        Sweep of each row, when there are several.

    Returns
    -------
    rows_a, rows_b : (P,) int
        Pairs; each row of ``b`` is used once at most (by the nearest row of ``a``).
    """
    if len(miller_a) == 0 or len(miller_b) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    points_a = _points(miller_a, xyz_a, sweeps[0])
    points_b = _points(miller_b, xyz_b, sweeps[1])
    distance, nearest = cKDTree(points_b).query(points_a, distance_upper_bound=MAX_DISTANCE)
    rows_a = np.flatnonzero(np.isfinite(distance))
    order = rows_a[np.argsort(distance[rows_a], kind="stable")]
    _, first = np.unique(nearest[order], return_index=True)
    rows_a = np.sort(order[first])
    return rows_a, nearest[rows_a]


def _points(miller: NDArray[Any], xyz: Array, sweep: NDArray[Any] | None) -> Array:
    keys = [np.asarray(miller, float)]
    if sweep is not None:
        keys.append(np.asarray(sweep, float)[:, None])
    return np.hstack([_KEY_SPACING * key for key in keys] + [np.asarray(xyz, float)])
