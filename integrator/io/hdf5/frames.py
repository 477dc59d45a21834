"""Frames of an HDF5 image stack, whatever files they are spread over.

Detectors write the frames into several data files. The master file refers to them by external
links (``data_000001``, ``data_000002`` ...), by one virtual data set, or holds them itself. Each
frame is traced to the data set that stores it, so that what is missing matters only where it is
wanted, and then is an error, and so that a chunk is decompressed once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.decoding.apart import FramesApart
from braggflux.integrator.io.decoding.chunk_check import is_guarded, require_decodable
from braggflux.integrator.io.hdf5.files import Hdf5Files, brief, is_class
from braggflux.integrator.io.hdf5.origins import Origin, frame_origins

_NUMBERED = re.compile(r"data_(\d+)")


class FrameStack:
    """Raw frames of an HDF5 master file, by number.

    Parameters
    ----------
    path : str or Path
        Master file.
    needed : sequence of int, optional
        Numbers of the frames that will be read. Data files beyond the last of them may be
        missing. Default: all frames.
    may_crash : bool
        This process may: nothing is checked before it is decoded, and nothing decoded elsewhere.

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

    def __init__(
        self, path: str | Path, needed: Sequence[int] | None = None, *, may_crash: bool = False
    ) -> None:
        self.path, self._needed, self._may_crash = Path(path), needed, may_crash
        self._apart: FramesApart | None = None
        self._files = Hdf5Files()
        self._block: tuple[str, int, NDArray[Any]] | None = None
        self._memory, self._lock = threading.local(), threading.Lock()
        try:
            self.master = self._files.open(self.path)
            self._origins = self._find_frames(None if needed is None else max(needed, default=-1))
            self.n_images = len(self._origins)
            first = self._check(range(self.n_images) if needed is None else needed)
            self.shape = first.shape[1:]
            self.dtype = first.dtype
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
        self._files.close()
        self._block = None
        if self._apart is not None:
            self._apart.close()

    def read(self, number: int) -> NDArray[Any]:
        """Return frame ``number`` (0-based) as stored.

        Chunks that span several frames are kept until another one is needed, so that reading in
        order decompresses each frame once. A frame that has chunks of its own is valid until the
        same thread reads another: memory that is new for each would take half as long again.
        """
        origin = self._origins[number]
        if isinstance(origin, str):
            raise UserError(origin)
        dataset, frame = origin
        if not self._may_crash and not is_guarded(dataset):
            return self._load_apart(dataset, number)
        depth = dataset.chunks[0] if dataset.chunks else 1
        if depth == 1:
            return self._load_alone(dataset, frame)
        start = frame - frame % depth
        key = f"{dataset.file.filename}:{dataset.name}"
        with self._lock:
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
        if group.get(name, getlink=True) is None:
            return None
        return self._files.member(group, name)

    def _load_alone(self, dataset: h5py.Dataset, frame: int) -> NDArray[Any]:
        """Read a frame into this thread's memory for frames."""
        memory = self._own_memory(dataset)
        with _readable(dataset, frame):
            self._check_chunks(dataset, range(frame, frame + 1))
            dataset.read_direct(memory, np.s_[frame])
        return memory

    def _load_apart(self, dataset: h5py.Dataset, number: int) -> NDArray[Any]:
        """Let another process decode a frame."""
        with self._lock:
            if self._apart is None:
                self._apart = FramesApart(self.path, self._needed)
        memory = self._own_memory(dataset)
        with _readable(dataset, number):
            self._apart.read(number, memory)
        return memory

    def _own_memory(self, dataset: h5py.Dataset) -> NDArray[Any]:
        memory: NDArray[Any] | None = getattr(self._memory, "frame", None)
        if memory is None or memory.shape != dataset.shape[1:] or memory.dtype != dataset.dtype:
            memory = self._memory.frame = np.empty(dataset.shape[1:], dataset.dtype)
        return memory

    def _load(self, dataset: h5py.Dataset, start: int, depth: int) -> NDArray[Any]:
        with _readable(dataset, start):
            end = min(start + depth, len(dataset))
            self._check_chunks(dataset, range(start, end))
            return dataset[start:end]

    def _check_chunks(self, dataset: h5py.Dataset, frames: range | None = None) -> None:
        if not self._may_crash:
            require_decodable(dataset, frames)

    def _find_frames(self, last: int | None) -> list[Origin]:
        """Trace frames to data sets, in order, as far as frame ``last`` (None: all)."""
        group = self._data_group()
        origins: list[Origin] = []
        lost = ""  # what is wrong with the data set before the next, whose length is unknown
        first_number: int | None = None
        for name in self._data_names(group):
            if last is not None and len(origins) > last:
                break
            try:
                dataset = self._data_set(group, name)
            except UserError as error:
                lost = lost or str(error)
                continue
            number = dataset.attrs.get("image_nr_low") if _NUMBERED.fullmatch(name) else None
            number = None if number is None else int(number)
            if lost:
                place = 0 if number is None else number - (first_number or 1)
                if place <= len(origins):  # a file's own number, if any: the place is unknown
                    raise UserError(lost)
                origins += [lost] * (place - len(origins))
                lost = ""
            if first_number is None and number is not None:
                first_number = number - len(origins)
            expected = None if first_number is None else first_number + len(origins)
            # the same number in all files is that of a file's own image
            if number not in (None, first_number, expected):
                raise UserError(
                    f"{dataset.file.filename} begins with image {number} (image_nr_low), as "
                    f"{name} of {self.path} with image {expected}; the links of the master file "
                    "are in a wrong order, or files are missing"
                )
            origins += frame_origins(dataset, self._files)
        if lost and (last is None or len(origins) <= last):
            raise UserError(lost)
        return origins

    def _data_set(self, group: h5py.Group, name: str) -> h5py.Dataset:
        """Open a data set of frames."""
        if group.get(name, getlink=True) is None:
            raise UserError(
                f"{self.path} has no {name} in {group.name}, but data sets of higher numbers, so "
                "that the images from there on cannot be told; give the complete master file"
            )
        dataset = self._files.member(group, name)
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim not in (3, 4):
            raise UserError(
                f"{self.path}: {group.name}/{name} is not a stack of frames; "
                "give an NXmx or Eiger master file"
            )
        return dataset

    def _data_names(self, group: h5py.Group) -> Iterable[str]:
        """Names of the data sets that hold the frames, in their order.

        The order is that of the numbers, not of the letters: data_10 follows data_9. A gap in
        the numbers has the name that is missing.
        """
        signal = group.attrs.get("signal", b"data")
        signal = signal.decode() if isinstance(signal, bytes) else str(signal)
        for name in (signal, "data"):
            is_there = group.get(name, getlink=True) is not None
            if is_there and not _NUMBERED.fullmatch(name):
                return [name]
        numbered = sorted((int(m[1]), m[0]) for m in map(_NUMBERED.fullmatch, group) if m)
        if not numbered:
            raise UserError(
                f"{self.path} has no data, data_000001 ... in {group.name}; "
                "give an NXmx or Eiger master file"
            )
        names: list[str] = []
        expected = min(numbered[0][0], 1)  # counted from 0 or 1
        for number, name in numbered:
            if number < expected:
                raise UserError(
                    f"{self.path} has two data sets of one number, {names[-1]} and {name}; remove "
                    "the wrong one"
                )
            if number > expected:
                names.append(f"data_{expected:06d}")
            names.append(name)
            expected = number + 1
        return names

    def _data_group(self) -> h5py.Group:
        """Return the NXdata group of the first NXentry."""
        for entry in self.master.values():
            if isinstance(entry, h5py.Group):
                named = self.follow(entry, "data")
                groups = [named, *(x for x in entry.values() if is_class(x, "NXdata"))]
                for group in groups:
                    if isinstance(group, h5py.Group):
                        return group
        raise UserError(
            f"{self.path} has no group entry/data with frames; give an NXmx or Eiger master file"
        )

    def _check(self, needed: Sequence[int]) -> h5py.Dataset:
        """Refuse frames that do not exist (they would read as zeros) or are of another kind."""
        last = max(needed, default=-1)
        if last >= self.n_images:
            raise UserError(
                f"{self.path} has {self.n_images} images, and image {last + 1} is asked for; "
                "copy the missing data files, or leave the images that were not collected out "
                "(dials.slice_sequence, or image_range= of dials.import)"
            )
        wanted = [self._origins[number] for number in needed] or self._origins[:1]
        if not wanted:
            raise UserError(f"{self.path} has no image; give the master file of the images")
        datasets: list[h5py.Dataset] = []
        for origin in wanted:
            if isinstance(origin, str):
                raise UserError(origin)
            if not datasets or origin[0] is not datasets[-1]:
                datasets.append(origin[0])
        first = datasets[0]
        for other in datasets[1:]:
            if other.shape[1:] != first.shape[1:] or other.dtype != first.dtype:
                raise UserError(
                    f"{other.file.filename} has frames of {other.shape[1:]} {other.dtype}, "
                    f"{first.file.filename} of {first.shape[1:]} {first.dtype}; the files belong "
                    "to different data sets"
                )
        return first


@contextmanager
def _readable(dataset: h5py.Dataset, frame: int) -> Iterator[None]:
    """Say which frame it is that cannot be read."""
    try:
        yield
    except UserError:  # of the process that has decoded it
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"frame {frame} of {dataset.file.filename} cannot be decoded ({brief(error)}); copy "
            "the file again"
        ) from error
