"""Unmerged reflections as people have them: one table of formats, for `merge` and `convert` alike.

A new format is a module with a reader and one line in :data:`FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import gemmi
import numpy as np

from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.file_kinds import PHOTON_COUNTS, REFLECTIONS, file_kind
from braggflux.merge.io.dataset_split import check_only_one, split_by_wavelength
from braggflux.merge.io.formats.crystfel_stream import read_stream, stream_chunks
from braggflux.merge.io.formats.dials import read_dials_datasets
from braggflux.merge.io.formats.mmcif import is_cif, read_mmcif
from braggflux.merge.io.formats.mtz_chunks import mtz_chunks
from braggflux.merge.io.formats.mtz_observations import read_mtz_datasets
from braggflux.merge.io.formats.scalepack import is_scalepack, read_scalepack
from braggflux.merge.io.formats.text_files import head_of
from braggflux.merge.io.formats.xds import INTEGRATE, XDS_ASCII, read_xds
from braggflux.merge.io.observations import UnmergedData, check_possible
from braggflux.merge.io.stores.unmerged_store import UnmergedStore

EXPERIMENTS = ".expt"
REMEDY = "write it again with the program that made it, or give another"


class Given(NamedTuple):
    """Space group and cell that the user gives for files without, and the .expt beside one."""

    space_group: gemmi.SpaceGroup | None = None
    cell: gemmi.UnitCell | None = None
    experiments: Path | None = None


class Needs(Enum):
    """Whether a file comes with an experiment list (.expt) of DIALS."""

    NO_EXPT = auto()
    EXPT_OR_NONE = auto()
    EXPT = auto()


class Format(NamedTuple):
    """A kind of file.

    Parameters
    ----------
    name, suffix : str
        For messages. The suffix also decides where no ``begins`` does: the reader then says what
        is wrong.
    begins : callable
        Whether a file with these first bytes, decompressed, is one.
    read : callable
        Reader of all its datasets.
    chunks : callable, optional
        Reader of its only dataset in pieces of whole images, for files larger than memory. The
        last arguments are a folder for temporary files, and the rows in memory at a time.
    needs : Needs
    """

    name: str
    suffix: str
    begins: Callable[[Path, bytes], bool]
    read: Callable[[Path, Given], list[UnmergedData]]
    chunks: Callable[[Path, Given, Path, int], Iterator[UnmergedData]] | None = None
    needs: Needs = Needs.NO_EXPT


def _starts(*words: bytes) -> Callable[[Path, bytes], bool]:
    return lambda _, head: head.startswith(words)


def _is(kind: str) -> Callable[[Path, bytes], bool]:
    return lambda path, _: file_kind(path) == kind


def _is_other_hdf5(path: Path, head: bytes) -> bool:
    return head.startswith(b"\x89HDF") and file_kind(path) != PHOTON_COUNTS


def _read_store(path: Path, _: Given) -> list[UnmergedData]:
    with UnmergedStore(path) as store:
        return [store.read()]


def _read_photons(path: Path, given: Given) -> list[UnmergedData]:
    from braggflux.merge.io.formats.photon_table import read_photon_table  # it imports torch

    return read_photon_table(path, given.experiments)


#: In the order in which a file is asked what it is.
FORMATS = (
    Format(
        "MTZ",
        ".mtz",
        _starts(b"MTZ "),
        lambda path, _: read_mtz_datasets(path),
        lambda path, _, folder, n_rows: mtz_chunks(path, folder, n_rows),
    ),
    Format(
        "CrystFEL",
        ".stream",
        _starts(b"CrystFEL stream"),
        lambda path, given: split_by_wavelength(read_stream(path, given.space_group)),
        lambda path, given, *_: stream_chunks(path, given.space_group),
    ),
    Format(
        "XDS",
        ".HKL",
        _starts(XDS_ASCII, INTEGRATE),
        lambda path, given: read_xds(path, given.space_group),
    ),
    Format(
        "SCALEPACK",
        ".sca",
        lambda _, head: is_scalepack(head),
        lambda path, given: [read_scalepack(path, given.space_group, given.cell)],
    ),
    Format(
        "mmCIF",
        ".cif",
        lambda _, head: is_cif(head),
        lambda path, given: read_mmcif(path, given.space_group, given.cell),
    ),
    # before photon counts: of an .h5 file that is damaged, its reader says what is wrong
    Format("store", ".h5", _is_other_hdf5, _read_store),
    Format(
        "photon counts",
        ".h5",
        _is(PHOTON_COUNTS),
        _read_photons,
        needs=Needs.EXPT_OR_NONE,
    ),
    Format(
        "DIALS",
        ".refl",
        _is(REFLECTIONS),
        lambda path, given: read_dials_datasets(path, given.experiments, given.space_group),
        needs=Needs.EXPT,
    ),
)


def read_table(
    paths: Sequence[str | Path],
    *,
    space_group: gemmi.SpaceGroup | None = None,
    cell: gemmi.UnitCell | None = None,
) -> list[UnmergedData]:
    """Read the datasets of each file, or of each pair of DIALS files.

    A .refl goes with the .expt of the same stem, else with the one at the same place among the
    .expt files. So does a table of photon counts, which needs none where it holds its own cell.

    Parameters
    ----------
    paths : sequence of str or Path
        Of any of :data:`FORMATS`, in any order; the datasets come in the order of the files other
        than .expt.
    space_group : gemmi.SpaceGroup, optional
        Of files that do not know it; others keep their own.
    cell : gemmi.UnitCell, optional
        Of files that do not know it.

    Raises
    ------
    UserError
        A file is missing, of an unknown kind, or not usable; or .refl and .expt do not pair.
    """
    given = [Path(path) for path in paths]
    files = [(path, format_of(path)) for path in given if path.suffix != EXPERIMENTS]
    experiments = _pairs(files, [path for path in given if path.suffix == EXPERIMENTS])
    found = []
    for path, kind in files:
        with reading(path, REMEDY), np.errstate(all="ignore"):
            own = kind.read(path, Given(space_group, cell, experiments.get(path)))
            for data in own:
                check_possible(data)
        found += own
    return found


def read_chunks(path: Path, given: Given, folder: Path, n_rows: int) -> Iterator[UnmergedData]:
    """Read the only dataset of a file, in pieces of whole images where its format allows it.

    Parameters
    ----------
    path : Path
    given : Given
    folder : Path
        For temporary files, together as large as this one.
    n_rows : int
        In memory at a time, about.

    Raises
    ------
    UserError
        As :func:`read_table`, or the file holds several datasets.
    """
    chunks = format_of(path).chunks
    if chunks is not None:
        with reading(path, REMEDY):
            for data in chunks(path, given, folder, n_rows):
                check_possible(data)
                yield data
        return
    data = read_table([path], space_group=given.space_group, cell=given.cell)
    check_only_one([d.name for d in data], path)
    yield data[0]


def format_of(path: Path) -> Format:
    """Find the format of a file, by what it begins with, else by its suffix.

    Raises
    ------
    UserError
        It is missing, or of no format that is known.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; give a file of unmerged reflections, of a run its intensities.h5"
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of unmerged reflections")
    head = head_of(path)
    by_content = (kind for kind in FORMATS if kind.begins(path, head))
    by_suffix = (kind for kind in FORMATS if kind.suffix == path.suffix)
    for kind in chain(by_content, by_suffix):
        return kind
    names = (f"{f.name} ({f.suffix})" for f in FORMATS if f.needs is not Needs.EXPT)
    raise UserError(
        f"{path} is none of the files of unmerged reflections that are read here: "
        f"{', '.join(names)}, and DIALS .refl with its .expt"
    )


def _pairs(files: Sequence[tuple[Path, Format]], lists: Sequence[Path]) -> Mapping[Path, Path]:
    """Experiment list of each file that has one."""
    tables = [path for path, kind in files if kind.needs is Needs.EXPT]
    takers = [path for path, kind in files if kind.needs is not Needs.NO_EXPT]
    if len(lists) == len(takers):
        tables = takers
    if len(tables) != len(lists):
        raise UserError(
            f"{len(tables)} .refl and {len(lists)} .expt files were given; each .refl needs the "
            ".expt of the same DIALS step"
        )
    by_stem = {path.with_suffix(""): path for path in lists}
    if all(path.with_suffix("") in by_stem for path in tables):
        return {path: by_stem[path.with_suffix("")] for path in tables}
    return dict(zip(tables, lists, strict=True))
