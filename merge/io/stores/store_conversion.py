"""From files that may not fit in memory to a store of observations sorted by image.

Streams come image by image. MTZ files are sorted by index, so that their rows are first dealt out
to files of neighbouring images, and those are then sorted one by one (a bucket sort on disk).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.merge.io.dataset_split import check_only_one
from braggflux.merge.io.formats.crystfel_stream import stream_chunks
from braggflux.merge.io.formats.mtz_datasets import mtz_datasets
from braggflux.merge.io.formats.mtz_observations import (
    DATA_OFFSET,
    PARTIAL_FLAG,
    batch_column,
    check_complete,
    isym_column,
    observations_of,
    read_mtz,
)
from braggflux.merge.io.formats.unmerged_data import read_unmerged
from braggflux.merge.io.formats.unmerged_mtz import tidied
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.screening import screened
from braggflux.merge.io.stores.chosen_group import in_group
from braggflux.merge.io.stores.unmerged_store import write_unmerged_store

#: Rows in memory at a time: of 20 columns, 160 MB.
ROWS_AT_A_TIME = 2_000_000


def convert_to_store(
    source: str | Path,
    target: str | Path,
    *,
    space_group: gemmi.SpaceGroup | None = None,
    cell: gemmi.UnitCell | None = None,
    rows_at_a_time: int = ROWS_AT_A_TIME,
) -> None:
    """Write the observations of a file to a store.

    Memory does not depend on the number of images of MTZ files and CrystFEL streams. Partials
    are not summed here; copies of rows are left out where they are read together, which those of
    one image are.

    Parameters
    ----------
    source : str or Path
        Of any format of :mod:`braggflux.merge.io.formats.unmerged_data`.
    target : str or Path
        The store, and during the work as much again beside it.
    space_group : gemmi.SpaceGroup, optional
        Instead of that of the file; a stream does not know it.
    cell : gemmi.UnitCell, optional
        Of a file that does not know it.
    rows_at_a_time : int

    Raises
    ------
    UserError
        As the readers; or an MTZ file holds partials, or a file several datasets.
    """
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of unmerged reflections")
    if path.suffix == ".stream":
        write_unmerged_store(target, map(screened, stream_chunks(path, space_group)))
    elif path.suffix == ".mtz":
        with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
            chunks = _mtz_chunks(path, Path(folder), rows_at_a_time)
            write_unmerged_store(target, map(screened, _in_group(chunks, space_group)))
    else:
        chunks = _one_dataset(path, space_group, cell)
        write_unmerged_store(target, map(screened, _in_group(chunks, space_group)))


def _in_group(
    chunks: Iterator[UnmergedData], space_group: gemmi.SpaceGroup | None
) -> Iterator[UnmergedData]:
    for data in chunks:
        yield data if space_group is None else in_group(data, space_group)


def _one_dataset(
    path: Path, space_group: gemmi.SpaceGroup | None, cell: gemmi.UnitCell | None
) -> Iterator[UnmergedData]:
    """Read a file of another kind as a whole; a store holds one dataset."""
    data = read_unmerged([path], space_group=space_group, cell=cell)
    check_only_one([d.name for d in data], path)
    yield data[0]


def _mtz_chunks(path: Path, folder: Path, rows_at_a_time: int) -> Iterator[UnmergedData]:
    """Observations of neighbouring images, about ``rows_at_a_time`` of them."""
    mtz = _header(path)
    batch_label = batch_column(mtz)
    if batch_label is None or mtz.nreflections <= rows_at_a_time:
        yield read_mtz(path)
        return
    column = mtz.column_labels().index(batch_label)
    batches, counts = _count(mtz, path, column, rows_at_a_time)
    intensities = [c.label for c in mtz.columns_with_type("J")] or mtz.column_labels()
    found = mtz_datasets(mtz, batches.astype(np.int64), intensities[0], path)
    check_only_one(found.suffixes if len(found.labels) > 1 else (), path)
    bucket_of_batch = (np.cumsum(counts) - 1) // rows_at_a_time
    for rows in _pieces(mtz, path, rows_at_a_time):
        bucket = bucket_of_batch[np.searchsorted(batches, rows[:, column])]
        order = np.argsort(bucket, kind="stable")
        edges = np.flatnonzero(np.diff(bucket[order], prepend=-1))
        for number, part in zip(bucket[order][edges], np.split(order, edges[1:]), strict=True):
            with (folder / str(number)).open("ab") as file:
                rows[part].astype(np.float32).tofile(file)
    for number in np.unique(bucket_of_batch):
        values = np.fromfile(folder / str(number), np.float32)
        piece = _header(path)  # anew: one whose indices are the original ones stays so
        piece.set_data(values.reshape(-1, len(mtz.columns)))
        (folder / str(number)).unlink()
        yield from observations_of(tidied(piece), path)


def _header(path: Path) -> gemmi.Mtz:
    try:
        mtz = gemmi.read_mtz_file(str(path), with_data=False)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a complete MTZ file ({str(error).splitlines()[0]}); write it again or "
            "give another"
        ) from error
    check_complete(mtz, path)
    return mtz


def _pieces(mtz: gemmi.Mtz, path: Path, n_rows: int) -> Iterator[NDArray[np.float32]]:
    """Rows of the file, ``n_rows`` at a time."""
    n_columns = len(mtz.columns)
    with path.open("rb") as file:
        file.seek(8)
        order = "<" if file.read(1) == b"\x44" else ">"  # machine stamp: IEEE little endian
        file.seek(DATA_OFFSET)
        for first in range(0, mtz.nreflections, n_rows):
            n = min(n_rows, mtz.nreflections - first)
            yield np.fromfile(file, f"{order}f4", n * n_columns).reshape(n, n_columns)


def _count(
    mtz: gemmi.Mtz, path: Path, batch_column: int, n_rows: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Batch numbers and how many rows each has; refuse partials."""
    labels = mtz.column_labels()
    isym = isym_column(mtz)
    batches, counts = np.empty(0, np.float32), np.empty(0, np.int64)
    for rows in _pieces(mtz, path, n_rows):
        if isym and "NPART" not in labels:
            flags = rows[:, labels.index(isym)].astype(np.int64)
            if np.any(flags & PARTIAL_FLAG):
                raise UserError(
                    f"{path} holds partials, which are not summed on the way to a store; sum them "
                    "first (aimless with OUTPUT UNMERGED) and give its output"
                )
        new, n = np.unique(rows[:, batch_column], return_counts=True)
        batches, number = np.unique(np.concatenate([batches, new]), return_inverse=True)
        counts = np.bincount(number, weights=np.concatenate([counts, n])).astype(np.int64)
    return batches, counts
