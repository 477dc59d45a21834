"""Observations of XDS: XDS_ASCII.HKL of CORRECT and XSCALE, and INTEGRATE.HKL.

What the items mean: "Files" in the documentation of XDS. Coordinates along the scan (ZD, ZCAL) are
image numbers less one half at the middle of an image, so that the image ``n`` lasts from ``n - 1``
to ``n``, and the angle is ``STARTING_ANGLE + OSCILLATION_RANGE (ZD - STARTING_FRAME + 1)``.
"""

from __future__ import annotations

import logging
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal.corrections import lp_correction
from braggflux.integrator.errors import UserError
from braggflux.merge.io.dataset_split import split_sets
from braggflux.merge.io.formats.text_files import stem_of
from braggflux.merge.io.formats.unmerged_mtz import offsets_of
from braggflux.merge.io.formats.xds_text import XdsText, read_text
from braggflux.merge.io.observations import UnmergedData, make_unmerged
from braggflux.merge.io.sweep_columns import (
    FRAME,
    FRAME_WIDTH,
    SWEEP,
    beam_columns,
    diffracted_beams,
)

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: How a file begins.
XDS_ASCII, INTEGRATE = b"!FORMAT=XDS_ASCII", b"!OUTPUT_FILE=INTEGRATE.HKL"
#: Items under one name, whichever program wrote them.
_RENAMED = {
    "SIGMA(IOBS)": "SIGMA",
    **{"XCAL": "XD", "YCAL": "YD", "ZCAL": "ZD"},
}
_REQUIRED = ("H", "K", "L", "IOBS", "SIGMA", "XD", "YD", "ZD")
#: Items that become metadata under their own names, where a file has them.
_METADATA = ("PEAK", "CORR", "MAXC", "PSI", "ISEG", "DCY")
#: Largest median angle between a reflection and its place on the Ewald sphere [rad] with which the
#: orientation in the header is believed. It is of the whole scan: a crystal may slip a little.
CLOSURE = 0.02
#: Wavelengths of in-house sources (Cr, Cu, Ga, Mo, Ag) and how close one must be [A].
IN_HOUSE = ((2.29, 0.01), (1.5418, 0.0019), (1.3414, 0.0005), (0.7107, 0.0005), (0.5608, 0.0005))
#: FRACTION_OF_POLARIZATION at synchrotrons, and POLARIZATION_PLANE_NORMAL.
SYNCHROTRON, NORMAL = 0.99, (0.0, 1.0, 0.0)


def read_xds(path: str | Path, space_group: gemmi.SpaceGroup | None = None) -> list[UnmergedData]:
    """Read the observations of one file.

    Intensities are corrected for Lorentz and polarization factors (RLP). Those of INTEGRATE.HKL
    are corrected for an unpolarized beam there; here for that of a synchrotron, unless the
    wavelength is one of :data:`IN_HOUSE`. Misfits (negative SIGMA) are left out, as by XSCALE.

    Metadata: ``BATCH`` (the image; of later sets of XSCALE, beginning at a thousand of its own)
    ``XDET YDET`` and what the file has of ``PEAK CORR MAXC PSI ISEG DCY``; where the header
    describes the scan, ``ROT`` and :data:`~braggflux.merge.io.sweep_columns.SWEEP_COLUMNS`.

    Parameters
    ----------
    path : str or Path
        May be compressed (gzip).
    space_group : gemmi.SpaceGroup, optional
        Instead of that of the header.

    Returns
    -------
    list of UnmergedData
        One for each wavelength among the sets of XSCALE.

    Raises
    ------
    UserError
        Not a file of unmerged reflections, damaged, without cell or space group, or of several
        crystal forms.
    """
    text = read_text(Path(path))
    columns = {_RENAMED.get(name, name): column for name, column in text.columns.items()}
    _check(text, columns)
    is_misfit = columns["SIGMA"] < 0.0
    if is_misfit.any():
        log.info("%s: %d misfits (SIGMA < 0) are left out", path, is_misfit.sum())
        columns = {name: column[~is_misfit] for name, column in columns.items()}
    if is_misfit.all():
        raise UserError(
            f"{path}: all {len(is_misfit)} observations are misfits; give another file"
        )
    metadata = _metadata(text, columns)
    sets = columns.get("ISET", np.zeros(len(columns["H"]))).astype(int)
    numbers = np.unique(sets).tolist()
    cells = {k: _cell(text, k) for k in numbers}
    wavelengths = {k: (text.numbers("X-RAY_WAVELENGTH", iset=k) or [0.0])[0] for k in numbers}
    cell = cells[numbers[0]]
    data = make_unmerged(
        source=str(path),
        miller_index=np.stack([columns[axis] for axis in "HKL"], axis=1),
        intensity=columns["IOBS"],
        sigma=columns["SIGMA"],
        image_label=metadata["BATCH"],
        metadata=metadata,
        wavelength=None,
        cell=cell,
        space_group=space_group or _space_group(text, cell),
        name=stem_of(text.path),
        has_lp_applied=True,
    )
    return split_sets(data, metadata["BATCH"], sets, wavelengths, cells)


