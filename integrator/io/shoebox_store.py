"""Shoeboxes on disk: a versioned, chunked, self-describing HDF5 file.

Layout (rows N are sorted by sweep and first frame)::

    /                      attributes: format, version, software, box, extent, units, n_rows
    /boxes/counts          (N, D, H, W) int, photons; 0 where not recorded. A layer D sums
                           ``frames_per_layer`` frames
    /boxes/mask            (N, D, H, W) uint8, bits of braggflux.integrator.shoebox.mask.MaskBit
    /reflections/<column>  fields of ReflectionMetadata, flags, entering, recorded_fraction
    /neighbours/<column>   row (M,) of a box, increasing, and fields of Neighbours of a spot that
                           overlaps with it (M,); absent where neighbours are masked
    /background/<e>/panel_<p>/{sum,count}   (slow, fast) float32, per sweep
    /background/<e>/frame_ratio             (n_frames,) background of a frame over the mean
    /experiments           JSON text: wavelength, scan, cell, space group, image files

Compression is bitshuffle + LZ4, which the HDF5 filter registry knows and hdf5plugin brings. All
of it has checksums (:mod:`braggflux.integrator.io.hdf5.checked`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.atomic import require_room
from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.boxes_in_memory import BoxesInMemory, shoebox_batch
from braggflux.integrator.io.dials.sweeps import checked_records
from braggflux.integrator.io.hdf5.checked import (
    CHECKSUM,
    read_attributes,
    read_text,
    write_attributes,
    write_text,
    writing_checked,
)
from braggflux.integrator.io.hdf5.chunks import copy_rows
from braggflux.integrator.io.hdf5.columns import (
    column_of,
    each_column,
    read_array,
    read_columns,
)
from braggflux.integrator.io.hdf5.filters import bitshuffle
from braggflux.integrator.io.neighbour_pairs import NeighbourPairs
from braggflux.integrator.io.new_hdf5 import NewFile
from braggflux.integrator.io.shoebox_checks import check_for_run
from braggflux.integrator.io.shoebox_format import (
    FORMAT,
    REMEDY,
    RIGHT_FROM_IMAGE_1,
    UNITS,
    VERSION,
    check_boxes,
    check_photons,
    held,
    metadata_of,
    open_checked,
)
from braggflux.integrator.shoebox.mask import MaskBit
from braggflux.integrator.types import ReflectionMetadata, ShoeboxBatch

CHUNK_BYTES = 1 << 19
GZIP = {"compression": "gzip", "compression_opts": 1, **CHECKSUM}
#: Of a voxel on disk, counts and mask; between .43 and .75 where it was measured.
PACKED_BYTES = 0.4


@dataclass(frozen=True)
class BackgroundField:
    """Mean background of one sweep.

    Parameters
    ----------
    total, count : list of ndarray, (slow, fast)
        Per panel: counts, and number of frames, where no spot was predicted.
    frame_ratio : ndarray, (n_frames,)
        Background of each frame relative to the mean.
    """

    total: list[NDArray[np.float32]]
    count: list[NDArray[np.float32]]
    frame_ratio: NDArray[np.float64]


class ShoeboxWriter:
    """Writes a store row block by row block; made by :func:`writing_store`."""

    def __init__(
        self, handle: NewFile, n_rows: int, box: tuple[int, int, int], dtype: np.dtype[Any]
    ) -> None:
        self._handle = handle
        shape = (n_rows, *box)
        per_row = int(np.prod(box)) * np.dtype(dtype).itemsize
        chunk = (min(max(CHUNK_BYTES // per_row, 1), n_rows), *box)
        boxes = handle.create_group("boxes")
        options = {"chunks": chunk, **bitshuffle(), **CHECKSUM}
        self._counts = boxes.create_dataset("counts", shape, dtype, **options)
        self._mask = boxes.create_dataset("mask", shape, np.uint8, **options)
        self.chunk_rows = chunk[0]
        self.dtype = np.dtype(dtype)

    def write_boxes(self, first: int, counts: NDArray[Any], mask: NDArray[np.uint8]) -> None:
        """Write consecutive rows."""
        if counts.size and counts.max() > np.iinfo(self.dtype).max:
            raise UserError(
                f"a count of {counts.max()} does not fit the {self.dtype} of the shoebox store: "
                "the trusted range in the EXPT file is smaller than what the frames hold"
            )
        self._counts[first : first + len(counts)] = counts
        self._mask[first : first + len(mask)] = mask
        self._handle.require_written()

    def read_boxes(self, first: int, n: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Read counts and mask of rows that were written."""
        return self._counts[first : first + n], self._mask[first : first + n]

    def copy_boxes(self, other: h5py.File, rows: slice) -> None:
        """Copy rows from a store of the same shape."""
        for own in (self._counts, self._mask):
            copy_rows(other[own.name], own, rows)
        self._handle.require_written()

    def write_columns(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Write the columns of all reflections."""
        group = self._handle.create_group("reflections")
        for name, values in columns.items():
            column = group.create_dataset(name, data=values, **GZIP)
            if name in UNITS:
                write_attributes(column, {"units": UNITS[name]})

    def write_neighbours(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Write pairs of a box and a spot that overlaps with it, sorted by box."""
        group = self._handle.create_group("neighbours")
        for name, values in columns.items():
            group.create_dataset(name, data=values, **GZIP)

    def write_background(self, experiment: int, field: BackgroundField) -> None:
        """Write the background statistic of a sweep."""
        group = self._handle.create_group(f"background/{experiment}")
        group.create_dataset("frame_ratio", data=field.frame_ratio, **CHECKSUM)
        options = {"chunks": True, **bitshuffle(), **CHECKSUM}
        for name, images in (("sum", field.total), ("count", field.count)):
            for panel, image in enumerate(images):
                data = image.astype(np.float32, copy=False)
                group.create_dataset(f"panel_{panel}/{name}", data=data, **options)

    def write_header(
        self, attributes: Mapping[str, object], experiments: Sequence[dict[str, Any]]
    ) -> None:
        """Write what describes the file."""
        write_text(self._handle, "experiments", json.dumps(list(experiments)))
        own = {"format": FORMAT, "version": VERSION, "n_rows": len(self._counts)}
        write_attributes(self._handle, own | dict(attributes))
        write_attributes(self._counts, {"units": UNITS["counts"]})


@contextmanager
def writing_store(
    path: str | Path, n_rows: int, box: tuple[int, int, int], dtype: np.dtype[Any]
) -> Iterator[ShoeboxWriter]:
    """Write a store that appears under its name only when the block succeeds.

    Parameters
    ----------
    path : str or Path
    n_rows : int
    box : (int, int, int)
        (frames, slow, fast)
    dtype : numpy.dtype
        Of the counts.

    Yields
    ------
    ShoeboxWriter
    """
    require_room(path, n_rows * math.prod(box) * PACKED_BYTES, f"{n_rows} shoeboxes")
    with writing_checked(path) as handle:
        yield ShoeboxWriter(handle, n_rows, box, dtype)


class ShoeboxStore:
    """Shoeboxes of one or several sweeps.

    Open with :meth:`open`; also a context manager.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    box : (int, int, int)
        (frames, slow, fast).
    experiments : list of dict
        What the header tells of each sweep.
    attributes : dict
        Of the file: extent, d_min, software version ...
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handle = open_checked(self.path)
        try:
            with reading(self.path, REMEDY):
                self._read_head()
                self._check_starts()
        except UserError:
            self._handle.close()
            raise
        _, depth, height, width = self._counts.shape
        self.box: tuple[int, int, int] = (int(depth), int(height), int(width))
        #: All boxes, once :meth:`cache_in_memory` has read them.
        self.in_memory: BoxesInMemory | None = None

    def _read_head(self) -> None:
        self._counts = column_of(self._handle, "boxes/counts")
        self._mask = column_of(self._handle, "boxes/mask")
        text = read_text(self._handle["experiments"])
        self.experiments = checked_records(json.loads(text))
        self.attributes = read_attributes(self._handle)
        check_boxes(self._counts, self._mask, self.attributes["n_rows"])
        # one after the other: all in double precision would be twice what is kept
        self._columns = {
            name: held(name, values)
            for name, values in each_column(self._handle["reflections"], len(self._counts))
        }
        if "flags" not in self._columns:
            raise ValueError("the column flags is missing")
        self._metadata = metadata_of(self._columns, torch.float32)
        self.pairs = NeighbourPairs.read(self._handle, len(self._counts))

    def _check_starts(self) -> None:
        first = max((e.get("image_range", (1,))[0] for e in self.experiments), default=1)
        if self.attributes["version"] == RIGHT_FROM_IMAGE_1 and first != 1:
            raise UserError(
                f"{self.path} was cut by an earlier version, which could take wrong frames for a "
                f"scan that starts at image {first}: make it again with braggflux extract"
            )

    def require_complete(self) -> None:
        """Make sure that the sweeps of all rows are described, as a run needs it.

        Raises
        ------
        UserError
        """
        with reading(self.path, REMEDY):
            check_for_run(self._handle, self.attributes, self.experiments, self._columns)
            if self.pairs is not None:
                self.pairs.check(len(self.experiments))

    @classmethod
    def open(cls, path: str | Path) -> ShoeboxStore:
        """Open a store.

        Raises
        ------
        UserError
            When the file is missing, truncated, of another format or of another version.
        """
        return cls(path)

    def __len__(self) -> int:
        """Return the number of reflections."""
        return len(self._counts)

    def __enter__(self) -> ShoeboxStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    @property
    def chunk_rows(self) -> int:
        """Rows that are read together at no extra cost."""
        return self._counts.chunks[0]

    @property
    def is_cached(self) -> bool:
        """Whether the boxes are held in memory."""
        return self.in_memory is not None

    def metadata(self, dtype: torch.dtype = torch.float32) -> ReflectionMetadata:
        """Everything known of the reflections before counting, (N,) rows.

        In single precision, as held: positions then are good to 2e-4 pixels. In double precision
        it is read from the file.
        """
        if dtype == torch.float32:
            return self._metadata
        with reading(self.path, REMEDY):
            return metadata_of(read_columns(self._handle["reflections"], len(self)), dtype)

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of ``/reflections``, (N, ...): ``flags``, ``entering`` ..."""
        return self._columns[name]

    @property
    def flags(self) -> Tensor:
        """Bits of ``braggflux.integrator.types.Flag``, (N,) int64."""
        return torch.from_numpy(self._columns["flags"].astype(np.int64, copy=False))

    @property
    def n_bytes(self) -> int:
        """Size of all boxes in memory: counts in 16 bits where they allow it, and masks."""
        return len(self) * int(np.prod(self.box)) * (3 if self._fits_16 else 5)

    @property
    def _fits_16(self) -> bool:
        return int(self.attributes["max_count"]) <= np.iinfo(np.uint16).max

    def cache_in_memory(self, byte_limit: int = 4 << 30) -> bool:
        """Hold all boxes in memory, if they fit; returns whether they are held now."""
        if self.is_cached:
            return True
        if self.n_bytes > byte_limit:
            return False
        counts = np.empty(self._counts.shape, np.uint16 if self._fits_16 else np.int32)
        mask = np.empty(self._mask.shape, np.uint8)
        for start in range(0, len(self), 32 * self.chunk_rows):
            part = slice(start, start + 32 * self.chunk_rows)
            counts[part], mask[part] = self._read_rows(part)
        # torch indexes signed integers only, in all versions
        counts = counts.view(np.int16) if self._fits_16 else counts
        boxes = torch.from_numpy(counts), torch.from_numpy(mask)
        self.in_memory = BoxesInMemory(*boxes, self._metadata, self.pairs)
        return True

    def read_raw(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Read counts (B, D, H, W) int32 and mask bits (B, D, H, W) uint8, rows in any order."""
        if self.in_memory is not None:
            return self.in_memory.read_raw(rows)
        if isinstance(rows, slice):
            photons, bits = self._read_rows(rows)
        else:
            # HDF5 wants increasing rows without repeats
            unique, back = np.unique(rows.numpy(), return_inverse=True)
            photons, bits = self._read_sorted(unique)
            photons, bits = photons[back], bits[back]
        return torch.from_numpy(photons.astype(np.int32)), torch.from_numpy(bits)

    def read(self, rows: Tensor | slice, *, exclude: int = MaskBit.OVERLAPPED) -> ShoeboxBatch:
        """Shoeboxes of some rows, in the order given.

        Parameters
        ----------
        rows : Tensor, (B,) int64, or slice
        exclude : int
            Mask bits that make a recorded voxel invalid; 0 keeps voxels of neighbours.
        """
        counts, mask = self.read_raw(rows)
        neighbours = None if self.pairs is None else self.pairs.of(rows)
        return shoebox_batch(counts, mask, self._metadata[rows], neighbours, exclude)

    def background(self, experiment: int) -> BackgroundField:
        """Background statistic of a sweep."""
        with reading(self.path, REMEDY):
            group = self._handle[f"background/{experiment}"]
            panels = [group[f"panel_{p}"] for p in range(len(group) - 1)]
            if not panels:
                raise ValueError(f"background of sweep {experiment} has no panel")
            return BackgroundField(
                [read_array(p, "sum", 2).astype(np.float32, copy=False) for p in panels],
                [read_array(p, "count", 2).astype(np.float32, copy=False) for p in panels],
                read_array(group, "frame_ratio", 1),
            )

    def _read_sorted(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Rows in increasing order, chunk by chunk: h5py's own selections are slow."""
        counts = np.empty((len(rows), *self.box), self._counts.dtype)
        mask = np.empty((len(rows), *self.box), np.uint8)
        chunk = rows // self.chunk_rows
        for number in np.unique(chunk):
            here = np.nonzero(chunk == number)[0]
            low, high = rows[here[0]], rows[here[-1]] + 1
            photons, bits = self._read_rows(slice(low, high))
            counts[here], mask[here] = photons[rows[here] - low], bits[rows[here] - low]
        return counts, mask

    def _read_rows(self, rows: slice) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        with reading(self.path, REMEDY):
            counts = self._counts[rows]
            check_photons(counts, self.attributes["max_count"])
            return counts, self._mask[rows]
