"""Crystal forms: typical cells of many crystals, and which data sets may share amplitudes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal.cell import reciprocal_metric
from braggflux.integrator.crystal.lattice import FREE_TOLERANCE, check_lattice
from braggflux.integrator.crystal.symmetry import rotations
from braggflux.integrator.errors import UserError

Array = NDArray[np.float64]

#: Largest relative difference of cell lengths (and of angles, in radians) within a crystal form.
CELL_TOLERANCE = 0.03


class CrystalForm(Protocol):
    """What tells crystal forms apart: of observations in memory or on disk."""

    @property
    def name(self) -> str:
        """Of the dataset, for messages."""

    @property
    def cell(self) -> gemmi.UnitCell:
        """Typical of its images."""

    @property
    def space_group(self) -> gemmi.SpaceGroup:
        """Of the crystal."""


def check_one_crystal_form(
    datasets: Sequence[CrystalForm], tolerance: float = CELL_TOLERANCE
) -> None:
    """Make sure that datasets may share structure factors.

    Parameters
    ----------
    datasets : sequence of CrystalForm
        Compared with the first.
    tolerance : float
        Allowed relative difference of a, b, c and difference of the angles in radians.

    Raises
    ------
    UserError
        Naming the two datasets with different space groups or cells.
    """
    for other in datasets[1:]:
        first = datasets[0]
        if other.space_group.xhm() != first.space_group.xhm():
            raise UserError(
                f"{first.name} has space group {first.space_group.xhm()} and {other.name} has "
                f"{other.space_group.xhm()}; datasets merged together need one space group: "
                "reindex, or merge them in separate runs"
            )
        if not first.cell.is_similar(other.cell, tolerance, float(np.degrees(tolerance))):
            raise UserError(
                f"the cells of {first.name} ({cell_text(first.cell)}) and {other.name} "
                f"({cell_text(other.cell)}) differ by more than {tolerance:.1%}: leave one out, "
                "or merge them in separate runs"
            )


def typical_cell(
    cells: ArrayLike, space_group: gemmi.SpaceGroup, source: str = "the data"
) -> gemmi.UnitCell:
    """Return the median of many cells, made to obey the symmetry.

    The metric tensor G of the median cell is averaged over the rotations R of the space group,
    ``R^T G R``, which is exact for every lattice and setting.

    Parameters
    ----------
    cells : array_like, (n, 6)
        [A, degrees]
    space_group : gemmi.SpaceGroup
    source : str
        The input, for the message.

    Raises
    ------
    UserError
        The median is far from the symmetry.
    """
    median = gemmi.UnitCell(*np.median(np.asarray(cells, dtype=float), axis=0))
    check_lattice(median, space_group, source, FREE_TOLERANCE)
    metric = np.linalg.inv(reciprocal_metric(median))
    turns = rotations(space_group)
    return cell_of_metric(np.mean(turns.transpose(0, 2, 1) @ metric @ turns, axis=0))


def cell_of_metric(metric: Array) -> gemmi.UnitCell:
    """Return the cell with this metric tensor."""
    a, b, c = np.sqrt(np.diag(metric))
    cosines = metric[1, 2] / (b * c), metric[0, 2] / (a * c), metric[0, 1] / (a * b)
    return gemmi.UnitCell(a, b, c, *np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0))))


def cell_text(cell: gemmi.UnitCell) -> str:
    """Parameters in words for a message."""
    return " ".join(f"{value:.2f}" for value in cell.parameters)
