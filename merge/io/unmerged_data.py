"""Unmerged reflections as people have them: MTZ files, CrystFEL streams, and our own stores.

DIALS reflection tables are read by ``pipelines.unmerged_dials``, which calls this for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gemmi

from integrator.errors import UserError
from merge.io.crystfel_stream import read_stream
from merge.io.mtz_observations import read_mtz
from merge.io.observations import (
    CELL_TOLERANCE,
    UnmergedData,
    check_one_crystal_form,
    combine_friedel,
    make_unmerged,
    typical_cell,
)
from merge.io.reindexing import reindex
from merge.io.unmerged_store import UnmergedStore

__all__ = [
    "CELL_TOLERANCE",
    "UnmergedData",
    "check_one_crystal_form",
    "combine_friedel",
    "make_unmerged",
    "read_mtz",
    "read_stream",
    "read_unmerged",
    "reindex",
    "typical_cell",
]

#: Suffixes of the files read here.
SUFFIXES = (".mtz", ".stream", ".h5")


def read_unmerged(
    paths: Sequence[str | Path], *, space_group: gemmi.SpaceGroup | None = None
) -> list[UnmergedData]:
    """Read one dataset from each file, by its suffix.

    Parameters
    ----------
    paths : sequence of str or Path
        ``.mtz``, ``.stream`` (CrystFEL) or ``.h5`` (:mod:`merge.io.unmerged_store`).
    space_group : gemmi.SpaceGroup, optional
        Of streams, which do not know it.

    Raises
    ------
    UserError
        A file is missing, of an unknown kind, or not usable.
    """
    return [_read(Path(path), space_group) for path in paths]


def _read(path: Path, space_group: gemmi.SpaceGroup | None) -> UnmergedData:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of unmerged reflections")
    suffix = path.suffix.lower()
    if suffix == ".mtz":
        return read_mtz(path)
    if suffix == ".stream":
        return read_stream(path, space_group)
    if suffix == ".h5":
        with UnmergedStore(path) as store:
            return store.read()
    raise UserError(
        f"{path} ends in {path.suffix or 'nothing'!r}; unmerged reflections are read from "
        f"{', '.join(SUFFIXES)}, and from DIALS .refl with its .expt"
    )
