"""Where the frames of an HDF5 data set are stored.

HDF5 returns zeros for the part of a virtual data set whose source is missing, and for chunks that
were never written. Here each frame is traced to the data set that stores it, through virtual data
sets of virtual data sets, so that a frame that is not there is known, and why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.hdf5.files import Hdf5Files

Origin = tuple[h5py.Dataset, int] | str
"""Data set and index in it of a frame that can be read; of any other, what is wrong with it."""


class _Mapping(NamedTuple):
    """Frames of a virtual data set, and the selection of one source that they show."""

    frames: NDArray[np.int64]
    is_whole: bool  # each frame is filled by the source
    file: str
    path: str
    source_space: h5py.h5s.SpaceID


def frame_origins(dataset: h5py.Dataset, files: Hdf5Files) -> list[Origin]:
    """Trace the frames of a data set.

    Parameters
    ----------
    dataset : h5py.Dataset
        (frames, ...), stored or virtual.
    files : Hdf5Files
        Opens the sources.

    Returns
    -------
    list of Origin
        One per frame. Frames that are put together from tiles are left to HDF5: their origin is
        ``dataset`` itself, once all tiles are known to be there.
    """
    holder = dataset.file.filename
    if not dataset.is_virtual:
        return [
            (dataset, i)
            if is_there
            else f"frame {i} of {holder} was never written; import only the images that were "
            "collected"
            for i, is_there in enumerate(_written(dataset))
        ]
    origins: list[Origin | None] = [None] * len(dataset)
    for mapping in _mappings(dataset):
        found, is_whole = _source_frames(dataset, mapping, files)
        for k, i in enumerate(mapping.frames.tolist()):
            origin: Origin = (
                f"frame {i} of the virtual data set {dataset.name} in {holder} is beyond the end "
                f"of its source {mapping.file}; import only the images that were collected"
            )
            if k < len(found):
                origin = found[k]
            if not is_whole:  # a tile: it is one of several that must all be there
                lost = [x for x in (origin, origins[i]) if isinstance(x, str)]
                origin = lost[0] if lost else (dataset, i)
            origins[i] = origin
    return [
        f"frame {i} of the virtual data set {dataset.name} in {holder} has no source; collect or "
        "import fewer images"
        if origin is None
        else origin
        for i, origin in enumerate(origins)
    ]


def _source_frames(
    dataset: h5py.Dataset, mapping: _Mapping, files: Hdf5Files
) -> tuple[list[Origin], bool]:
    """Trace the source's frames; tell whether each of them is a whole frame of ``dataset``."""
    n, holder = len(mapping.frames), dataset.file.filename
    try:
        file = files.open_linked(holder, mapping.file, "HDF5_VDS_PREFIX")
        source = files.member(file, mapping.path)
        if not isinstance(source, h5py.Dataset):
            raise UserError(f"{mapping.path} of {file.filename} is no data set; copy it again")
        origins = frame_origins(source, files)
    except UserError as error:
        return [str(error)] * n, mapping.is_whole
    if source.ndim == dataset.ndim:
        frames, is_whole = _selected_frames(mapping.source_space, source.shape)
        return [origins[i] for i in frames], mapping.is_whole and is_whole
    # a single image: its rows take the place of frames
    lost: list[Origin] = [origin for origin in origins if isinstance(origin, str)]
    return lost[:1] * n or [(source, 0)] * n, False


def _mappings(dataset: h5py.Dataset) -> Iterator[_Mapping]:
    """Take the sources of a virtual data set; those numbered by %b in their name one by one."""
    for source in dataset.virtual_sources():
        frames, is_whole = _selected_frames(source.vspace, dataset.shape)
        names = source.file_name, source.dset_name
        blocks = [frames]
        if any("%b" in name for name in names):
            depth = source.vspace.get_regular_hyperslab()[3][0]
            blocks = np.split(frames, range(depth, len(frames), depth))
        for number, block in enumerate(blocks):
            file, path = (_numbered(name, number) for name in names)
            yield _Mapping(block, is_whole, file, path, source.src_space)


def _numbered(name: str, number: int) -> str:
    """Put a number where a name has %b; %% stands for a percent sign."""
    return re.sub("%[b%]", lambda found: str(number) if found[0] == "%b" else "%", name)


def _written(dataset: h5py.Dataset) -> NDArray[np.bool_]:
    """Whether all of a frame was written, per frame of a stored data set."""
    if not dataset.chunks:
        return np.full(len(dataset), dataset.id.get_storage_size() > 0)
    grid = -(-np.array(dataset.shape) // np.array(dataset.chunks))
    if dataset.id.get_num_chunks() == np.prod(grid):
        return np.ones(len(dataset), dtype=bool)
    corners = np.indices(grid).reshape(dataset.ndim, -1).T * dataset.chunks
    is_there = np.array(
        [
            dataset.id.get_chunk_info_by_coord(tuple(corner.tolist())).byte_offset is not None
            for corner in corners
        ]
    )
    per_layer = is_there.reshape(grid[0], -1).all(axis=1)
    return np.repeat(per_layer, dataset.chunks[0])[: len(dataset)]


def _selected_frames(
    space: h5py.h5s.SpaceID, shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], bool]:
    """Frames that a selection of a virtual data set takes, and whether it takes them whole."""
    n = shape[0]
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return np.arange(n), True
    if not space.is_regular_hyperslab():
        first, last = np.moveaxis(space.get_select_hyper_blocklist().astype(np.int64), 1, 0)
        runs = [np.arange(a, b + 1) for a, b in zip(first[:, 0], last[:, 0], strict=True)]
        frames = np.unique(np.concatenate(runs))
        return frames, bool((last[:, 1:] - first[:, 1:] + 1 == shape[1:]).all())
    start, stride, count, block = (tuple(v) for v in space.get_regular_hyperslab())
    repeats = n if count[0] == h5py.h5s.UNLIMITED else min(count[0], n)
    length = n if block[0] == h5py.h5s.UNLIMITED else min(block[0], n)
    frames = start[0] + (np.arange(repeats)[:, None] * stride[0] + np.arange(length)).ravel()
    covered = all(
        s == 0 and c * b == size and (c == 1 or d == b)
        for s, d, c, b, size in zip(
            start[1:], stride[1:], count[1:], block[1:], shape[1:], strict=True
        )
    )
    return frames[frames < n], covered
