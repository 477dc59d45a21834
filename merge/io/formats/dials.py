"""Unmerged observations from integrated or scaled DIALS tables, sweeps and stills alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.forms import typical_cell
from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    place_on_scans,
    read_experiments,
    read_reflections,
)
from braggflux.merge.io.dataset_split import (
    cell_groups,
    check_images,
    check_one_form,
    check_only_one,
    split_by_sweep,
    split_by_wavelength,
)
from braggflux.merge.io.formats.unmerged_mtz import batch_offsets
from braggflux.merge.io.integrated_twice import check_integrated_once
from braggflux.merge.io.observations import UnmergedData, make_unmerged
from braggflux.merge.io.sweep_columns import BEAMS, FRAME, FRAME_WIDTH, SWEEP, ZETA, zeta

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: Reflections of which less was recorded are left out, as ``dials.scale`` does.
MIN_PARTIALITY = 0.4
#: Columns of the table that become metadata when they are there.
_METADATA = ("zeta", "background.mean", "partiality", "profile.correlation", "qe")


def read_dials(table: str | Path, experiments: str | Path) -> UnmergedData:
    """Read the only data set of a table, as :func:`read_dials_datasets` does.

    Raises
    ------
    UserError
        As there, or the table holds several data sets.
    """
    datasets = read_dials_datasets(table, experiments)
    check_only_one([data.name for data in datasets], table)
    return datasets[0]


def read_dials_datasets(
    table: str | Path, experiments: str | Path, space_group: gemmi.SpaceGroup | None = None
) -> list[UnmergedData]:
    """Read integrated or scaled reflections: a data set for each wavelength of the beam.

    Intensities are ``intensity.scale / inverse_scale_factor`` when the table was scaled, else
    those of profile fitting, else (reflections that were not fitted) summed and divided by the
    partiality. The columns ``lp`` and ``qe`` are applied where they exist. What DIALS flags as not
    integrated, or bad for scaling, is left out.

    Metadata: ``xobs yobs BATCH``; of sweeps ``XDET YDET ROT LP`` and
    :data:`~braggflux.merge.io.sweep_columns.SWEEP_COLUMNS`; of stills ``ewald_offset`` [1/A] and
    ``panel``; and what the table has of ``zeta background.mean partiality profile.correlation
    qe``.

    Parameters
    ----------
    table, experiments : str or Path
        The .refl and .expt of one step.
    space_group : gemmi.SpaceGroup, optional
        That the data will be given instead of their own, which the cell then need not obey.

    Raises
    ------
    UserError
        The files do not belong together, have no crystal or more than one space group or crystal
        form, mix sweeps and stills, or hold no integrated reflection.
    """
    models = read_experiments(experiments)
    reflections, number = place_on_scans(read_reflections(table), models)
    number = np.where(_has_crystal(models, experiments)[number], number, -1)
    intensity, variance, good = _intensities(reflections)
    good &= (number >= 0) & reflections["miller_index"].any(axis=1)
    good = _with_place(reflections, good, table)
    if not good.any():
        raise UserError(
            f"{table} holds no integrated reflection of an indexed crystal; give the table of "
            "dials.integrate, dials.scale or dials.stills_process"
        )
    log.info("%s: %d of %d rows are used", table, good.sum(), len(good))
    reflections = reflections.select(good)
    used, number = np.unique(number[good], return_inverse=True)
    models = [models[i] for i in used]
    is_still = _check(models, experiments)
    if not is_still:
        check_integrated_once(models, number, reflections, intensity[good])
    describe = _of_stills if is_still else _of_sweeps
    metadata = describe(reflections, models, number)
    if "xyzobs.px.value" in reflections:
        metadata["xobs"], metadata["yobs"] = reflections["xyzobs.px.value"][:, :2].T
    metadata |= {name: reflections[name] for name in _METADATA if name in reflections}
    cells = np.array([model.crystal.unit_cell.parameters for model in models])
    wavelength = np.array([model.beam.wavelength for model in models])
    if is_still:
        check_images(cells, str(experiments), "crystals")
    else:
        check_one_form(cells, cell_groups(cells), str(experiments), "crystals")
    # with another group to come, the file's own need not fit
    symmetry = models[0].crystal.space_group if space_group is None else gemmi.SpaceGroup("P 1")
    data = make_unmerged(
        source=str(table),
        miller_index=reflections["miller_index"],
        intensity=intensity[good],
        sigma=np.sqrt(np.maximum(variance[good], 0.0)),
        image_label=metadata["BATCH"],
        metadata=metadata,
        wavelength=wavelength[number] if is_still else None,
        cell=typical_cell(cells, symmetry, str(experiments)),
        space_group=models[0].crystal.space_group,
        name=Path(table).stem,
        has_lp_applied="lp" in reflections,
    )
    return split_by_wavelength(data) if is_still else split_by_sweep(data, wavelength, cells)


def _has_crystal(models: Sequence[Experiment], source: str | Path) -> NDArray[np.bool_]:
    """Whether each member of an experiment list has a crystal, and False at the end: (E + 1,)."""
    has = np.array([*(model.crystal is not None for model in models), False])
    if not has.any():
        raise UserError(f"{source} has no experiment with a crystal; give one after indexing")
    if not has[:-1].all():
        log.info(
            "%s: %d of %d experiments have no crystal and are left out",
            *(source, (~has[:-1]).sum(), len(models)),
        )
    return has


def _with_place(
    table: ReflectionTable, good: NDArray[np.bool_], source: str | Path
) -> NDArray[np.bool_]:
    """Those of the good rows, (N,), whose place is known."""
    places = [table[name] for name in ("xyzcal.px", "s1") if name in table]
    known = np.all([np.isfinite(place).all(axis=1) for place in places], axis=0)
    if np.any(good & ~known):
        log.warning(
            "%s: %d rows without xyzcal.px or s1 are left out", source, (good & ~known).sum()
        )
    return good & known


def _check(models: Sequence[Experiment], source: str | Path) -> bool:
    """Whether all are stills."""
    groups = {model.crystal.space_group.xhm() for model in models}
    if len(groups) > 1:
        raise UserError(
            f"{source} has crystals of the space groups {', '.join(sorted(groups))}; reindex them "
            "to one (dials.reindex), or give them as separate inputs"
        )
    stills = {model.is_still for model in models}
    if len(stills) > 1:
        raise UserError(f"{source} mixes sweeps and stills; give them as separate inputs")
    return stills.pop()


def _intensities(table: ReflectionTable) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Corrected intensities and variances, and which rows have them."""
    flags = table["flags"].astype(np.int64)
    partiality = table.columns.get("partiality", np.ones(len(table)))
    good = partiality >= MIN_PARTIALITY
    if "intensity.scale.value" in table:
        scale = table["inverse_scale_factor"]
        good &= ((flags & DialsFlag.BAD_FOR_SCALING) == 0) & (scale > 0.0)
        factor = 1.0 / np.where(good, scale, 1.0)  # lp and qe are in already
        value, variance = (table[f"intensity.scale.{name}"] for name in ("value", "variance"))
    else:
        factor = table.columns.get("lp", np.ones(len(table)))
        if "qe" in table:
            good &= table["qe"] > 0.0
            factor = factor / np.where(good, table["qe"], 1.0)
        value, variance, good = _integrated(table, flags, good, partiality)
    return value * factor, variance * factor**2, good


