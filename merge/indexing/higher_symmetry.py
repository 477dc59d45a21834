r"""Symmetry that merged intensities have beyond their space group.

A rotation of the lattice that is none of the crystal brings reflections to others. If the
intensities there are the same within their errors, the crystal may have that symmetry as well, or
be a nearly perfect twin by it: intensities alone do not tell, only that one of both must be dealt
with. Translational pseudo-symmetry makes whole classes of reflections weak and correlates them up
to one half; rotational pseudo-symmetry comes closer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.ambiguity import indexing_operators
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.crystal.symmetry import rotations

Array = NDArray[np.float64]

#: Pairs of reflections that a correlation needs.
MIN_PAIRS = 50
#: Share of the variance that must be signal for a correlation to say anything.
MIN_RELIABILITY = 0.3
#: Correlation over what the noise allows that is called symmetry.
SAME = 0.9
#: Largest normalised intensity that counts in full.
LARGEST = 10.0
LARGEST_POINT_GROUP = 48


@dataclass(frozen=True)
class Relation:
    """Correlation of intensities with those at other indices.

    Parameters
    ----------
    name : str
        The other indices, like ``k,h,-l``.
    matrix : (3, 3)
        R of ``h' = h R``.
    correlation, largest : float
        As found, and as noise allows it to be.
    n_pairs : int
    """

    name: str
    matrix: NDArray[np.int32]
    correlation: float
    largest: float
    n_pairs: int

    @property
    def is_symmetry(self) -> bool:
        """As good as equal."""
        return self.largest > MIN_RELIABILITY and self.correlation > SAME * self.largest


def relations(
    asu: ReciprocalAsu, normalised: Array, sigma: Array, tolerance: float
) -> list[Relation]:
    """Correlation under each rotation of the lattice that the space group lacks.

    Parameters
    ----------
    asu : ReciprocalAsu
    normalised, sigma : (R,)
        Intensity over its expectation at each row and its error, both mates alike; NaN for none.
    tolerance : float
        Largest obliquity of a two-fold axis of the lattice [deg].
    """
    operators = indexing_operators(asu.cell, asu.space_group, tolerance)
    found = []
    value = np.minimum(normalised, LARGEST)
    rows = np.flatnonzero(np.isfinite(value) & np.isfinite(sigma) & (asu.friedel_sign > 0))
    for matrix, name in zip(operators.matrices[1:], operators.names[1:], strict=True):
        other = asu.refl_id(asu.miller_index[rows] @ matrix)
        other = np.where(other >= 0, asu.friedel_mate[other], -1)  # both mates have the value
        paired = (other >= 0) & np.isfinite(value[other]) & np.isfinite(sigma[other])
        first, second = rows[paired], other[paired]
        moved = np.abs(value[first] - value[second]) > 0
        first, second = first[moved], second[moved]
        if len(first) < MIN_PAIRS:
            continue
        both = np.concatenate([first, second])
        noise = np.mean(np.minimum(sigma[both], LARGEST) ** 2)
        found.append(
            Relation(
                name,
                matrix,
                float(np.corrcoef(value[first], value[second])[0, 1]),
                float(1.0 - noise / np.var(value[both])),
                len(first),
            )
        )
    return found


def point_group_with(
    space_group: gemmi.SpaceGroup, matrices: Sequence[NDArray[np.int32]]
) -> str | None:
    """Name the point group that a space group's rotations make with others, (3, 3) each."""
    group = {m.tobytes(): m for m in [*rotations(space_group), *matrices]}
    while True:
        products = [(a @ b).astype(np.int32) for a in group.values() for b in group.values()]
        larger = group | {m.tobytes(): m for m in products}
        if len(larger) == len(group) or len(larger) > LARGEST_POINT_GROUP:
            break
        group = larger
    for other in gemmi.spacegroup_table():
        if {m.tobytes() for m in rotations(other)} == set(group):
            return other.point_group_hm()
    return None
