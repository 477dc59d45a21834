"""What a run needs of a file of shoeboxes: rows that are spots of the sweeps that it describes.

A file can be read, and be looked at, with less (:mod:`braggflux.integrator.io.shoebox_format`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import gemmi
import h5py
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from braggflux.integrator.crystal.cell import d_spacing
from braggflux.integrator.io.dials.sweeps import check_complete
from braggflux.integrator.io.schema import converted
from braggflux.integrator.types import Flag

#: Column -> lowest and highest value of what a run integrates. The variance of a frame is 1/12.
OF_SPOTS: Mapping[str, tuple[float, float]] = {
    "zeta": (1e-3, 1.001),
    "frame_sigma": (0.28, 1e5),
    "frames_per_layer": (1, 1e6),
    "lp": (1e-9, 1e9),  # large at 90 degrees in the plane of polarization
    "s1": (-200.0, 200.0),
    "s0_crystal": (-1.001, 1.001),
    "s1_crystal": (-1.001, 1.001),
    "xyz_mm": (-1e6, 1e6),
    "recorded_fraction": (0.0, 1.001),
    "entering": (0, 1),
}
#: Relative difference of a spacing from that of the cell: cells vary along a scan.
CELL_CHANGE = 0.1
ROWS = 1 << 20
"""Rows that are compared with the cell at a time: bounds the memory."""

Width = Annotated[float, Meta(ge=1e-4, le=1e3)]
Part = Annotated[float, Meta(ge=0.0, le=1e3)]


class Head(Struct):
    """Attributes that a run uses: extents of spots [px, px, deg], parts of the rocking width."""

    max_count: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    extent: tuple[Width, Width, Width]
    rocking: tuple[Part, Part] = (1.0, 0.0)


def check_for_run(
    handle: h5py.File,
    attributes: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    columns: Mapping[str, NDArray[Any]],
) -> None:
    """Refuse a file that no model can be built on.

    Parameters
    ----------
    handle : h5py.File
    attributes : mapping
        Of the file.
    records : sequence of mapping
        Of each sweep.
    columns : mapping of str to (N, ...) array
        Of ``/reflections``.

    Raises
    ------
    ValueError
    """
    check_head(attributes)
    check_complete(records)
    for number, record in enumerate(records):
        check_background(handle[f"background/{number}"], record)
    check_rows(columns, records, handle["boxes/counts"].shape[1:])


def check_head(attributes: Mapping[str, Any]) -> None:
    """Refuse attributes that no extraction writes.

    Raises
    ------
    ValueError
    """
    plain = {
        k: v.tolist() if isinstance(v, np.generic | np.ndarray) else v
        for k, v in attributes.items()
    }
    head = converted(plain, Head)
    if not any(head.rocking):
        raise ValueError("rocking curves without width")


def check_background(group: h5py.Group, record: Mapping[str, Any]) -> None:
    """Refuse the background of a sweep that does not have its panels and frames.

    Raises
    ------
    ValueError
    """
    first, last = record["image_range"]
    shapes = [tuple(shape) for shape in record["panel_shapes"]]
    found = [
        [group[f"panel_{p}/{name}"].shape for p in range(len(group) - 1)]
        for name in ("sum", "count")
    ]
    if found != [shapes, shapes]:
        raise ValueError(f"background of {found}, panels are {shapes}")
    if group["frame_ratio"].shape != (last - first + 1,):
        raise ValueError(f"background of {group['frame_ratio'].shape} frames, {first} to {last}")


def check_rows(
    columns: Mapping[str, NDArray[Any]],
    records: Sequence[Mapping[str, Any]],
    box: tuple[int, int, int],
) -> None:
    """Refuse rows that are no spots of the sweeps, in their boxes.

    Parameters
    ----------
    columns : mapping of str to (N, ...) array
    records : sequence of mapping
        Complete ones, of each sweep.
    box : (int, int, int)
        (frames, slow, fast)

    Raises
    ------
    ValueError
    """
    # those that graze the axis have a zeta near 0, and are not integrated
    is_used = columns["flags"] & Flag.REJECTED == 0
    for name, (low, high) in OF_SPOTS.items():
        values = columns[name][is_used]
        if len(values) and not (values.min() >= low and values.max() <= high):
            raise ValueError(
                f"column {name} has values from {values.min()} to {values.max()}, "
                f"{low:g} to {high:g} are possible"
            )
    if (columns["refl_row"] != np.arange(len(columns["refl_row"]))).any():
        raise ValueError("refl_row does not number the boxes from 0 on")
    sweep, panel = (columns[name].astype(np.int64) for name in ("experiment", "panel"))
    n_panels = np.array([len(record["panel_shapes"]) for record in records])
    if len(sweep) and not (sweep.min() >= 0 and sweep.max() < len(records)):
        raise ValueError(f"rows of sweep {sweep.max()}, {len(records)} are described")
    if ((panel < 0) | (panel >= n_panels[sweep])).any():
        raise ValueError(f"rows of panel {panel.max()}, sweeps have {max(n_panels)}")
    for first in range(0, len(sweep), ROWS):
        part = {name: values[first : first + ROWS] for name, values in columns.items()}
        _check_places(part, box)
        _check_spacings(part, records)


def _check_places(columns: Mapping[str, NDArray[Any]], box: tuple[int, int, int]) -> None:
    """Refuse centroids outside of their boxes: nothing of such a spot is recorded."""
    size = np.tile(np.array(box), (len(columns["corner"]), 1))
    size[:, 0] *= columns["frames_per_layer"]
    place = columns["xyz_px"][:, ::-1] - columns["corner"]
    outside = ((place < -1) | (place > size + 1)).any(axis=1)
    if outside.any():
        raise ValueError(f"row {columns['refl_row'][outside][0]} lies outside of its box")


def _check_spacings(
    columns: Mapping[str, NDArray[Any]], records: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse spacings that are not those of the index, or that no beam of the sweep reaches."""
    for number, record in enumerate(records):
        own = columns["experiment"] == number
        index, d = columns["miller_index"][own], columns["d"][own]
        if not (d > 0.45 * record["wavelength"]).all():
            raise ValueError(
                f"spacings from {d.min():g} A, the wavelength is {record['wavelength']} A"
            )
        of_cell = d_spacing(index, gemmi.UnitCell(*record["unit_cell"]))
        wrong = index.any(axis=1) & ~(np.abs(of_cell / d - 1) < CELL_CHANGE)
        if wrong.any():
            k = int(np.argmax(wrong))
            raise ValueError(
                f"{index[k].tolist()} has d = {d[k]:g} A, by the unit cell {of_cell[k]:g} A"
            )
