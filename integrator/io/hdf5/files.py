"""HDF5 files of one data set: opened for reading, found from one another, links followed.

A master file names its data files in external links and virtual data sets. Names are looked up
where HDF5 itself (and so DIALS) looks: an absolute name as it is, and when that file has been
moved by its last part; then in the folders of ``HDF5_EXT_PREFIX`` or ``HDF5_VDS_PREFIX``, beside
the file that has the link, and beside the file that this one is a symbolic link to. The current
folder, where HDF5 looks too, is left out: files of the same name in it may be of another crystal.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import h5py

import braggflux.integrator.io.hdf5.filters  # noqa: F401 - the filters that detectors use
from braggflux.integrator.errors import UserError

_Object: TypeAlias = h5py.Dataset | h5py.Group
_MAX_LINKS = 32
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Hdf5Files:
    """Open files of a data set, each once; :meth:`close` closes all."""

    def __init__(self) -> None:
        self._open: dict[str, h5py.File] = {}

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def open(self, path: str | Path) -> h5py.File:
        """Open a file for reading.

        Raises
        ------
        UserError
            When it is missing, truncated, not HDF5 or still being written.
        """
        path = os.fspath(path)
        if path not in self._open:
            if not os.path.isfile(path):
                raise UserError(f"no image file {path}; copy it there or correct the path")
            self._open[path] = _open(path)
        return self._open[path]

    def open_linked(self, source: str, name: str, variable: str) -> h5py.File:
        """Open a file that another one names.

        Parameters
        ----------
        source : str
            Path of the file with the link.
        name : str
            As the link has it; ``.`` for the file itself.
        variable : str
            Environment variable with more folders.

        Raises
        ------
        UserError
        """
        if name == ".":
            return self.open(source)
        tried = list(_places(source, name, variable))
        for path in tried:
            if os.path.isfile(path):
                return self.open(path)
        beside = f", nor is it beside that as {tried[-1]}" if len(tried) > 1 else ""
        raise UserError(
            f"no image file {tried[0]}, linked by {source}{beside}; copy it there or correct the "
            "path"
        )

    def member(self, group: h5py.Group, path: str, n_links: int = 0) -> _Object:
        """Return an object of a group by its path, through any links.

        Raises
        ------
        UserError
            When it, or a file on the way to it, is missing.
        """
        found: _Object = group.file if path.startswith("/") else group
        for name in path.split("/"):
            if name in ("", "."):
                continue
            link = found.get(name, getlink=True) if isinstance(found, h5py.Group) else None
            if isinstance(link, h5py.ExternalLink | h5py.SoftLink):
                if n_links == _MAX_LINKS:
                    raise UserError(f"{found.file.filename}: the links of {path} never end")
                if isinstance(link, h5py.ExternalLink):
                    file = self.open_linked(found.file.filename, link.filename, "HDF5_EXT_PREFIX")
                    found = self.member(file, link.path, n_links + 1)
                else:
                    found = self.member(found, link.path, n_links + 1)
                continue
            try:
                found = found[name]
            except (KeyError, ValueError, OSError) as error:
                raise UserError(
                    f"{group.file.filename} has no readable object {path} ({brief(error)}); the "
                    "file is incomplete, copy it again"
                ) from error
        return found


def brief(error: Exception) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())[:160]


def is_class(found: _Object | None, name: str) -> bool:
    """Whether an object is a group of a NeXus class."""
    if not isinstance(found, h5py.Group):
        return False
    value = found.attrs.get("NX_class", b"")
    return (value.decode() if isinstance(value, bytes) else str(value)) == name


def _places(source: str, name: str, variable: str) -> Iterator[str]:
    """Paths where the file ``name``, linked by ``source``, may be."""
    folder = os.path.dirname(source)
    if os.path.isabs(name):
        yield name
        name = os.path.basename(name)
    for prefix in filter(None, os.environ.get(variable, "").split(":")):
        yield os.path.join(prefix.replace("${ORIGIN}", folder), name)
    yield os.path.join(folder, name)
    if os.path.islink(source):
        yield os.path.join(os.path.dirname(os.path.realpath(source)), name)


def _open(path: str) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except PermissionError as error:
        raise UserError(f"no permission to read {path}; ask its owner") from error
    except OSError as error:
        if error.errno in _NO_LOCKS:  # a file system without locks has nobody to wait for
            return h5py.File(path, "r", locking=False)
        if error.errno == errno.EAGAIN:
            raise UserError(
                f"{path} is locked by a program that writes it; wait for its end, or set "
                "HDF5_USE_FILE_LOCKING=FALSE if there is none"
            ) from error
        if "already open for write" in str(error):
            return _open_marked(path)
        what = "is truncated" if "truncated" in str(error) else "is not a readable HDF5 file"
        raise UserError(f"{path} {what} ({brief(error)}); copy it again") from error


def _open_marked(path: str) -> h5py.File:
    """Open a file that its writer has not closed: what a SWMR writer has flushed is consistent."""
    try:
        return h5py.File(path, "r", swmr=True)
    except OSError as error:
        raise UserError(
            f"{path} was not closed by the program that wrote it; wait for its end or, if it was "
            f"killed, clear the mark on a copy of the file with `h5clear -s {path}`"
        ) from error