def _check(text: XdsText, columns: dict[str, Array]) -> None:
    """Refuse what is merged or lacks a column."""
    if text.header.get("MERGE", "FALSE").startswith("T"):
        raise UserError(
            f"{text.path} is merged (MERGE=TRUE); give XDS_ASCII.HKL of CORRECT, or write the "
            "file with MERGE=FALSE in XSCALE.INP"
        )
    if missing := [name for name in _REQUIRED if name not in columns]:
        raise UserError(
            f"{text.path} has no column {' '.join(missing)} (it has {' '.join(text.columns)}); "
            "give XDS_ASCII.HKL, INTEGRATE.HKL or the unmerged output of XSCALE"
        )
    # DIALS, which does not name an OUTPUT_FILE, writes TRUE and has scaled nothing
    is_scaled = "OUTPUT_FILE" in text.header
    if is_scaled and text.header.get("FRIEDEL'S_LAW", "FALSE").startswith("T"):
        log.warning(
            "%s: scales and misfits were found with FRIEDEL'S_LAW=TRUE; for anomalous differences "
            "run CORRECT with FRIEDEL'S_LAW=FALSE",
            text.path,
        )


def _metadata(text: XdsText, columns: dict[str, Array]) -> dict[str, Array]:
    """Metadata of all rows; corrects intensities of INTEGRATE.HKL in place."""
    z = columns["ZD"]
    image = np.floor(z) + 1.0
    if bounds := text.numbers("DATA_RANGE", 2):
        image = np.clip(image, *bounds)  # a centroid may be predicted just outside the scan
    first = float(image.min()) if bounds is None else bounds[0]
    batch = image + _offset(image, columns)
    metadata = {"BATCH": batch, "XDET": columns["XD"], "YDET": columns["YD"]}
    metadata |= {name: columns[name] for name in _METADATA if name in columns}
    start, width = text.numbers("STARTING_ANGLE"), text.numbers("OSCILLATION_RANGE")
    axis, beams = text.numbers("ROTATION_AXIS", 3), None
    if start and width and width[0] != 0.0:
        zero = (text.numbers("STARTING_FRAME") or [1.0])[0] - 1.0
        metadata["ROT"] = start[0] + width[0] * (z - zero)
        beams = _beams(text, columns, metadata["ROT"], axis)
    if "FORMAT" not in text.header:
        _correct_polarization(text, columns, beams)
    if beams is None or axis is None:
        return metadata
    n = np.ones(len(z))
    metadata |= {SWEEP: 0.0 * n, FRAME: z - first + 1.0, FRAME_WIDTH: abs(width[0]) * n}
    return metadata | beam_columns(*beams, metadata["ROT"], _unit(axis))


def _offset(image: Array, columns: dict[str, Array]) -> Array | float:
    """Offset of the batch number from the image, so that those of no two sets are the same."""
    if "ISET" not in columns:
        return 0.0
    sets, which = np.unique(columns["ISET"], return_inverse=True)
    images = [image[which == i] for i in range(len(sets))]
    return np.array(offsets_of([(int(i.min()), int(i.max())) for i in images]))[which]


