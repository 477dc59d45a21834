"""Unmerged reflections as people have them: MTZ files and CrystFEL streams.

DIALS reflection tables are read by ``pipelines.unmerged_dials``, which calls this for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from integrator.errors import UserError
from merge.io.mtz_observations import read_mtz
from merge.io.observations import (
    CELL_TOLERANCE,
    UnmergedData,
    check_one_crystal_form,
    combine_friedel,
    make_unmerged,
    reindex,
)

__all__ = [
    "CELL_TOLERANCE",
    "UnmergedData",
    "check_one_crystal_form",
    "combine_friedel",
    "make_unmerged",
    "read_mtz",
    "read_unmerged",
    "reindex",
]

READERS: dict[str, Callable[[Path], UnmergedData]] = {".mtz": read_mtz}


def read_unmerged(paths: Sequence[str | Path]) -> list[UnmergedData]:
    """Read one dataset from each file, by its suffix.

    Raises
    ------
    UserError
        A file is missing, of an unknown kind, or not usable.
    """
    return [_reader(Path(path))(Path(path)) for path in paths]


def _reader(path: Path) -> Callable[[Path], UnmergedData]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of unmerged reflections")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path} ends in {path.suffix or 'nothing'!r}; unmerged reflections are read from "
            f"{', '.join(READERS)}, and from DIALS .refl with its .expt"
        )
    return reader
