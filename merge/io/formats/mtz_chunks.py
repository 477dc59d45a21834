"""Unmerged MTZ files that may not fit in memory, read as pieces of neighbouring images.

MTZ files are sorted by index, so that their rows are first dealt out to files of neighbouring
images, and those are then read one by one (a bucket sort on disk).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.atomic import writing
from braggflux.integrator.errors import UserError, brief
from braggflux.merge.io.dataset_split import check_only_one
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
from braggflux.merge.io.formats.unmerged_mtz import tidied
from braggflux.merge.io.observations import UnmergedData


def mtz_chunks(path: Path, folder: Path, rows_at_a_time: int) -> Iterator[UnmergedData]:
    """Read the observations of neighbouring images, about ``rows_at_a_time`` of them.

    Parameters
    ----------
    path : Path
    folder : Path
        For files that together are as large as this one.
    rows_at_a_time : int

    Raises
    ------
    UserError
        As :func:`~braggflux.merge.io.formats.mtz_observations.read_mtz_datasets`; or the file
        holds partials, or several data sets.
    """
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
            with writing(folder / str(number)), (folder / str(number)).open("ab") as file:
                file.write(np.ascontiguousarray(rows[part], np.float32))
    for number in np.unique(bucket_of_batch):
        values = np.fromfile(folder / str(number), np.float32)
        piece = _header(path)  # anew: one whose indices are the original ones stays so
        piece.set_data(values.reshape(-1, len(mtz.columns)))
        (folder / str(number)).unlink()
        yield from observations_of(tidied(piece), path)


def _header(path: Path) -> gemmi.Mtz:
    try:
        mtz = gemmi.read_mtz_file(str(path), with_data=False)
    except Exception as error:  # of whatever a decoder raises
        raise UserError(
            f"{path} is not a complete MTZ file ({brief(error)}); write it again or give another"
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