def _integrated(
    table: ReflectionTable, flags: NDArray[np.int64], good: NDArray[np.bool_], partiality: Array
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Intensities and variances before lp and qe, and which of the good rows have them.

    Profile-fitted where that went well, else summed: what ``dials.scale`` starts from
    (``intensity_choice=combine``).
    """
    value, variance = np.zeros(len(table)), np.zeros(len(table))
    is_integrated = np.zeros(len(table), dtype=bool)
    kinds = (
        ("prf", DialsFlag.INTEGRATED_PRF, np.ones(len(table))),
        ("sum", DialsFlag.INTEGRATED_SUM, 1.0 / np.where(good, partiality, 1.0)),
    )
    for kind, flag, factor in kinds:
        if f"intensity.{kind}.value" not in table:
            continue
        rows = good & ((flags & flag) != 0) & ~is_integrated
        value[rows] = (table[f"intensity.{kind}.value"] * factor)[rows]
        variance[rows] = (table[f"intensity.{kind}.variance"] * factor**2)[rows]
        if rows.any() and is_integrated.any():
            log.info("%d observations whose profile was not fitted are sums", rows.sum())
        is_integrated |= rows
    return value, variance, is_integrated


def _of_sweeps(
    table: ReflectionTable, models: Sequence[Experiment], number: NDArray[np.int64]
) -> dict[str, Array]:
    """Metadata of rotation data."""
    table.require(["xyzcal.px", "s1"], "says where a reflection is on its sweep")
    x, y, z = table["xyzcal.px"].T
    rot, batch, beams = np.empty(len(z)), np.empty(len(z)), np.empty((len(z), 6))
    width, along_axis = np.empty(len(z)), np.empty(len(z))
    offsets = batch_offsets(models)
    for i, model in enumerate(models):
        rows = number == i
        if not rows.any():
            log.info("sweep %d has no usable reflection", i + 1)
            continue
        first, last = model.scan.image_range
        # a centroid may be predicted just outside the scan
        batch[rows] = offsets[i] + np.clip(np.floor(z[rows]) + first, first, last)
        rot[rows] = model.scan.phi_deg(z[rows])
        s1 = table["s1"][rows]
        beams[rows] = _beams_in_crystal(model, s1, rot[rows])
        width[rows] = abs(model.scan.oscillation[1])
        along_axis[rows] = zeta(model.beam.s0, s1, model.goniometer.lab_axis)
    metadata = {"BATCH": batch, "XDET": x, "YDET": y, "ROT": rot}
    if "lp" in table:
        metadata["LP"] = table["lp"]
    metadata |= {SWEEP: number.astype(float), FRAME: z, FRAME_WIDTH: width, ZETA: along_axis}
    return metadata | dict(zip(BEAMS, beams.T, strict=True))


def _beams_in_crystal(model: Experiment, s1: Array, phi: Array) -> Array:
    """Return unit vectors of both beams with the rotation undone, (n, 6)."""
    from scipy.spatial.transform import Rotation  # 14 MiB that MTZ files do without

    gonio = model.goniometer
    turn = Rotation.from_rotvec(np.radians(phi)[:, None] * gonio.rotation_axis)
    undo = Rotation.from_matrix(gonio.fixed_rotation).inv() * turn.inv()
    crystal = []
    for beam in (np.broadcast_to(model.beam.s0, s1.shape), s1):
        unit = beam / np.linalg.norm(beam, axis=1, keepdims=True)
        crystal.append(undo.apply(unit @ gonio.setting_rotation))  # row times S: S^-1 applied
    return np.concatenate(crystal, axis=1)


def _of_stills(
    table: ReflectionTable, models: Sequence[Experiment], number: NDArray[np.int64]
) -> dict[str, Array]:
    """Metadata of stills; all images at once.

    A scan whose images have no width is that many stills.
    """
    settings = np.stack([model.crystal.A for model in models])
    s0 = np.stack([model.beam.s0 for model in models])
    wavelength = np.array([model.beam.wavelength for model in models])
    r = np.einsum("nij,nj->ni", settings[number], table["miller_index"].astype(float))
    offset = np.linalg.norm(r + s0[number], axis=1) - 1.0 / wavelength[number]
    image = number
    if any(model.scan is not None and model.scan.n_images > 1 for model in models):
        table.require(["xyzcal.px"], "says which image of its scan a reflection is on")
        frame = np.floor(table["xyzcal.px"][:, 2])
        image = np.unique(np.stack([number, frame]), axis=1, return_inverse=True)[1].ravel()
    return {"BATCH": image.astype(float), "ewald_offset": offset, "panel": table["panel"]}
