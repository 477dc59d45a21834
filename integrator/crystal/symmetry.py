"""Space-group symmetry of Miller indices, vectorised over reflections.

Indices transform as row vectors, ``h' = h R`` (International Tables vol. B, 1.4.2), so that
``F(h R) = F(h) exp(-2 pi i h . t)`` for the operation ``(R, t)``. The asymmetric unit is that of
CCP4, as gemmi defines it for every setting, and ``isym`` is the ``M/ISYM`` of an unmerged MTZ
file: ``2 i + 1`` when operation ``i`` (gemmi's order) brings the index into the asymmetric unit,
``2 i + 2`` when it brings the index's Friedel mate there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int32]

# The twelve wedges of reciprocal space of the CCP4 asymmetric units. The key is gemmi's own
# description, so that gemmi decides which one a space group has.
_WEDGES: dict[str, Callable[[IntArray, IntArray, IntArray], NDArray[np.bool_]]] = {
    "l>0 or (l=0 and (h>0 or (h=0 and k>=0)))": lambda h, k, l: (
        (l > 0) | ((l == 0) & ((h > 0) | ((h == 0) & (k >= 0))))
    ),
    "k>=0 and (l>0 or (l=0 and h>=0))": lambda h, k, l: (
        (k >= 0) & ((l > 0) | ((l == 0) & (h >= 0)))
    ),
    "h>=0 and k>=0 and l>=0": lambda h, k, l: (h >= 0) & (k >= 0) & (l >= 0),
    "l>=0 and ((h>=0 and k>0) or (h=0 and k=0))": lambda h, k, l: (
        (l >= 0) & (((h >= 0) & (k > 0)) | ((h == 0) & (k == 0)))
    ),
    "h>=k and k>=0 and l>=0": lambda h, k, l: (h >= k) & (k >= 0) & (l >= 0),
    "(h>=0 and k>0) or (h=0 and k=0 and l>=0)": lambda h, k, l: (
        ((h >= 0) & (k > 0)) | ((h == 0) & (k == 0) & (l >= 0))
    ),
    "h>=k and k>=0 and (k>0 or l>=0)": lambda h, k, l: (h >= k) & (k >= 0) & ((k > 0) | (l >= 0)),
    "h>=k and k>=0 and (h>k or l>=0)": lambda h, k, l: (h >= k) & (k >= 0) & ((h > k) | (l >= 0)),
    "h>=0 and ((l>=h and k>h) or (l=h and k=h))": lambda h, k, l: (
        (h >= 0) & (((l >= h) & (k > h)) | ((l == h) & (k == h)))
    ),
    "k>=l and l>=h and h>=0": lambda h, k, l: (k >= l) & (l >= h) & (h >= 0),
}


class AsuMapping(NamedTuple):
    """Where reflections go in the asymmetric unit.

    Parameters
    ----------
    miller_index : ndarray, (N, 3) int32
        Index in the asymmetric unit.
    isym : ndarray, (N,) int32
        ``M/ISYM`` of MTZ: odd for I(+), even for I(-).
    friedel_sign : ndarray, (N,) int8
        +1 when a rotation alone brings the index into the asymmetric unit, -1 when the inversion
        is needed too. A centric index can be brought there both ways and has +1.
    """

    miller_index: IntArray
    isym: IntArray
    friedel_sign: NDArray[np.int8]


def as_miller_index(hkl: ArrayLike) -> IntArray:
    """Coerce to a contiguous (N, 3) int32 array.

    Raises
    ------
    ValueError
        When the shape is not (N, 3) or a value is not an integer.
    """
    given = np.asarray(hkl)
    if given.ndim != 2 or given.shape[1] != 3:
        raise ValueError(f"Miller indices must have shape (N, 3), not {given.shape}")
    index = np.ascontiguousarray(given, dtype=np.int32)
    if not np.array_equal(index, given):
        raise ValueError("Miller indices must be integers")
    return index


def rotations(space_group: gemmi.SpaceGroup) -> IntArray:
    """Rotation parts of the symmetry operations, without lattice centring.

    Returns
    -------
    ndarray, (n, 3, 3) int32
        In gemmi's order (identity first): ``h' = h @ R``.
    """
    operations = space_group.operations().sym_ops
    return np.array([op.rot for op in operations], dtype=np.int32) // gemmi.Op.DEN


def is_in_asu(hkl: ArrayLike, space_group: gemmi.SpaceGroup) -> NDArray[np.bool_]:
    """Whether indices lie in the CCP4 asymmetric unit of the space group's setting, (N,)."""
    index = as_miller_index(hkl)
    if not space_group.is_reference_setting():
        # only signs and order matter, so that gemmi's integer multiple (DEN) may stay
        index = index @ np.array(space_group.basisop.rot, dtype=np.int32)
    wedge = _WEDGES[gemmi.ReciprocalAsu(space_group).condition_str()]
    return wedge(*index.T)


