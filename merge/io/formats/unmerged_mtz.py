"""Unmerged observations in MTZ files with M/ISYM and batch headers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.atomic import replacing
from braggflux.integrator.crystal.geometry import Crystal, Experiment
from braggflux.integrator.crystal.symmetry import to_asu
from braggflux.integrator.errors import UserError, brief, reading
from braggflux.merge.io.dataset_labels import DatasetLabels, DatasetNames

Array = NDArray[np.float64]

#: First free batch number of the next sweep is rounded up to a multiple of this, plus one.
BATCH_STEP = 1000


@dataclass(frozen=True)
class UnmergedTable:
    """Observations, one row each.

    Parameters
    ----------
    miller_index : (N, 3) int
        As observed.
    experiment : (N,) int
        Number of the sweep.
    intensity, sigma : (N,)
        Free of any prior on the intensity.
    xyz_px : (N, 3)
        (fast, slow, frame), frame counted from 0 at the start of the sweep's first image.
    lp : (N,)
        L/P correction that was applied (multiplies raw intensity).
    scale : (N,), optional
        Inverse scale factor that the intensities were divided by.
    """

    miller_index: NDArray[np.int64]
    experiment: NDArray[np.int64]
    intensity: Array
    sigma: Array
    xyz_px: Array
    lp: Array
    scale: Array | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self.miller_index)


@dataclass(frozen=True)
class UnmergedMtz:
    """Columns of an unmerged MTZ file.

    ``batch`` is (N,); ``columns`` has every other column by label, as it is in the file.
    """

    miller_index: NDArray[np.int32]  # (N, 3) as observed
    batch: NDArray[np.int64]
    intensity: Array
    sigma: Array
    columns: dict[str, Array]
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    wavelength: float


def load_mtz(path: str | Path) -> gemmi.Mtz:
    """Read an MTZ file.

    Raises
    ------
    UserError
        It does not exist, is no MTZ file, is truncated, or holds no reflections or space group.
    """
    if not Path(path).is_file():
        raise UserError(f"MTZ file {path} does not exist; check the path")
    try:
        mtz = gemmi.read_mtz_file(os.fspath(path))
    except Exception as error:  # of whatever a decoder raises
        reason = brief(error)
        raise UserError(
            f"{path} is not a complete MTZ file ({reason}); write it again or give another"
        ) from error
    with reading(path, "write it again or give another"):
        if mtz.nreflections == 0 or mtz.spacegroup is None:
            lacks = "reflections" if mtz.nreflections == 0 else "known space group"
            raise UserError(f"{path} holds no {lacks}; give a file that does")
        return tidied(mtz)


def tidied(mtz: gemmi.Mtz) -> gemmi.Mtz:
    """Put NaN for the file's missing-number flag, and H, K, L, which may stand anywhere, first."""
    if np.isfinite(mtz.valm):
        for column in mtz.columns:
            if column.type not in "HYB":
                values = mtz.array[:, column.idx]
                # headers have six decimals: 1e-33 is written as 0.000000
                values[np.isclose(values, mtz.valm, rtol=1e-6, atol=5e-7)] = np.nan
    of_type = [c.label for c in mtz.columns_with_type("H")]
    labels = ["H", "K", "L"] if {"H", "K", "L"} <= set(mtz.column_labels()) else of_type[:3]
    if mtz.column_labels()[:3] == labels:
        return mtz
    for place, label in enumerate(labels):
        mtz.copy_column(place, mtz.column_with_label(label))
        old = next(c.idx for c in list(mtz.columns)[place + 1 :] if c.label == label)
        mtz.remove_column(old)
    return mtz


def batch_offsets(experiments: Sequence[Experiment]) -> list[int]:
    """Offset of each sweep's batch numbers from its image numbers, so that none collide."""
    return offsets_of([_image_range(experiment) for experiment in experiments])


