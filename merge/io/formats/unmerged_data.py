"""Unmerged reflections as people have them: the formats of other programs, and our own stores.

A new format is a module with a reader and one line in :data:`FORMATS`. DIALS reflection tables are
read by ``braggflux.merge.io.formats.dials``, which calls this for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import gemmi

from braggflux.integrator.crystal.forms import CELL_TOLERANCE, check_one_crystal_form, typical_cell
from braggflux.integrator.errors import UserError
from braggflux.merge.io.dataset_split import split_by_wavelength
from braggflux.merge.io.formats.crystfel_stream import read_stream
from braggflux.merge.io.formats.mmcif import is_cif, read_mmcif
from braggflux.merge.io.formats.mtz_observations import read_mtz, read_mtz_datasets
from braggflux.merge.io.formats.scalepack import is_scalepack, read_scalepack
from braggflux.merge.io.formats.text_files import head_of
from braggflux.merge.io.formats.xds import INTEGRATE, XDS_ASCII, read_xds
from braggflux.merge.io.observations import UnmergedData, combine_friedel, make_unmerged
from braggflux.merge.io.reindexing import reindex
from braggflux.merge.io.stores.unmerged_store import UnmergedStore

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


class Given(NamedTuple):
    """What the user says of a crystal where a file does not."""

    space_group: gemmi.SpaceGroup | None = None
    cell: gemmi.UnitCell | None = None


class Format(NamedTuple):
    """A kind of file.

    ``begins`` says by its first bytes whether a file is one; ``suffix`` decides where none does
    (the reader then says what is wrong).
    """

    name: str
    suffix: str
    begins: Callable[[bytes], bool]
    read: Callable[[Path, Given], list[UnmergedData]]


def _starts(*words: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(words)


def _read_store(path: Path) -> list[UnmergedData]:
    with UnmergedStore(path) as store:
        return [store.read()]


FORMATS = (
    Format("MTZ", ".mtz", _starts(b"MTZ "), lambda path, _: read_mtz_datasets(path)),
    Format(
        "CrystFEL",
        ".stream",
        _starts(b"CrystFEL stream"),
        lambda path, given: split_by_wavelength(read_stream(path, given.space_group)),
    ),
    Format(
        "XDS",
        ".HKL",
        _starts(XDS_ASCII, INTEGRATE),
        lambda path, given: read_xds(path, given.space_group),
    ),
    Format("SCALEPACK", ".sca", is_scalepack, lambda path, given: [read_scalepack(path, *given)]),
    Format("mmCIF", ".cif", is_cif, lambda path, given: read_mmcif(path, *given)),
    Format("store", ".h5", _starts(b"\x89HDF"), lambda path, _: _read_store(path)),
)
#: Of the files read here, in words.
SUFFIXES = tuple(format.suffix for format in FORMATS)


def read_unmerged(
    paths: Sequence[str | Path],
    *,
    space_group: gemmi.SpaceGroup | None = None,
    cell: gemmi.UnitCell | None = None,
) -> list[UnmergedData]:
    """Read the datasets of each file, by what it begins with, else by its suffix.

    Parameters
    ----------
    paths : sequence of str or Path
        Of any of :data:`FORMATS`.
    space_group : gemmi.SpaceGroup, optional
        Of files that do not know it.
    cell : gemmi.UnitCell, optional
        Of files that do not know it.

    Raises
    ------
    UserError
        A file is missing, of an unknown kind, or not usable.
    """
    given = Given(space_group, cell)
    return [data for path in paths for data in _read(Path(path), given)]


def _read(path: Path, given: Given) -> list[UnmergedData]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of unmerged reflections")
    head = head_of(path)
    by_content = [kind for kind in FORMATS if kind.begins(head)]
    by_suffix = [kind for kind in FORMATS if path.suffix == kind.suffix]
    for kind in (*by_content, *by_suffix):
        return kind.read(path, given)
    raise UserError(
        f"{path} is none of the files of unmerged reflections that are read here: "
        f"{', '.join(f'{f.name} ({f.suffix})' for f in FORMATS)}, and DIALS .refl with its .expt"
    )
