"""Frame coordinates of DIALS tables: array indices there, counted from the scan's start here.

DIALS' z is an *array index*: image n covers ``n - 1 <= z < n``, so that z of a scan begins at
``image_range[0] - 1``, whatever the image numbers are. Inside this program z is 0 at the start of
the first image of its own scan (:mod:`braggflux.integrator.crystal.geometry`). Here, and nowhere
else, one becomes the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials.reflections import ReflectionTable, match_experiments

#: Columns whose third component is a frame coordinate.
_POSITIONS = ("xyzcal.px", "xyzobs.px.value")
#: Angles and positions of one table may differ by so many frames.
_MAX_FRAMES_OFF = 0.3
_REMEDY = (
    "give the .expt of the same DIALS step; tables of earlier versions of braggflux counted from "
    "0 and must be made again"
)


def place_on_scans(
    table: ReflectionTable, experiments: Sequence[Experiment]
) -> tuple[ReflectionTable, NDArray[np.int64]]:
    """Count the frames of a table, as it was read, from the start of each row's scan.

    Parameters
    ----------
    table : ReflectionTable
        With DIALS' array indices.
    experiments : sequence of Experiment
        Those of the same step, all of them.

    Returns
    -------
    table : ReflectionTable
        ``xyzcal.px``, ``xyzobs.px.value`` and ``bbox`` (those that there are) with z = 0 at the
        start of the first image of the scan.
    number : ndarray, (N,) int64
        Position of each row's experiment, -1 for none: :func:`match_experiments`.

    Raises
    ------
    UserError
        The files do not belong together; no predicted reflection of a sweep lies on its images;
        or the table's own angles (``xyzcal.mm``) contradict its frames.
    """
    number = match_experiments(table, experiments)
    placed = _shifted(table, number, -_starts(experiments))
    _check_frames(placed, experiments, number)
    return placed, number


def to_array_index(table: ReflectionTable, experiments: Sequence[Experiment]) -> ReflectionTable:
    """Undo :func:`place_on_scans`, for a table that is to be written.

    Parameters
    ----------
    table : ReflectionTable
        Frames counted from the start of each row's scan.
    experiments : sequence of Experiment
    """
    return _shifted(table, match_experiments(table, experiments), _starts(experiments))


def _starts(experiments: Sequence[Experiment]) -> NDArray[np.int64]:
    """Array index at which each scan begins, (E,); 0 without a scan."""
    return np.array([0 if e.scan is None else e.scan.array_range[0] for e in experiments], int)


def _shifted(
    table: ReflectionTable, number: NDArray[np.int64], by_experiment: NDArray[np.int64]
) -> ReflectionTable:
    """Add frames to the rows of each experiment; positions of zeros say that there is none."""
    shift = np.where(number >= 0, np.append(by_experiment, 0)[number], 0)
    columns = dict(table.columns)
    for name in _POSITIONS:
        if name in columns:
            known = columns[name].any(axis=1)
            columns[name] = columns[name] + (shift * known)[:, None] * (0, 0, 1)
    if "bbox" in columns:
        box = columns["bbox"]
        columns["bbox"] = (box + shift[:, None] * (0, 0, 0, 0, 1, 1)).astype(box.dtype)
    return ReflectionTable(columns, dict(table.identifiers), table.source)


def _check_frames(
    table: ReflectionTable, experiments: Sequence[Experiment], number: NDArray[np.int64]
) -> None:
    """Refuse a table none of which lies on its scan, or that contradicts its own angles."""
    if "xyzcal.px" not in table:
        return
    z = table["xyzcal.px"][:, 2]
    known = table["xyzcal.px"].any(axis=1)  # rows without a prediction hold zeros
    phi = table["xyzcal.mm"][:, 2] if "xyzcal.mm" in table else None
    for i, experiment in enumerate(experiments):
        scan, rows = experiment.scan, known & (number == i)
        if scan is None or experiment.is_still or not rows.any():
            continue
        first, last = scan.image_range
        low, high = z[rows].min() + first - 1, z[rows].max() + first - 1
        if low >= last or high < first - 1:
            raise UserError(
                f"none of the {rows.sum()} reflections of {table.source} falls on the frames: "
                f"their frame coordinates (xyzcal.px) are {low:.1f} to {high:.1f}, those of "
                f"images {first}-{last} are {first - 1} to {last}; {_REMEDY}"
            )
        if phi is None:
            continue
        off = np.degrees(phi[rows]) - scan.phi_deg(z[rows])
        off = (off + 180.0) % 360.0 - 180.0  # a scan may go round more than once
        frames = float(np.median(off / scan.oscillation[1]))
        if abs(frames) > _MAX_FRAMES_OFF:
            raise UserError(
                f"{table.source} contradicts itself: by their angles (xyzcal.mm) its reflections "
                f"lie {frames:+.1f} frames from their frame coordinates (xyzcal.px, from "
                f"{first - 1} on for images {first}-{last}); {_REMEDY}"
            )
