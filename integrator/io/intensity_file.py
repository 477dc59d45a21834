"""The stage contract on disk: an :class:`IntensityTable` in one HDF5 file (staged coupling)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from braggflux.integrator.atomic import replacing
from braggflux.integrator.errors import UserError
from braggflux.integrator.types import IntensityTable

# h5py is imported by the functions that open a file: 10 MiB that a merge of MTZ files, which
# imports this module, does without.

FORMAT = "braggflux-intensities"
VERSION = 2
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
    import h5py

    with replacing(Path(path)) as temporary, h5py.File(temporary, "w") as handle:
        handle.attrs.update({"format": FORMAT, "version": VERSION})
        if experiments:
            handle.attrs["experiments"] = json.dumps(list(experiments))
        for field in fields(table):
            values = getattr(table, field.name).detach().cpu().numpy()
            handle.create_dataset(field.name, data=values, compression="gzip", compression_opts=1)


def read_intensities(path: str | Path) -> IntensityTable:
    """Read what :func:`write_intensities` wrote.

    Raises
    ------
    UserError
        Not such a file, another version, or a column is missing.
    """
    import h5py

    try:
        with h5py.File(path) as handle:
            found = (handle.attrs.get("format"), handle.attrs.get("version"))
            records = json.loads(handle.attrs.get("experiments", "[]"))
            starts = {record.get("image_range", (1,))[0] for record in records}
            is_old = found == (FORMAT, RIGHT_FROM_IMAGE_1) and starts <= {1}
            if found != (FORMAT, VERSION) and not is_old:
                raise UserError(
                    f"{path} is no intensity file of version {VERSION}, or {RIGHT_FROM_IMAGE_1} "
                    f"of scans from image 1 (found {found}, scans from {sorted(starts)}); write "
                    "it again with `braggflux run --coupling staged`"
                )
            return IntensityTable(
                **{f.name: torch.as_tensor(handle[f.name][()]) for f in fields(IntensityTable)}
            )
    except (OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read as an intensity file: {error}") from error


def is_intensity_file(path: str | Path) -> bool:
    """Whether an HDF5 file says that it is one of these."""
    import h5py

    try:
        with h5py.File(path) as handle:
            return handle.attrs.get("format") == FORMAT
    except OSError:
        return False


def read_experiment_records(path: str | Path) -> list[dict]:
    """Sweeps of an intensity file as :func:`write_intensities` was given them; [] without."""
    import h5py

    with h5py.File(path) as handle:
        return json.loads(handle.attrs.get("experiments", "[]"))
