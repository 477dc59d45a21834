"""Checks of a run before the long work starts and the run directory is claimed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gemmi
import numpy as np

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.crystal.lattice import check_lattice
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.io.dials.sweeps import require_distinct, sweeps_of
from braggflux.integrator.io.file_kinds import (
    DATA_FILE,
    EXPERIMENTS,
    MASTER,
    MTZ,
    REFLECTIONS,
    file_kind,
)
from braggflux.integrator.io.images import open_frames
from braggflux.integrator.model.saved_integrator import SavedIntegrator
from braggflux.integrator.prediction.predict import require_recorded
from braggflux.integrator.shoebox.extraction import MIN_ROWS
from braggflux.merge.io.dataset_split import wavelength_groups
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.output.free_flags import FreeFlags
from braggflux.merge.rows import check_parents, parse_parents
from braggflux.pipelines.config.run import INTEGRATOR_FILE, DialsConfig, RunConfig
from braggflux.pipelines.integration.data_sets import read_sweeps
from braggflux.pipelines.maps.atomic_model import check_same_crystal, read_model
from braggflux.pipelines.maps.reference_amplitudes import check_reference
from braggflux.pipelines.workspace.file_sums import tell_changed

#: Largest relative difference of cell edges between sweeps that are merged into one crystal form.
CELL_TOLERANCE = 0.03
#: Relative change of the detector's limit that refinement may bring.
UNREFINED = 0.03


def check_input(config: RunConfig) -> None:
    """Check the files of a run against each other, as far as that takes a moment.

    Parameters
    ----------
    config : RunConfig
        ``expt`` is needed.

    Raises
    ------
    UserError
        A file is missing, the sweeps cannot be merged or hold the same photons, or the model is of
        another crystal.
    """
    config.require("expt", "refl", "out")
    tell_changed(config.input_files().values())
    for files in config.data_sets:
        check_pair(files.expt, files.refl)
    check_parents_of_run(config)
    if config.reference is not None:
        read_merged_mtz(config.reference)
    experiments = sweeps_of(read_sweeps(config))
    check_frames(experiments, config.extraction.d_min)
    check_integrator(config, experiments)
    crystals = [e.crystal for e in experiments]
    for files in config.data_sets:
        own = [e for e in experiments if e.dataset == files.name]
        if not own:
            raise UserError(f"{files.expt} holds no sweep that can be integrated; leave it out")
        one_wavelength([e.beam.wavelength for e in own])
    cell, space_group = crystal_form(
        [(c.unit_cell.parameters, c.space_group.xhm()) for c in crystals]
    )
    require_distinct(experiments)
    if why_no_peaks(config) is None:
        check_same_crystal(read_model(config.model), cell, space_group, config.model)
    if config.prior_model is not None:
        check_reference(config.prior_model, cell, space_group)
    FreeFlags.of(config.merge).check(cell, space_group)


def check_integrator(config: RunConfig, experiments: Sequence[Experiment]) -> None:
    """Check that a trained integrator, if one is given, fits the detector and the settings.

    Raises
    ------
    UserError
    """
    if config.trained_integrator is None:
        return
    path = config.trained_integrator / INTEGRATOR_FILE
    saved = SavedIntegrator.read(path)
    saved.require_settings(config.integrator, config.extraction.box, path)
    for experiment in experiments:
        for panel in experiment.panels:
            saved.require_pixels(panel.pixel_size, path)


def check_parents_of_run(config: RunConfig) -> None:
    """Check the relations of the data sets.

    Raises
    ------
    UserError
        A parent does not exist, or is its own ancestor; or the prior cannot know of relatives.
    """
    parents = parse_parents(config.parents)
    if parents is None:
        return
    check_parents(parents, len(config.data_sets))
    if any(p is not None for p in parents) and config.merge.prior == "wilson":
        raise UserError(
            "--parents cannot act under merge.prior=wilson, where every amplitude is for itself; "
            "leave merge.prior out, or give double-wilson"
        )


def check_pair(expt: Path, refl: Path) -> None:
    """Check that EXPT and REFL are what their names say.

    Raises
    ------
    UserError
    """
    kinds = file_kind(expt), file_kind(refl)
    if kinds == (REFLECTIONS, EXPERIMENTS):
        raise UserError(f"EXPT and REFL are swapped; give {refl} {expt}")
    for name, path, wanted, kind in zip(
        ("EXPT", "REFL"), (expt, refl), (EXPERIMENTS, REFLECTIONS), kinds, strict=True
    ):
        if kind not in (None, wanted):
            hint = "; for images there is `braggflux process`" if kind == MASTER else ""
            raise UserError(f"{name}: {path} is {kind}; {wanted} is needed here{hint}")


def check_frames(
    experiments: Sequence[Experiment], d_min: float | None, tolerance: float = 0.0
) -> None:
    """Check that the frames of sweeps are there, and that the detector records ``d_min``.

    Raises
    ------
    UserError
    """
    require_recorded(experiments, d_min, tolerance)
    for experiment in experiments:
        open_frames(experiment).close()


def check_images(images: Sequence[Path]) -> None:
    """Check that images are no DIALS files or data files without their master.

    Raises
    ------
    UserError
    """
    for path in images:
        kind = file_kind(path)
        if kind in (EXPERIMENTS, REFLECTIONS):
            raise UserError(
                f"{path} is {kind} and no image; for DIALS files there is `braggflux run EXPT "
                "REFL`"
            )
        if kind in (DATA_FILE, MTZ):
            raise UserError(f"{path} is {kind}; give the master file, or all frames of a sweep")


def check_imported(expt: Path, d_min: float | None) -> None:
    """Check what DIALS has imported, before it works for minutes.

    Raises
    ------
    UserError
        All images are stills, some are missing, the first cannot be used (noise below zero, a
        trusted range that holds nothing), or ``d_min`` is beyond the detector.
    """
    try:
        experiments = read_experiments(expt)
    except UserError:
        return  # said of the refined experiments, which DIALS may have made readable
    sweeps = [experiment for experiment in experiments if not experiment.is_still]
    if experiments and not sweeps:
        raise UserError(
            "the images are stills: shoeboxes need a rotation scan; integrate them with "
            "dials.stills_process and give its tables to braggflux merge --stills"
        )
    check_frames(experiments, d_min, UNREFINED)
    if sweeps:
        with open_frames(sweeps[0]) as frames:
            frames.read(0)


def check_known_crystal(
    dials: DialsConfig, model: Path | None, d_min: float | None = None
) -> None:
    """Check the crystal that the user names to DIALS, before DIALS works for minutes.

    Raises
    ------
    UserError
        The space group does not exist, or contradicts the cell or the model; or the model cannot
        be read; or the cell has next to no reflections to ``d_min`` [A].
    """
    structure = None if model is None else read_model(model)
    cell = dials.unit_cell or (structure and structure.cell.parameters)
    if d_min is not None and cell:
        n = len(gemmi.make_miller_array(gemmi.UnitCell(*cell), gemmi.SpaceGroup("P 1"), d_min))
        if n < MIN_ROWS:
            raise UserError(
                f"d_min of {d_min:g} A leaves {n} reflections of a crystal of this cell: give a "
                "smaller --d-min"
            )
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
