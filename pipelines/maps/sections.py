"""A map around a point, along the orthogonal axes."""

from __future__ import annotations

from typing import Any

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray


def cube_around(
    grid: gemmi.FloatGrid, fractional: ArrayLike, n_points: int, step: float
) -> NDArray[Any]:
    """Interpolate a map on a cube with a point in the middle, tricubically.

    Parameters
    ----------
    grid : gemmi.FloatGrid
    fractional : array_like, (3,)
        The point.
    n_points : int
        Along an edge; odd.
    step : float
        Distance of neighbours [A].

    Returns
    -------
    ndarray, (n_points, n_points, n_points) float32
        Along x, y, z.
    """
    point = gemmi.Fractional(*np.asarray(fractional, float))
    centre = np.array(grid.unit_cell.orthogonalize(point).tolist())
    transform = gemmi.Transform()
    transform.mat.fromlist((np.eye(3) * step).tolist())
    transform.vec.fromlist((centre - step * (n_points // 2)).tolist())
    cube = np.zeros((n_points,) * 3, np.float32)
    grid.interpolate_values(cube, transform, order=3)
    return cube
