"""Whether a unit cell has the symmetry that its space group asks of it."""

from __future__ import annotations

import gemmi
import numpy as np

from braggflux.integrator.crystal.cell import reciprocal_metric
from braggflux.integrator.crystal.symmetry import rotations
from braggflux.integrator.errors import UserError

#: Allowed change of ``a_i . a_j / (|a_i| |a_j|)`` under the rotations: lengths of refined cells
#: that should be equal may differ by 1 %, angles be off by 1.1 degrees.
TOLERANCE = 0.02
#: The same of crystals refined without their symmetry, one by one, as stills are.
FREE_TOLERANCE = 0.06


def lattice_misfit(cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup) -> float:
    """Largest change of the metric tensor under the group's rotations.

    Each element is in units of the lengths of its two axes, so that 2 % of a length are 0.04
    whatever the other axes are.
    """
    metric = np.linalg.inv(reciprocal_metric(cell))
    turns = rotations(space_group)
    # columns of coordinates turn as R x, so that x^T G x becomes x^T (R^T G R) x
    turned = turns.transpose(0, 2, 1) @ metric @ turns
    length = np.sqrt(np.diag(metric))
    return float((np.abs(turned - metric) / np.outer(length, length)).max())


def check_lattice(
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    source: str,
    tolerance: float = TOLERANCE,
) -> None:
    """Refuse a cell without the symmetry of its space group: different reflections would mix.

    Parameters
    ----------
    cell : gemmi.UnitCell
    space_group : gemmi.SpaceGroup
    source : str
        Where they come from, for the message.
    tolerance : float
        Allowed :func:`lattice_misfit`.

    Raises
    ------
    UserError
        Naming the settings of the same group that have such a cell, if there are any.
    """
    if lattice_misfit(cell, space_group) <= tolerance:
        return
    shown = " ".join(f"{x:.2f}" for x in cell.parameters)
    others = [
        other.xhm()
        for other in gemmi.spacegroup_table()
        if (other.number, other.hm[0]) == (space_group.number, space_group.hm[0])
        and other.operations() != space_group.operations()
        and lattice_misfit(cell, other) <= tolerance
    ]
    remedy = "give a cell and a space group (--space-group) that go together"
    if others:
        names = ", ".join(f"'{name}'" for name in others)
        remedy = f"settings of this group that have such a cell: {names} (--space-group)"
    raise UserError(
        f"{source}: the cell {shown} cannot be in space group {space_group.xhm()}, whose symmetry "
        f"would make different reflections one; {remedy}"
    )