def to_asu(hkl: ArrayLike, space_group: gemmi.SpaceGroup) -> AsuMapping:
    """Map observed indices to the asymmetric unit.

    Parameters
    ----------
    hkl : array_like, (N, 3) int
        As observed.
    space_group : gemmi.SpaceGroup

    Returns
    -------
    AsuMapping
    """
    index = as_miller_index(hkl)
    mapped = np.empty_like(index)
    isym = np.zeros(len(index), dtype=np.int32)
    pending = np.arange(len(index))
    for i, rotation in enumerate(rotations(space_group)):
        for sign in (1, -1):
            candidate = index[pending] @ (sign * rotation)
            inside = is_in_asu(candidate, space_group)
            mapped[pending[inside]] = candidate[inside]
            isym[pending[inside]] = 2 * i + (1 if sign > 0 else 2)
            pending = pending[~inside]
            if not len(pending):
                return AsuMapping(mapped, isym, _sign(isym))
    raise ValueError(f"{len(pending)} indices have no image in the asymmetric unit")


def from_asu(miller_index: ArrayLike, isym: ArrayLike, space_group: gemmi.SpaceGroup) -> IntArray:
    """Undo :func:`to_asu`.

    Parameters
    ----------
    miller_index : array_like, (N, 3) int
        Index in the asymmetric unit.
    isym : array_like, (N,) int
        ``M/ISYM``.
    space_group : gemmi.SpaceGroup

    Returns
    -------
    ndarray, (N, 3) int32
        Index as observed.
    """
    index, number = as_miller_index(miller_index), np.asarray(isym)
    inverse = np.rint(np.linalg.inv(rotations(space_group))).astype(np.int32)
    observed = np.einsum("ni,nij->nj", index, inverse[(number - 1) // 2])
    return (observed * _sign(number)[:, None]).astype(np.int32)


def is_centric(hkl: ArrayLike, space_group: gemmi.SpaceGroup) -> NDArray[np.bool_]:
    """Whether the Friedel mate is also a rotation's image, (N,); all true when centrosymmetric."""
    return space_group.operations().centric_flag_array(as_miller_index(hkl))


def is_absent(hkl: ArrayLike, space_group: gemmi.SpaceGroup) -> NDArray[np.bool_]:
    """Whether reflections are systematically absent (centring, screws and glides), (N,)."""
    return space_group.operations().systematic_absences(as_miller_index(hkl))


def epsilon(
    hkl: ArrayLike, space_group: gemmi.SpaceGroup, *, centring: bool = False
) -> NDArray[np.int32]:
    """Statistical factor of Wilson's distribution: ``<F^2> = epsilon * Sigma``.

    Parameters
    ----------
    hkl : array_like, (N, 3) int
    space_group : gemmi.SpaceGroup
    centring : bool
        Without (the default), the number of point-group rotations that leave the index as it is.
        With, that number times the number of lattice points per cell (1 for P, 2 for A B C I,
        3 for R in hexagonal axes, 4 for F). The factor is common to all reflections of a
        centred lattice, so that it only rescales ``Sigma``.

    Returns
    -------
    ndarray, (N,) int32
    """
    operations = space_group.operations()
    index = as_miller_index(hkl)
    if centring:
        return operations.epsilon_factor_array(index)
    return operations.epsilon_factor_without_centering_array(index)


def _sign(isym: NDArray[np.integer[Any]]) -> NDArray[np.int8]:
    """+1 for odd and -1 for even ``M/ISYM``."""
    return np.where(np.asarray(isym) % 2 == 1, 1, -1).astype(np.int8)
