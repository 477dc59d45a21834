"""Frames of an HDF5 image stack, whatever files they are spread over.

Detectors write the frames into several data files. The master file refers to them by external
links (``data_000001``, ``data_000002`` ...), by one virtual data set, or holds them itself. Here
each frame is traced to the data set that stores it, so that a missing file is an error and not a
frame of zeros (which is what HDF5 returns for a virtual data set whose source is missing), and so
that a chunk is decompressed once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import h5py
import hdf5plugin  # noqa: F401 - registers the bitshuffle, LZ4 and Zstandard filters
import numpy as np
from numpy.typing import NDArray

from integrator.errors import UserError

_NUMBERED = re.compile(r"data_\d+")


class _Run(NamedTuple):
    """Consecutive frames of the stack, and where they are stored."""

    dataset: h5py.Dataset
    frames: NDArray[np.int64]  # index into dataset, per frame of the run


class FrameStack:
    """Raw frames of an HDF5 master file, by number.

    Parameters
    ----------
    path : str or Path
        Master file.
    needed : sequence of int, optional
        Numbers of the frames that will be read. Data files beyond the last of them may be
        missing. Default: all frames.

    Attributes
    ----------
    n_images : int
        Frames found (when ``needed`` is given, at least as many as that needs).
    shape : tuple of int
        Shape of one frame: (slow, fast) or (panel, slow, fast).
    dtype : numpy.dtype
        As stored.

    Raises
    ------
    UserError
        When a file is missing, truncated or not HDF5, or a needed frame does not exist.
    """

    def __init__(self, path: str | Path, needed: Sequence[int] | None = None) -> None:
        self.path = Path(path)
        self._files: dict[Path, h5py.File] = {}
        self._block: tuple[str, int, NDArray] | None = None
        try:
            self.master = self._open(self.path)
            runs = self._find_runs(None if needed is None else max(needed, default=-1) + 1)
            self._check_runs(runs)
            self._runs = runs
            self._run_of = np.repeat(np.arange(len(runs)), [len(r.frames) for r in runs])
            self._frame_of = np.concatenate([r.frames for r in runs])
            self.n_images = len(self._frame_of)
            self.shape = runs[0].dataset.shape[1:]
            self.dtype = runs[0].dataset.dtype
            self._check_written(range(self.n_images) if needed is None else needed)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._block = None

    def read(self, number: int) -> NDArray:
        """Return frame ``number`` (0-based) as stored.

        Chunks that span several frames are kept until another one is needed, so that reading in
        order decompresses each frame once.
        """
        dataset = self._runs[self._run_of[number]].dataset
        frame = int(self._frame_of[number])
        depth = dataset.chunks[0] if dataset.chunks else 1
        start = frame - frame % depth
        key = f"{dataset.file.filename}:{dataset.name}"
        if self._block is None or self._block[:2] != (key, start):
            self._block = (key, start, self._load(dataset, start, depth))
        return self._block[2][frame - start]

    def follow(self, group: h5py.Group, name: str) -> h5py.Dataset | h5py.Group | None:
        """Return a member of a group through any link, or None when there is none.

        Raises
        ------
        UserError
            When it is a link to a file or an object that does not exist.
        """
        link = group.get(name, getlink=True)
        if link is None:
            return None
        if isinstance(link, h5py.ExternalLink):
            file = self._open(_beside(group.file.filename, link.filename))
            return self._member(file, link.path)
        return self._member(group, name)

    def _load(self, dataset: h5py.Dataset, start: int, depth: int) -> NDArray:
        try:
            return dataset[start : start + depth]
        except OSError as error:
            raise UserError(
                f"cannot read frame {start} of {dataset.file.filename} ({_brief(error)}); "
                "the file is damaged, copy it again"
            ) from error

    def _open(self, path: Path) -> h5py.File:
        """Open a file once."""
        path = Path(os.path.abspath(path))
        if path in self._files:
            return self._files[path]
        if not path.is_file():
            linked = "" if path == Path(os.path.abspath(self.path)) else f", linked by {self.path}"
            raise UserError(f"no image file {path}{linked}; copy it there or correct the path")
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            what = "is truncated" if "truncated" in str(error) else "is not a readable HDF5 file"
            raise UserError(f"{path} {what} ({_brief(error)}); copy it again") from error
        self._files[path] = file
        return file

    def _member(self, group: h5py.Group, name: str) -> h5py.Dataset | h5py.Group:
        try:
            return group[name]
        except (KeyError, OSError) as error:
            raise UserError(
                f"{group.file.filename} has no readable object {name} ({_brief(error)}); the file "
                "is incomplete, copy it again"
            ) from error

    def _find_runs(self, enough: int | None) -> list[_Run]:
        """Trace frames to data sets, in order, until there are ``enough`` (None: all)."""
        group = self._data_group()
        signal = group.attrs.get("signal", b"data")
        signal = signal.decode() if isinstance(signal, bytes) else str(signal)
        numbered = sorted(name for name in group if _NUMBERED.fullmatch(name))
        single = [name for name in (signal, "data") if group.get(name, getlink=True) is not None]
        names = single[:1] or numbered
        if not names:
            raise UserError(
                f"{self.path} has no data, data_000001 ... in {group.name}; "
                "give an NXmx or Eiger master file"
            )
        runs: list[_Run] = []
        for name in names:
            dataset = self.follow(group, name)
            if not isinstance(dataset, h5py.Dataset) or dataset.ndim not in (3, 4):
                raise UserError(
                    f"{self.path}: {group.name}/{name} is not a stack of frames; "
                    "give an NXmx or Eiger master file"
                )
            runs += self._trace(dataset)
            if enough is not None and sum(len(run.frames) for run in runs) >= enough:
                break
        return runs

    def _data_group(self) -> h5py.Group:
        """Return the NXdata group of the first NXentry."""
        for entry in self.master.values():
            if isinstance(entry, h5py.Group) and isinstance(entry.get("data"), h5py.Group):
                return entry["data"]
        raise UserError(
            f"{self.path} has no group entry/data with frames; give an NXmx or Eiger master file"
        )

    def _trace(self, dataset: h5py.Dataset) -> list[_Run]:
        """Find the data sets behind a virtual one; a stored one is its own run."""
        if not dataset.is_virtual:
            return [_Run(dataset, np.arange(len(dataset)))]
        n = len(dataset)
        source_of = np.full(n, -1)
        frame_of = np.zeros(n, dtype=np.int64)
        sources: list[h5py.Dataset] = []
        whole_frames = True
        for source in dataset.virtual_sources():
            if "%b" in source.file_name or "%b" in source.dset_name:
                return [_Run(dataset, np.arange(n))]  # numbered sources, only HDF5 can tell them
            file = self._open(_beside(dataset.file.filename, source.file_name))
            stored = self._member(file, source.dset_name)
            to, whole_to = _selected_frames(source.vspace, dataset.shape)
            of, whole_of = np.arange(len(to)), False
            if stored.ndim == dataset.ndim:
                of, whole_of = _selected_frames(source.src_space, stored.shape)
            count = min(len(to), len(of))  # unlimited selections stop at the shorter extent
            source_of[to[:count]] = len(sources)
            frame_of[to[:count]] = of[:count]
            sources.append(stored)
            whole_frames &= whole_to and whole_of and not stored.is_virtual
        if (source_of < 0).any():
            raise UserError(
                f"frame {int(np.argmax(source_of < 0))} of the virtual data set {dataset.name} in "
                f"{dataset.file.filename} has no source; collect or import fewer images"
            )
        if not whole_frames:  # frames put together from tiles: let HDF5 do it
            return [_Run(dataset, np.arange(n))]
        starts = np.flatnonzero(np.diff(source_of, prepend=-1))
        return [
            _Run(sources[source_of[start]], frames)
            for start, frames in zip(starts, np.split(frame_of, starts[1:]), strict=True)
        ]

    def _check_runs(self, runs: list[_Run]) -> None:
        first = runs[0].dataset
        for run in runs:
            if run.dataset.shape[1:] != first.shape[1:] or run.dataset.dtype != first.dtype:
                raise UserError(
                    f"{run.dataset.file.filename} has frames of {run.dataset.shape[1:]} "
                    f"{run.dataset.dtype}, {first.file.filename} of {first.shape[1:]} "
                    f"{first.dtype}; the files belong to different data sets"
                )

    def _check_written(self, needed: Sequence[int]) -> None:
        """Refuse frames that do not exist or were never written (they would read as zeros)."""
        last = max(needed, default=-1)
        if last >= self.n_images:
            raise UserError(
                f"{self.path} has {self.n_images} images, and image {last + 1} is asked for; "
                "import the images again, or copy the missing data files"
            )
        incomplete = {id(run.dataset) for run in self._runs if _has_gaps(run.dataset)}
        for number in needed:
            dataset = self._runs[self._run_of[number]].dataset
            if id(dataset) not in incomplete:
                continue
            corner = (int(self._frame_of[number]),) + (0,) * len(self.shape)
            if dataset.id.get_chunk_info_by_coord(corner).byte_offset is None:
                raise UserError(
                    f"frame {corner[0]} of {dataset.file.filename} was never written; import only "
                    "the images that were collected"
                )


def _has_gaps(dataset: h5py.Dataset) -> bool:
    """Whether some chunks of a data set were never written."""
    if not dataset.chunks:
        return False
    expected = np.prod(-(-np.array(dataset.shape) // np.array(dataset.chunks)))
    return dataset.id.get_num_chunks() < expected


def _selected_frames(
    space: h5py.h5s.SpaceID, shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], bool]:
    """Frames that a selection of a virtual data set takes, and whether it takes them whole."""
    n = shape[0]
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return np.arange(n), True
    if not space.is_regular_hyperslab():
        low, high = space.get_select_bounds()
        return np.arange(low[0], high[0] + 1), False
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


def _beside(file: str, name: str) -> Path:
    """Path of a linked file, which is relative to the file that has the link."""
    return Path(file) if name == "." else Path(file).parent / name


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
