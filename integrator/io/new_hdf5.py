"""A new HDF5 file whose writing may fail without harm.

Where a write fails, HDF5 is left in a state in which it crashes, at the latest when the program
ends. So it never hears of it: bytes go through :class:`_Disk`, which keeps the failure for
:meth:`NewFile.require_written` and takes what HDF5 has still to write into memory.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py


class NewFile(h5py.File):  # type: ignore[misc]  # h5py has no types
    """A file to write.

    Parameters
    ----------
    path : str or Path
        Its content is replaced, if it has any.
    **options
        Of ``h5py.File``.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self._disk = _Disk(path)
        super().__init__(self._disk, "w", **options)

    def require_written(self) -> None:
        """Raise what has failed until now; to be called between parts of a long work.

        Raises
        ------
        OSError
            As the system said it: the disk is full ...
        """
        if self._disk.error is not None:
            raise self._disk.error

    def finish(self) -> None:
        """Close, and make sure that all is written.

        Raises
        ------
        OSError
        """
        self.close()
        self.require_written()
        self._disk.close()

    def abandon(self) -> None:
        """Close what is not wanted."""
        self._disk.give_up()
        self.close()
        with suppress(OSError):
            self._disk.close()


class _Disk(io.RawIOBase):
    """Bytes of a file, for the driver of h5py that writes through an object of Python.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    error : OSError or None
        The first failure. What is written after it stays in memory, where it is read again.
    """

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._position = 0
        self._in_memory: list[tuple[int, bytes]] = []
        self._is_given_up = False
        self.error: OSError | None = None

    def give_up(self) -> None:
        """Write nothing more to the disk."""
        self._is_given_up = True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte, from the begin or from the end."""
        begin = os.fstat(self._descriptor).st_size if whence == os.SEEK_END else 0
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; beyond the end are zeros."""
        view, first = memoryview(buffer).cast("B"), self._position
        n = os.preadv(self._descriptor, [view], first)
        view[n:] = bytes(len(view) - n)
        for at, piece in self._in_memory:
            low, high = max(at, first), min(at + len(piece), first + len(view))
            if low < high:
                view[low - first : high - first] = piece[low - at : high - at]
        return len(view)

    def write(self, buffer: Any) -> int:
        """Write all of the buffer, to the disk as long as that has not failed."""
        view, first = memoryview(buffer).cast("B"), self._position
        if self.error is None and not self._is_given_up:
            try:
                n = 0
                while n < len(view):
                    n += os.pwrite(self._descriptor, view[n:], first + n)
                return n
            except OSError as error:
                self.error = error
        self._in_memory.append((first, bytes(view)))
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size."""
        wanted = self._position if size is None else size
        if self.error is None and not self._is_given_up:
            try:
                os.ftruncate(self._descriptor, wanted)
            except OSError as error:
                self.error = error
        return wanted

    def close(self) -> None:
        """Close; some file systems say only now that there was no room."""
        if not self.closed:
            super().close()
            os.close(self._descriptor)
