"""Chunks of data sets as they lie in a file, compressed."""

from __future__ import annotations

import h5py


def copy_rows(source: h5py.Dataset, target: h5py.Dataset, rows: slice) -> None:
    """Copy rows between data sets of one shape, type, chunks and filters.

    Whole chunks are taken as they are. Those that begin or end beyond the rows are decompressed:
    their other rows are somebody else's.
    """
    n_chunk, n = target.chunks[0], len(target)
    for first in range(rows.start // n_chunk * n_chunk, rows.stop, n_chunk):
        part = slice(max(first, rows.start), min(first + n_chunk, rows.stop))
        if part == slice(first, min(first + n_chunk, n)):
            place = (first,) + (0,) * (target.ndim - 1)
            filters_left_out, packed = source.id.read_direct_chunk(place)
            target.id.write_direct_chunk(place, packed, filters_left_out)
        else:
            target[part] = source[part]
