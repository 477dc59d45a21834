"""Other names for the same reflections: reindexing operators given by the user."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.cell import reciprocal_metric
from braggflux.integrator.crystal.forms import CrystalForm, cell_of_metric, cell_text
from braggflux.integrator.crystal.lattice import TOLERANCE, lattice_misfit
from braggflux.integrator.crystal.symmetry import is_absent, rotations
from braggflux.integrator.errors import UserError
from braggflux.merge.io.observations import UnmergedData


def reindex(data: UnmergedData, operator: str) -> UnmergedData:
    """Apply a reindexing operator to indices and cell; the space group stays.

    Parameters
    ----------
    data : UnmergedData
    operator : str
        New indices in terms of the old, for example ``"k,h,-l"``.

    Raises
    ------
    UserError
        As :func:`reindexed_form`.
    """
    rotation, cell = reindexed_form(data, operator)
    return replace(data, miller_index=data.miller_index @ rotation, cell=cell)


def reindexed_form(data: CrystalForm, operator: str) -> tuple[NDArray[np.int32], gemmi.UnitCell]:
    """Matrix R of ``h' = h R``, (3, 3), and the cell after it.

    Raises
    ------
    UserError
        Not an operator in h, k, l; one that changes hand or volume; or one after which the cell,
        or what symmetry and absences the indices have, does not fit the space group.
    """
    rotation = _parse_operator(operator)
    # r = h M = h' R^-1 M with the rows of M being a*, b*, c*
    inverse = np.linalg.inv(rotation)
    cell = cell_of_metric(np.linalg.inv(inverse @ reciprocal_metric(data.cell) @ inverse.T))
    if lattice_misfit(cell, data.space_group) > TOLERANCE:
        raise UserError(
            f"the reindexing operator {operator} turns the cell of {data.name} into "
            f"{cell_text(cell)}, unfit for {data.space_group.xhm()}; give one of this lattice"
        )
    if not _keeps_symmetry(rotation, data.space_group):
        raise UserError(
            f"the reindexing operator {operator} moves the symmetry axes of {data.name} away from "
            f"where {data.space_group.xhm()} has them; give one that keeps the space group"
        )
    return rotation, cell


def _keeps_symmetry(rotation: NDArray[np.int32], space_group: gemmi.SpaceGroup) -> bool:
    """Whether equivalents stay equivalents and absences absences after ``h' = h R``."""
    turns = rotations(space_group)
    turned = np.rint(np.linalg.inv(rotation) @ turns @ rotation).astype(int)
    if {g.tobytes() for g in turned} != {g.tobytes() for g in turns.astype(int)}:
        return False
    # axial and zonal conditions have periods of 6 at the most
    grid = np.stack(np.meshgrid(*[np.arange(-6, 7)] * 3, indexing="ij"), -1).reshape(-1, 3)
    return np.array_equal(is_absent(grid, space_group), is_absent(grid @ rotation, space_group))


def _parse_operator(operator: str) -> NDArray[np.int32]:
    """Return R of ``h' = h R``, (3, 3)."""
    try:
        op = gemmi.Op(operator)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"reindexing operator {operator!r} cannot be read; write the new indices in terms of "
            "the old, like k,h,-l"
        ) from error
    rotation = np.array(op.rot)
    if not set(operator.lower()) & set("hkl") or np.any(op.tran) or np.any(rotation % op.DEN):
        raise UserError(
            f"reindexing operator {operator!r} must give whole combinations of h, k, l without "
            "shifts, like k,h,-l"
        )
    rotation = (rotation // op.DEN).astype(np.int32)
    determinant = round(np.linalg.det(rotation))
    if determinant != 1:
        raise UserError(
            f"reindexing operator {operator!r} has determinant {determinant}; it must be 1, to "
            "keep hand and volume: for k,h,l write k,h,-l"
        )
    return rotation