def offsets_of(image_ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Return :func:`batch_offsets` of sweeps by their first and last image."""
    offsets, last = [], 0
    for first_image, last_image in image_ranges:
        offset = 0 if first_image > last else -(-last // BATCH_STEP) * BATCH_STEP
        offsets.append(offset)
        last = last_image + offset
    return offsets


def write_unmerged_mtz(
    path: str | Path,
    table: UnmergedTable,
    experiments: Sequence[Experiment],
    *,
    cell: gemmi.UnitCell | None = None,
    space_group: gemmi.SpaceGroup | None = None,
    history: Sequence[str] = (),
    labels: DatasetLabels = DatasetLabels(),  # noqa: B008 - immutable
) -> None:
    """Write ``H K L M/ISYM BATCH I SIGI [SCALEUSED] XDET YDET ROT LP`` and one batch per image.

    Rows whose intensity or sigma is not finite, or whose sigma is not positive, are left out.

    Parameters
    ----------
    path : str or Path
    table : UnmergedTable
    experiments : sequence of Experiment
        With crystals.
    cell, space_group : optional
        Instead of those of the first crystal.
    history : sequence of str
        Lines of at most 80 characters; longer ones are cut.
    labels : DatasetLabels
        Title and names; a further wavelength is a further data set, with its number behind the
        name.

    Raises
    ------
    UserError
        The file cannot be written, or no observation is left.
    """
    keep = np.isfinite(table.intensity) & np.isfinite(table.sigma) & (table.sigma > 0)
    if not keep.any():
        raise UserError(
            f"cannot write {path}: none of {len(table)} observations has a finite intensity and a "
            "positive sigma; check the integration"
        )
    crystal = experiments[0].crystal
    mtz = gemmi.Mtz()
    mtz.title = labels.title
    dataset_of = _add_datasets(mtz, [e.beam.wavelength for e in experiments], labels.names)
    mtz.spacegroup = space_group or crystal.space_group
    mtz.set_cell_for_all(cell or crystal.unit_cell)
    offsets = batch_offsets(experiments)
    for experiment, offset, dataset in zip(experiments, offsets, dataset_of, strict=True):
        first, last = _image_range(experiment)
        for image in range(first, last + 1):
            mtz.batches.append(_batch_header(experiment, image, offset, dataset))
    columns = _columns(table, experiments, offsets, mtz.spacegroup)
    for label, kind, _ in columns:
        mtz.add_column(label, kind, dataset_id=1)
    data = np.column_stack([values for _, _, values in columns])[keep]
    mtz.set_data(data.astype(np.float32))
    mtz.sort(5)  # H K L M/ISYM BATCH
    mtz.history = [line[:80] for line in history]
    with replacing(path) as temporary:
        temporary.write_bytes(mtz.write_to_bytes())


def _columns(
    table: UnmergedTable,
    experiments: Sequence[Experiment],
    offsets: Sequence[int],
    space_group: gemmi.SpaceGroup,
) -> list[tuple[str, str, Array]]:
    """Return (label, type, values) of every column."""
    if np.any((table.experiment < 0) | (table.experiment >= len(experiments))):
        raise ValueError("an observation belongs to none of the experiments")
    frame = np.floor(table.xyz_px[:, 2])
    batch, rot = np.zeros(len(table)), np.zeros(len(table))
    for number, (experiment, offset) in enumerate(zip(experiments, offsets, strict=True)):
        rows = table.experiment == number
        # a centroid may be predicted just outside the scan
        batch[rows] = np.clip(_image_range(experiment)[0] + frame[rows], *_image_range(experiment))
        batch[rows] += offset
        if experiment.scan is not None:
            rot[rows] = experiment.scan.phi_deg(table.xyz_px[rows, 2])
    asu = to_asu(table.miller_index, space_group)
    return [
        *((axis, "H", asu.miller_index[:, i]) for i, axis in enumerate("HKL")),
        ("M/ISYM", "Y", asu.isym),
        ("BATCH", "B", batch),
        ("I", "J", table.intensity),
        ("SIGI", "Q", table.sigma),
        *([] if table.scale is None else [("SCALEUSED", "R", table.scale)]),
        ("XDET", "R", table.xyz_px[:, 0]),
        ("YDET", "R", table.xyz_px[:, 1]),
        ("ROT", "R", rot),
        ("LP", "R", table.lp),
    ]


def _add_datasets(mtz: gemmi.Mtz, wavelengths: Sequence[float], names: DatasetNames) -> list[int]:
    """One data set per distinct wavelength; the data-set id of each sweep."""
    distinct: list[float] = []
    ids = []
    for wavelength in wavelengths:
        match = [i for i, w in enumerate(distinct) if abs(w - wavelength) < 1e-4]
        if not match:
            match = [len(distinct)]
            distinct.append(wavelength)
            number = len(distinct) if len(distinct) > 1 else ""
            dataset = mtz.add_dataset(f"{names.dataset}{number}")
            dataset.project_name, dataset.crystal_name = names.project, names.crystal
            dataset.id, dataset.wavelength = len(distinct), wavelength
        ids.append(match[0] + 1)
    return ids


def _image_range(experiment: Experiment) -> tuple[int, int]:
    """First and last image number; a still is image 1."""
    return (1, 1) if experiment.scan is None else experiment.scan.image_range


def _batch_header(
    experiment: Experiment, image: int, offset: int, dataset: int
) -> gemmi.Mtz.Batch:
    """Header of one image (layout: CCP4 ``cmtzlib``, MTZBAT).

    Directions are in the Cambridge frame: z along the rotation axis, x near the direction in
    which the beam travels.
    """
    setting = _setting_at(experiment, image)
    b = np.linalg.cholesky(setting.T @ setting).T  # a* along x, b* in the xy plane
    to_cambridge = _cambridge_frame(experiment)
    u = to_cambridge @ setting @ np.linalg.inv(b)
    batch = gemmi.Mtz.Batch()
    batch.number = image + offset
    batch.title = f"Batch {image + offset}"
    batch.dataset_id = dataset
    batch.wavelength = experiment.beam.wavelength
    # 12: one crystal; 14: 2 = area-detector data; 15, 17: one goniometer axis, which is scanned;
    # 18: beam flag 0 (no divergence given); 19: one detector
    for index, value in {12: 1, 14: 2, 15: 1, 17: 1, 19: 1}.items():
        batch.ints[index] = value
    values: dict[int, Sequence[float]] = {
        0: Crystal(setting, experiment.crystal.space_group).unit_cell.parameters,
        6: u.T.ravel(),  # column by column
        43: [1.0],  # batch scale
        80: [-1.0, 0.0, 0.0],  # idealised source vector
        83: to_cambridge @ experiment.beam.s0 * -experiment.beam.wavelength,
    }
    if experiment.scan is not None and experiment.goniometer is not None:
        batch.axes = ["PHI"]
        width = experiment.scan.oscillation[1]
        start = float(experiment.scan.phi_deg(image - experiment.scan.image_range[0]))
        values |= {36: [start, start + width], 47: [width]}
        values |= {38: [0.0, 0.0, 1.0], 59: [0.0, 0.0, 1.0]}  # scan axis, goniometer axis E1
    if experiment.panels:
        panel = experiment.panels[0]  # the header has room for one
        distance = panel.origin @ np.cross(panel.fast_axis, panel.slow_axis)
        values |= {111: [abs(distance)], 113: [0.0, panel.image_size[0], 0.0, panel.image_size[1]]}
    for first, numbers in values.items():
        for index, value in enumerate(numbers, first):
            batch.floats[index] = float(value)
    return batch


def _setting_at(experiment: Experiment, image: int) -> Array:
    """Return the laboratory setting matrix (3, 3) at mid-image with the rotation undone."""
    crystal, goniometer = experiment.crystal, experiment.goniometer
    setting = crystal.A
    if crystal.A_at_scan_points is not None and experiment.scan is not None:
        index = image - experiment.scan.image_range[0]
        setting = crystal.A_at_scan_points[index : index + 2].mean(axis=0)
    if goniometer is None:
        return setting
    return goniometer.setting_rotation @ goniometer.fixed_rotation @ setting


def _cambridge_frame(experiment: Experiment) -> Array:
    """Rotation (3, 3) from the laboratory to the Cambridge frame."""
    beam = experiment.beam.s0 / np.linalg.norm(experiment.beam.s0)
    if experiment.goniometer is None:
        z = np.cross(beam, np.eye(3)[np.argmin(np.abs(beam))])
    else:
        z = experiment.goniometer.lab_axis
    z = z / np.linalg.norm(z)
    x = beam - (beam @ z) * z
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z])


def read_unmerged_mtz(path: str | Path) -> UnmergedMtz:
    """Read observations with their original indices.

    Raises
    ------
    UserError
        Not a readable MTZ file, merged, or without intensities; the message names what was found.
    """
    mtz = load_mtz(path)
    labels = mtz.column_labels()
    isym = next((name for name in ("M/ISYM", "M_ISYM") if name in labels), None)
    if isym is None or "BATCH" not in labels:
        raise UserError(
            f"{path} is not an unmerged MTZ file (no M/ISYM and BATCH columns; found "
            f"{' '.join(labels)}); give the unmerged file of the same data"
        )
    if not {"I", "SIGI"} <= set(labels):
        raise UserError(
            f"{path} has no columns I and SIGI; found {' '.join(labels)}; write the intensities "
            "under these labels"
        )
    mtz.switch_to_original_hkl()
    columns = {c.label: np.array(c, dtype=np.float64) for c in mtz.columns[3:]}
    del columns[isym]
    return UnmergedMtz(
        mtz.make_miller_array().astype(np.int32),
        columns.pop("BATCH").astype(np.int64),
        columns.pop("I"),
        columns.pop("SIGI"),
        columns,
        mtz.cell,
        mtz.spacegroup,
        mtz.datasets[-1].wavelength if len(mtz.datasets) else 0.0,
    )
