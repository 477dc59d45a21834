"""The stage contract on disk: an :class:`IntensityTable` in one HDF5 file, ``intensities.h5``.

Columns, units and versions: ``docs/files.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.dials.sweeps import checked_records
from braggflux.integrator.io.hdf5.checked import (
    CHECKSUM,
    read_attributes,
    read_text,
    write_attributes,
    write_text,
    writing_checked,
)
from braggflux.integrator.io.hdf5.columns import read_columns
from braggflux.integrator.records import TensorRecord
from braggflux.integrator.types import IntensityTable, ReflectionMetadata
from braggflux.integrator.version import software

if TYPE_CHECKING:
    import h5py

Record = TypeVar("Record", bound=TensorRecord)

# h5py is imported by the functions that open a file: 10 MiB that a merge of MTZ files, which
# imports this module, does without.

FORMAT = "braggflux-intensities"
VERSION = 4
EXPERIMENTS = "experiments"
REMEDY = "make it again with `braggflux run`"
UNITS = {
    "xyz_px": "pixels, pixels, frames from the start of the scan",
    "xyz_mm": "mm, mm, rad",
    "s1": "1/A",
    "d": "A",
    "frame_sigma": "frames",
    "corner": "frame, slow, fast array index",
    "effective_counts": "photons",
    "effective_background": "photons",
    "background": "photons/pixel",
}
#: Version 3 has no checksums, and the sweeps in an attribute.
WITHOUT_CHECKSUMS = 3
#: Version 2 lacks zeta and the corner of the box.
WITHOUT_ZETA = 2
#: Version 1 came from boxes that could lie on wrong frames of scans not starting at image 1.
RIGHT_FROM_IMAGE_1 = 1


def write_intensities(
    path: str | Path, table: IntensityTable, experiments: Sequence[Mapping[str, object]] = ()
) -> None:
    """Write every column under its own name; the file appears only when complete.

    Parameters
    ----------
    path : str or Path
    table : IntensityTable
    experiments : sequence of mapping
        Of each sweep, JSON values: ``unit_cell``, ``space_group``, ``image_range``,
        ``oscillation_deg`` and more, as the shoebox store has them.
    """
    with writing_checked(path) as handle:
        head = {"format": FORMAT, "version": VERSION, "software": software()}
        write_attributes(handle, head)
        write_text(handle, EXPERIMENTS, json.dumps(list(experiments)))
        for name, values in table.detach().to("cpu").columns().items():
            column = handle.create_dataset(
                name, data=values.numpy(), compression="gzip", compression_opts=1, **CHECKSUM
            )
            if name in UNITS:
                write_attributes(column, {"units": UNITS[name]})
            handle.require_written()


def read_intensities(path: str | Path) -> IntensityTable:
    """Read what :func:`write_intensities` wrote.

    Raises
    ------
    UserError
        Not such a file, another version, or a column is missing.
    """
    import h5py

    with reading(path, REMEDY), h5py.File(path) as handle:
        version, records = require_readable(handle, path)
        columns = {
            name: torch.as_tensor(values)
            for name, values in read_columns(handle, without=EXPERIMENTS).items()
        }
        if version >= WITHOUT_CHECKSUMS:
            metadata = _record(ReflectionMetadata, columns)
        else:
            metadata = _without_zeta(columns, records)
        return IntensityTable(
            metadata,
            _record(ShiftedPoisson, columns),
            columns["background"],
            columns["flags"],
        )


def require_readable(handle: h5py.File, path: str | Path) -> tuple[int, list[dict[str, Any]]]:
    """Return the version and the sweeps of an open intensity file.

    Raises
    ------
    UserError
        Not such a file, or another version.
    """
    attributes = read_attributes(handle)
    version = attributes.get("version")
    records = _experiments(handle)
    starts = {record.get("image_range", (1,))[0] for record in records}
    known = {VERSION, WITHOUT_CHECKSUMS, WITHOUT_ZETA}
    known |= {RIGHT_FROM_IMAGE_1} if starts <= {1} else set()
    if attributes.get("format") != FORMAT or version not in known:
        raise UserError(
            f"{path} is no intensity file of version {WITHOUT_ZETA} to {VERSION}, or "
            f"{RIGHT_FROM_IMAGE_1} of scans from image 1 (found "
            f"{(attributes.get('format'), version)}, scans from {sorted(starts)}); make "
            "it again with `braggflux run`"
        )
    return int(version), records


def _record(kind: type[Record], columns: Mapping[str, Tensor]) -> Record:
    return kind(**{f.name: columns[f.name] for f in fields(kind)})


def _without_zeta(
    columns: Mapping[str, Tensor], records: Sequence[Mapping[str, Any]]
) -> ReflectionMetadata:
    """Metadata of files before version 3: zeta is guessed, the place of the box is 0.

    The width of a rocking curve is proportional to 1 / zeta: the narrowest one is near zeta = 1.
    """
    n = len(columns["frame_sigma"])
    unknown = {"zeta": torch.ones(n), "corner": torch.zeros(n, 3, dtype=torch.int64)}
    unknown["frames_per_layer"] = torch.zeros(n, dtype=torch.int64)
    metadata = _record(ReflectionMetadata, {**columns, **unknown})
    widths = torch.tensor([abs(r["oscillation_deg"][1]) for r in records] or [1.0]).double()
    degrees = metadata.rocking_sigma * widths[metadata.experiment.clamp_max(len(widths) - 1)]
    return replace(metadata, zeta=degrees.min() / degrees if n else degrees)


def read_experiment_records(path: str | Path) -> list[dict[str, Any]]:
    """Sweeps of an intensity file as :func:`write_intensities` was given them; [] without."""
    import h5py

    with reading(path, REMEDY), h5py.File(path) as handle:
        return _experiments(handle)


def _experiments(handle: h5py.File) -> list[dict[str, Any]]:
    if EXPERIMENTS in handle:
        text = read_text(handle[EXPERIMENTS])
    else:
        text = handle.attrs.get(EXPERIMENTS, "[]")
    return checked_records(json.loads(text))
