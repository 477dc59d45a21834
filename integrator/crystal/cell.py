"""Resolution of reflections, vectorised.

``inv_d2 = 1 / d^2 = h^T G* h`` with ``G*`` the reciprocal metric tensor (International Tables
vol. B, 1.1.2). ``d`` is in Angstrom everywhere; ``stol2 = (sin(theta) / lambda)^2 = inv_d2 / 4``.
"""

from __future__ import annotations

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def reciprocal_metric(cell: gemmi.UnitCell) -> Array:
    """Reciprocal metric tensor.

    Parameters
    ----------
    cell : gemmi.UnitCell
        [A, degrees]

    Returns
    -------
    Array, (3, 3)
        ``G*[i, j] = a*_i . a*_j`` [1/A^2].
    """
    fractionalization = np.asarray(cell.frac.mat.tolist(), dtype=np.float64)  # rows: a*, b*, c*
    return fractionalization @ fractionalization.T


def inv_d2(hkl: ArrayLike, cell: gemmi.UnitCell) -> Array:
    """``1 / d^2`` from the unit cell.

    Parameters
    ----------
    hkl : array_like, (..., 3)
        Miller indices (fractional ones are allowed).
    cell : gemmi.UnitCell

    Returns
    -------
    Array, (...)
        [1/A^2]; 0 for the origin of reciprocal space.
    """
    index = np.asarray(hkl, dtype=np.float64)
    return np.einsum("...i,ij,...j->...", index, reciprocal_metric(cell), index)


def d_spacing(hkl: ArrayLike, cell: gemmi.UnitCell) -> Array:
    """Resolution of reflections.

    Parameters
    ----------
    hkl : array_like, (..., 3)
    cell : gemmi.UnitCell

    Returns
    -------
    Array, (...)
        [A]; infinite for (0, 0, 0).
    """
    with np.errstate(divide="ignore"):
        return 1.0 / np.sqrt(inv_d2(hkl, cell))