def _beams(
    text: XdsText, columns: dict[str, Array], phi: Array, axis: list[float] | None
) -> tuple[Array, Array] | None:
    """Return unit vectors along the incident and diffracted beams, (3,) or (N, 3), if known."""
    if {"ALF0", "BET0", "ALF1", "BET1"} <= columns.keys():
        return tuple(_polar(columns[f"ALF{i}"], columns[f"BET{i}"]) for i in (0, 1))
    beam, wavelength = text.numbers("INCIDENT_BEAM_DIRECTION", 3), text.numbers("X-RAY_WAVELENGTH")
    cell = [text.numbers(f"UNIT_CELL_{name}-AXIS", 3) for name in "ABC"]
    if None in (axis, beam, wavelength, *cell):
        return None
    index = np.stack([columns[name] for name in "HKL"], axis=1)
    fixed = index @ np.linalg.inv(cell).T * wavelength[0]
    s0 = _unit(beam)
    s1, offset = diffracted_beams(fixed, phi, _unit(axis), s0)
    miss = np.median(np.abs(offset) / np.linalg.norm(fixed, axis=1))
    if miss < CLOSURE:
        return s0, s1
    log.warning("%s: the orientation in the header does not fit (by %.2g rad)", text.path, miss)
    return None


def _polar(alpha: Array, beta: Array) -> Array:
    a, b = np.radians(alpha), np.radians(beta)
    return np.stack([np.sin(b) * np.cos(a), np.sin(b) * np.sin(a), np.cos(b)], axis=1)


def _unit(vector: ArrayLike) -> Array:
    return np.asarray(vector) / np.linalg.norm(vector)


def _correct_polarization(
    text: XdsText, columns: dict[str, Array], beams: tuple[Array, Array] | None
) -> None:
    """Divide by the polarization factor of the source instead of an unpolarized beam's."""
    wavelength = (text.numbers("X-RAY_WAVELENGTH") or [0.0])[0]
    given = text.numbers("FRACTION_OF_POLARIZATION")
    if given is None and any(abs(wavelength - line) < near for line, near in IN_HOUSE):
        log.info("%s: the beam counts as unpolarized (an in-house wavelength)", text.path)
        return
    if beams is None:
        raise UserError(
            f"{text.path} does not say the directions of the beams, by which intensities of "
            "INTEGRATE are corrected for polarization; give XDS_ASCII.HKL of the same data"
        )
    fraction = SYNCHROTRON if given is None else given[0]
    if given is None:
        log.warning(
            "%s: INTEGRATE takes the beam for unpolarized; corrected to a fraction of "
            "polarization of %.2f, plane normal %g %g %g, as at synchrotrons. If that is wrong, "
            "give XDS_ASCII.HKL",
            *(text.path, fraction, *NORMAL),
        )
    s0, s1 = _unit(np.median(np.atleast_2d(beams[0]), axis=0)), beams[1]
    normal = np.array(text.numbers("POLARIZATION_PLANE_NORMAL", 3) or NORMAL)
    normal = _unit(normal - (normal @ s0) * s0)  # its part along the beam does not count
    factor = lp_correction(s1, s0, None, normal, fraction)
    factor /= lp_correction(s1, s0, None, normal, 0.5)
    for name in ("IOBS", "SIGMA"):
        columns[name] = columns[name] * factor


def _cell(text: XdsText, iset: int | None = None) -> gemmi.UnitCell:
    cell = text.numbers("UNIT_CELL_CONSTANTS", 6, iset)
    if cell is None:
        raise UserError(
            f"{text.path} does not say its cell (UNIT_CELL_CONSTANTS=); give the file as CORRECT, "
            "XSCALE or INTEGRATE wrote it"
        )
    return gemmi.UnitCell(*cell)


def _space_group(text: XdsText, cell: gemmi.UnitCell) -> gemmi.SpaceGroup:
    number = text.numbers("SPACE_GROUP_NUMBER")
    group = gemmi.find_spacegroup_by_number(int(number[0])) if number else None
    if group is None or number[0] < 1:  # gemmi takes 0 for P 1
        found = "none" if number is None else f"{number[0]:g}"
        raise UserError(
            f"{text.path} does not say its space group (SPACE_GROUP_NUMBER= {found}); give it "
            "with --space-group, for example P43212"
        )
    # hexagonal or rhombohedral axes, by the angles
    return gemmi.find_spacegroup_by_name(group.hm, cell.alpha, cell.gamma) or group
