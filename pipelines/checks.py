"""What can be known to be wrong before the long work starts and the run directory is claimed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gemmi
import numpy as np

from integrator.crystal.lattice import check_lattice
from integrator.errors import UserError
from integrator.io.dials import read_experiments
from integrator.shoebox.sweep import sweeps_of
from merge.io.dataset_split import wavelength_groups
from pipelines.atomic_model import check_same_crystal, read_model
from pipelines.config import DialsConfig, RunConfig

#: Largest relative difference of cell edges between sweeps that are merged into one crystal form.
CELL_TOLERANCE = 0.03


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
    experiments = sweeps_of(read_experiments(config.expt))
    crystals = [e.crystal for e in experiments]
    one_wavelength([e.beam.wavelength for e in experiments])
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
        check_lattice(gemmi.UnitCell(*dials.unit_cell), space_group, "--unit-cell")
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
    check_lattice(cell, space_group, "the EXPT file")
    return cell, space_group


def one_wavelength(wavelengths: Sequence[float]) -> float:
    """Median wavelength of the sweeps of a run [A].

    Raises
    ------
    UserError
        There are several: their anomalous signals differ and must not be merged.
    """
    groups = wavelength_groups(wavelengths)
    if groups.any():
        found = [float(np.median(np.asarray(wavelengths)[groups == k])) for k in set(groups)]
        raise UserError(
            f"the sweeps have {len(found)} wavelengths ({', '.join(f'{w:.5f}' for w in found)} "
            "A), whose anomalous signals must not be merged into one; run each wavelength on its "
            "own (dials.split_experiments by_wavelength=True)"
        )
    return float(np.median(wavelengths))
