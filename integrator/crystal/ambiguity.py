"""Indexing ambiguity: rotations of the lattice that are none of the crystal.

A still that shows only the lattice can be indexed in as many ways as the point group of the
lattice has cosets of the point group of the crystal (merohedry; within a tolerance,
pseudo-merohedry). With H the rotations of the lattice and G those of the crystal, the alternatives
are the cosets R G: after ``h' = h R`` it is the same to merge h' or any ``h' g``.
"""

from __future__ import annotations

from dataclasses import dataclass

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.symmetry import rotations

IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class IndexingOperators:
    """Ways to index one lattice; the first leaves everything as it is.

    Parameters
    ----------
    matrices : ndarray, (A, 3, 3) int32
        R of ``h' = h R``.
    names : tuple of str
        Indices after the operator in terms of those before, like ``k,h,-l``.
    is_symmetric : ndarray, (A,) bool
        The crystal's symmetry axes stay where they are, so that all images together could be
        indexed this way as well.
    """

    matrices: IntArray
    names: tuple[str, ...]
    is_symmetric: NDArray[np.bool_]

    def __len__(self) -> int:
        """Count the alternatives, A."""
        return len(self.names)

    def after(self, number: int, space_group: gemmi.SpaceGroup) -> NDArray[np.int64]:
        """Alternative that each one becomes when operator ``number`` follows, (A,)."""
        group = _proper(space_group)
        key = {g.tobytes(): a for a, m in enumerate(self.matrices) for g in (m @ group)}
        return np.array([key[(m @ self.matrices[number]).tobytes()] for m in self.matrices])


def indexing_operators(
    cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup, tolerance: float
) -> IndexingOperators:
    """Operators that an indexing program cannot tell from the identity.

    Parameters
    ----------
    cell : gemmi.UnitCell
    space_group : gemmi.SpaceGroup
    tolerance : float
        Largest obliquity of a two-fold axis of the lattice [deg] (Le Page, 1982, *J. Appl.
        Cryst.* 15, 255), as gemmi finds the symmetry of lattices.
    """
    lattice = gemmi.find_lattice_symmetry(cell, space_group.centring_type(), tolerance)
    turns = np.array([op.rot for op in lattice.sym_ops], dtype=np.int32) // gemmi.Op.DEN
    group = _proper(space_group)
    identity = np.eye(3, dtype=np.int32)
    cosets = {frozenset(g.tobytes() for g in identity @ group): identity}
    for turn in sorted(turns, key=_plainness):
        cosets.setdefault(frozenset(g.tobytes() for g in turn @ group), turn)
    matrices = np.stack(list(cosets.values()))
    own = {g.tobytes() for g in group}
    inverse = np.rint(np.linalg.inv(matrices)).astype(np.int32)
    return IndexingOperators(
        matrices,
        tuple(name_of(m) for m in matrices),
        np.array(
            [
                {g.tobytes() for g in back @ group @ m} == own
                for back, m in zip(inverse, matrices, strict=True)
            ]
        ),
    )


def name_of(matrix: IntArray) -> str:
    """Write ``h' = h R`` out, like ``k,h,-l``."""
    op = gemmi.Op()
    op.rot = (np.asarray(matrix) * gemmi.Op.DEN).tolist()
    return op.as_hkl().triplet()


def _proper(space_group: gemmi.SpaceGroup) -> IntArray:
    """Rotations of the Laue group without inversion, (n, 3, 3)."""
    turns = rotations(space_group)
    turns = turns * np.rint(np.linalg.det(turns)).astype(np.int32)[:, None, None]
    return np.unique(turns, axis=0)


def _plainness(matrix: IntArray) -> tuple[int, int, str]:
    """Prefer names like k,h,-l among equivalent operators."""
    name = name_of(matrix)
    return len(name), name.count("-"), name
