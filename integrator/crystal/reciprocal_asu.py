"""The table of unique reflections that structure factors are learned for."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal import symmetry
from braggflux.integrator.crystal.cell import d_spacing
from braggflux.integrator.errors import UserError

#: Queries of at least so many indices are answered from a table of the whole sphere,
MANY_INDICES = 10_000
#: if it has at most so many entries (64 MB).
LARGEST_SPHERE = 1 << 24
#: Unique reflections that no table is made of: each takes some hundred bytes.
TOO_MANY = 100_000_000


class ReciprocalAsu:
    """Unique reflections to a resolution limit, without systematic absences.

    With ``anomalous``, an acentric reflection has two rows, F(+) and F(-); a centric one always
    has a single row.

    Parameters
    ----------
    cell : gemmi.UnitCell
        [A, degrees]
    space_group : gemmi.SpaceGroup
    d_min : float
        High-resolution limit [A].
    anomalous : bool
        Keep Friedel mates apart.

    Attributes
    ----------
    miller_index : ndarray, (R, 3) int32
        Index of the structure factor: in the CCP4 asymmetric unit for F(+) and its negative for
        F(-). Sorted by h, k, l within each half, the F(+) half first.
    friedel_sign : ndarray, (R,) int8
        +1 or -1; ``miller_index * friedel_sign[:, None]`` is in the asymmetric unit.
    is_centric : ndarray, (R,) bool
    epsilon : ndarray, (R,) int32
        Without lattice centring; see :func:`braggflux.integrator.crystal.symmetry.epsilon`.
    d : ndarray, (R,) float64
        [A]
    friedel_mate : ndarray, (R,) int64
        Row of the Bijvoet mate; a row's own number where the mates share it (centric
        reflections, or not ``anomalous``).

    Raises
    ------
    UserError
        When no reflection is inside ``d_min``, or far too many are, or ``d_min`` is not positive.
    """

    def __init__(
        self,
        cell: gemmi.UnitCell,
        space_group: gemmi.SpaceGroup,
        d_min: float,
        anomalous: bool,
    ) -> None:
        if not d_min > 0.0:
            raise UserError(f"d_min is {d_min}; it must be a positive number of Angstroms")
        _require_few(cell, space_group, d_min)
        unique = gemmi.make_miller_array(cell, space_group, d_min)
        if not len(unique):
            raise UserError(
                f"no reflection of the cell {cell.parameters} is inside d_min = {d_min} A; "
                "choose a smaller d_min"
            )
        self.cell, self.space_group = cell, space_group
        self.d_min, self.anomalous = d_min, anomalous
        self._limit = int(np.abs(unique).max())
        unique = unique[np.argsort(self._key(unique))]
        self._sorted_key = self._key(unique)
        self._minus_row = np.arange(len(unique))
        centric = symmetry.is_centric(unique, space_group)
        if anomalous:
            split = np.flatnonzero(~centric)
            self._minus_row[split] = len(unique) + np.arange(len(split))
        else:
            split = np.empty(0, dtype=np.int64)
        plus_row = np.concatenate([np.arange(len(unique)), split])

        self.friedel_sign = np.ones(len(plus_row), dtype=np.int8)
        self.friedel_sign[len(unique) :] = -1
        self.miller_index = (unique[plus_row] * self.friedel_sign[:, None]).astype(np.int32)
        self.is_centric = centric[plus_row]
        self.epsilon = symmetry.epsilon(unique, space_group)[plus_row]
        self.d = d_spacing(unique, cell)[plus_row]
        self.friedel_mate = np.where(
            self.friedel_sign > 0, self._minus_row[plus_row], plus_row
        ).astype(np.int64)

    def __len__(self) -> int:
        """Count the rows, R."""
        return len(self.miller_index)

    @property
    def asu_index(self) -> NDArray[np.int32]:
        """Index in the asymmetric unit, (R, 3): the same for both Friedel mates."""
        return (self.miller_index * self.friedel_sign[:, None]).astype(np.int32)

    def refl_id(self, hkl: ArrayLike) -> NDArray[np.int64]:
        """Row of the table that observed indices belong to.

        Parameters
        ----------
        hkl : array_like, (N, 3) int
            As observed; any symmetry equivalent.

        Returns
        -------
        ndarray, (N,) int64
            -1 for systematically absent reflections and those outside ``d_min``.
        """
        hkl = np.asarray(hkl)
        if len(hkl) >= MANY_INDICES and np.prod(2 * self._box + 1) <= LARGEST_SPHERE:
            index = hkl.astype(np.int64) + self._box
            inside = ((index >= 0) & (index <= 2 * self._box)).all(axis=1)
            index = np.where(inside[:, None], index, 0)
            return np.where(inside, self._sphere[tuple(index.T)], -1).astype(np.int64)
        return self._search(hkl)

    def _search(self, hkl: ArrayLike) -> NDArray[np.int64]:
        mapping = symmetry.to_asu(hkl, self.space_group)
        inside = (np.abs(mapping.miller_index) <= self._limit).all(axis=1)
        key = self._key(np.where(inside[:, None], mapping.miller_index, 0))
        position = np.minimum(np.searchsorted(self._sorted_key, key), len(self._sorted_key) - 1)
        found = inside & (self._sorted_key[position] == key)
        row = np.where(mapping.friedel_sign > 0, position, self._minus_row[position])
        return np.where(found, row, -1).astype(np.int64)

    @cached_property
    def _box(self) -> NDArray[np.int64]:
        """Largest |h|, |k|, |l| of the whole sphere."""
        turned = np.abs(self.miller_index @ symmetry.rotations(self.space_group))
        return turned.max(axis=(0, 1)).astype(np.int64)

    @cached_property
    def _sphere(self) -> NDArray[np.int32]:
        """Row of every index within the box."""
        table = np.full(2 * self._box + 1, -1, dtype=np.int32)
        n = len(self._sorted_key)
        for rotation in symmetry.rotations(self.space_group):
            turned = self.miller_index[:n] @ rotation
            # the mates of centrics are their own: both assignments agree
            table[tuple((self._box - turned).T)] = self._minus_row
            table[tuple((self._box + turned).T)] = np.arange(n)
        return table

    def _key(self, asu_index: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """One integer per index, ordered as h, k, l; unique while ``|index| <= _limit``."""
        n = 2 * self._limit + 1
        h, k, l = np.asarray(asu_index, dtype=np.int64).T + self._limit
        return (h * n + k) * n + l


def _require_few(cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup, d_min: float) -> None:
    """Refuse limits at which the table would not fit, before anything is counted out."""
    # lattice points in the sphere over those that the Laue group makes of each
    equivalents = 2 * len(space_group.operations())
    smallest = (4 / 3 * math.pi * cell.volume / (equivalents * TOO_MANY)) ** (1 / 3)
    if d_min < smallest:
        raise UserError(
            f"d_min is {d_min:g} A; the cell {cell.parameters} in {space_group.xhm()} has more "
            f"than {TOO_MANY:,} unique reflections below {smallest:.2g} A; choose a larger one"
        )
