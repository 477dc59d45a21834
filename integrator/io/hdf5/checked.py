"""HDF5 files of our own, in which a damaged byte is noticed when it is read.

Version 1.10 of the format has a checksum on every piece of structure, the Fletcher-32 filter one
on every chunk of numbers, taken after compression: a damaged chunk is refused before it is
decoded. Strings of variable length lie in a heap without a checksum, so text is written with a
fixed length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braggflux.integrator.atomic import replacing

if TYPE_CHECKING:
    import h5py

    from braggflux.integrator.io.new_hdf5 import NewFile

# h5py is imported by the functions that open a file: 10 MiB that a merge of MTZ files, which
# imports this module, does without.

#: Keyword argument of ``create_dataset`` for a checksum on every chunk.
CHECKSUM = {"fletcher32": True}


@contextmanager
def writing_checked(path: str | Path) -> Iterator[NewFile]:
    """Write a file that appears under its name only when the block succeeds.

    Parameters
    ----------
    path : str or Path

    Yields
    ------
    NewFile
        Its data sets are to be made with :data:`CHECKSUM`, its text with the functions below.

    Raises
    ------
    UserError
        The folder is missing or not writable, or the disk is full.
    """
    with replacing(path) as temporary, new_file(temporary, libver="v110") as handle:
        yield handle


@contextmanager
def new_file(path: str | Path, **options: Any) -> Iterator[NewFile]:
    """Write an HDF5 file; where that fails it is closed, and not whole.

    Parameters
    ----------
    path : str or Path
    **options
        Of ``h5py.File``.

    Raises
    ------
    OSError
        The disk is full.
    """
    from braggflux.integrator.io.new_hdf5 import NewFile

    handle = NewFile(path, **options)
    try:
        yield handle
        handle.finish()
    finally:
        handle.abandon()


def write_attributes(target: h5py.HLObject, values: Mapping[str, Any]) -> None:
    """Write attributes, text with a fixed length."""
    for name, value in values.items():
        target.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def read_attributes(target: h5py.HLObject) -> dict[str, Any]:
    """Read attributes, text as str."""
    return {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in target.attrs.items()
    }


def write_text(group: h5py.Group, name: str, text: str) -> None:
    """Write text of any length as a data set of bytes."""
    group.create_dataset(name, data=np.frombuffer(text.encode(), np.uint8), **CHECKSUM)


def read_text(dataset: h5py.Dataset) -> str:
    """Read text of :func:`write_text`, or a string of an earlier version's file."""
    if not hasattr(dataset, "dtype"):
        raise ValueError(f"{dataset.name} is no text")
    value = dataset[()]
    return bytes(value).decode() if isinstance(value, (bytes, np.ndarray)) else str(value)
