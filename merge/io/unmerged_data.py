"""Unmerged reflections as people have them: the formats of other programs, and our own stores.

A new format is a module with a reader and one line in :data:`FORMATS`. DIALS reflection tables are
read by ``pipelines.unmerged_dials``, which calls this for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import gemmi

from integrator.errors import UserError
from merge.io.crystfel_stream import read_stream
from merge.io.dataset_split import split_by_wavelength
from merge.io.mtz_observations import read_mtz, read_mtz_datasets
from merge.io.observations import (
    CELL_TOLERANCE,
    UnmergedData,
    check_one_crystal_form,
    combine_friedel,
    make_unmerged,
    typical_cell,
)
from merge.io.reindexing import reindex
from merge.io.text_files import head_of
from merge.io.unmerged_store import UnmergedStore
from merge.io.xds import INTEGRATE, XDS_ASCII, read_xds

__all__ = [
    "CELL_TOLERANCE",
    "UnmergedData",
    "check_one_crystal_form",
    "combine_friedel",
    "make_unmerged",
    "read_mtz",
    "read_mtz_datasets",
    "read_stream",
    "read_unmerged",
    "reindex",
    "typical_cell",
]


class Format(NamedTuple):
    """A kind of file.

    ``begins`` are the bytes of which it begins with one; ``suffix`` decides where they are not
    there (the reader then says what is wrong).
    """

    name: str
    suffix: str
    begins: tuple[bytes, ...]
    read: Callable[[Path, gemmi.SpaceGroup | None], list[UnmergedData]]


def _read_store(path: Path, space_group: gemmi.SpaceGroup | None) -> list[UnmergedData]:
    with UnmergedStore(path) as store:
        return [store.read()]


def _read_stream(path: Path, space_group: gemmi.SpaceGroup | None) -> list[UnmergedData]:
    return split_by_wavelength(read_stream(path, space_group))


FORMATS = (
    Format("MTZ", ".mtz", (b"MTZ ",), lambda path, _: read_mtz_datasets(path)),
    Format(
        "CrystFEL",
        ".stream",
        (b"CrystFEL stream",),
        lambda p, g: split_by_wavelength(read_stream(p, g)),
    ),
    Format("XDS", ".HKL", (XDS_ASCII, INTEGRATE), read_xds),
    Format("store", ".h5", (b"\x89HDF",), _read_store),
)
#: Of the files read here, in words.
SUFFIXES = tuple(format.suffix for format in FORMATS)


def read_unmerged(
    paths: Sequence[str | Path], *, space_group: gemmi.SpaceGroup | None = None
) -> list[UnmergedData]:
    """Read the datasets of each file, by what it begins with, else by its suffix.

    Parameters
    ----------
    paths : sequence of str or Path
        Of any of :data:`FORMATS`.
    space_group : gemmi.SpaceGroup, optional
        Of files that do not know it.

    Raises
    ------
    UserError
        A file is missing, of an unknown kind, or not usable.
    """
    return [data for path in paths for data in _read(Path(path), space_group)]


def _read(path: Path, space_group: gemmi.SpaceGroup | None) -> list[UnmergedData]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of unmerged reflections")
    head = head_of(path)
    by_content = [f for f in FORMATS if head.startswith(f.begins)]
    by_suffix = [f for f in FORMATS if path.suffix == f.suffix]
    for kind in (*by_content, *by_suffix):
        return kind.read(path, space_group)
    raise UserError(
        f"{path} is none of the files of unmerged reflections that are read here: "
        f"{', '.join(f'{f.name} ({f.suffix})' for f in FORMATS)}, and DIALS .refl with its .expt"
    )
