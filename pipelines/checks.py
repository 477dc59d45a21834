"""What can be known to be wrong before the long work starts and the run directory is claimed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gemmi
import numpy as np

from integrator.errors import UserError
from integrator.io.dials import read_experiments
from integrator.shoebox.sweep import sweeps_of
from pipelines.atomic_model import check_same_crystal, read_model
from pipelines.config import DialsConfig, RunConfig

#: Largest relative difference of cell edges between sweeps that are merged into one crystal form.
CELL_TOLERANCE = 0.03
#: Error that the metric of a cell may have in its space group, over its longest edge squared.
SYMMETRY_TOLERANCE = 0.01


def check_input(config: RunConfig) -> None:
    """Check the files of a run against each other, as far as that takes a moment.

    Parameters
    ----------
    config : RunConfig
        ``expt`` is needed.

    Raises
    ------
    UserError
        A file is missing, the sweeps cannot be merged, or the model is of another crystal.
    """
    config.require("expt", "refl", "out")
    crystals = [e.crystal for e in sweeps_of(read_experiments(config.expt))]
    cell, space_group = crystal_form(
        [(c.unit_cell.parameters, c.space_group.xhm()) for c in crystals]
    )
    if why_no_peaks(config) is None:
        check_same_crystal(read_model(config.model), cell, space_group, config.model)


def check_known_crystal(dials: DialsConfig, model: Path | None) -> None:
    """Check the crystal that the user names to DIALS, before DIALS works for minutes.

    Raises
    ------
    UserError
        The space group does not exist, or contradicts the cell or the model; or the model cannot
        be read.
    """
    structure = None if model is None else read_model(model)
    if dials.space_group is None:
        return
    space_group = gemmi.find_spacegroup_by_name(dials.space_group)
    if space_group is None:
        raise UserError(
            f"--space-group {dials.space_group!r} is not a space group; give its Hermann-Mauguin "
            "symbol or number, like P43212 or 96, or leave it to indexing"
        )
    if dials.unit_cell is not None:
        _require_compatible(gemmi.UnitCell(*dials.unit_cell), space_group)
    if structure is not None:
        # the cell given to indexing is a rough one, so the model's own stands in for it
        check_same_crystal(structure, structure.cell, space_group, model)


def why_no_peaks(config: RunConfig) -> str | None:
    """Reason for a run without anomalous peaks."""
    if config.model is None:
        return "they need the phases of a model, and none was given (--model)"
    if not config.merge.anomalous:
        return "Bijvoet mates are merged together (merge.anomalous is false)"
    return None


def crystal_form(
    crystals: Sequence[tuple[Sequence[float], str]],
) -> tuple[gemmi.UnitCell, gemmi.SpaceGroup]:
    """Mean cell and the space group of sweeps that are merged together.

    Parameters
    ----------
    crystals : sequence of (cell parameters, space-group name)
        [A, deg]

    Raises
    ------
    UserError
        There is none, the sweeps hold different crystals, or the cell contradicts the group.
    """
    if not crystals:
        raise UserError("the EXPT file holds no experiment: give an indexed or refined one")
    cells = np.array([parameters for parameters, _ in crystals])
    groups = {group for _, group in crystals}
    spread = np.ptp(cells[:, :3], axis=0) / cells[:, :3].mean(0)
    if len(groups) > 1 or spread.max() > CELL_TOLERANCE:
        raise UserError(
            f"the sweeps hold different crystals (space groups {', '.join(sorted(groups))}; cell "
            f"edges differ by {100 * spread.max():.1f} %); sweeps of one run must agree in space "
            f"group and within {100 * CELL_TOLERANCE:.0f} %: run them apart"
        )
    cell, space_group = gemmi.UnitCell(*cells.mean(0)), gemmi.SpaceGroup(groups.pop())
    _require_compatible(cell, space_group)
    return cell, space_group


def _require_compatible(cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup) -> None:
    """Refuse symmetry that the lattice does not have: merging would mix different reflections."""
    error = SYMMETRY_TOLERANCE * max(cell.a, cell.b, cell.c) ** 2
    if not cell.is_compatible_with_spacegroup(space_group, error):
        shown = ", ".join(f"{x:g}" for x in np.round(cell.parameters, 3))
        raise UserError(
            f"the cell {shown} cannot be in space group {space_group.xhm()}; index again in a "
            "space group of this lattice (--space-group), with its --unit-cell"
        )
