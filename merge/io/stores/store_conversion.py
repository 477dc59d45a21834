"""From files that may not fit in memory to a store of observations sorted by image."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import gemmi

from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.read import Given, read_chunks
from braggflux.merge.io.screening import screened
from braggflux.merge.io.stores.chosen_group import in_group
from braggflux.merge.io.stores.unmerged_store import write_unmerged_store

#: Rows in memory at a time: of 20 columns, 160 MB.
ROWS_AT_A_TIME = 2_000_000


def convert_to_store(
    source: str | Path,
    target: str | Path,
    *,
    space_group: gemmi.SpaceGroup | None = None,
    cell: gemmi.UnitCell | None = None,
    rows_at_a_time: int = ROWS_AT_A_TIME,
) -> None:
    """Write the observations of a file to a store.

    Memory does not depend on the number of images of MTZ files and CrystFEL streams. Partials
    are not summed here; copies of rows are left out where they are read together, which those of
    one image are.

    Parameters
    ----------
    source : str or Path
        Of any format of :mod:`braggflux.merge.io.read`.
    target : str or Path
        The store, and during the work as much again beside it.
    space_group : gemmi.SpaceGroup, optional
        Instead of that of the file; a stream does not know it.
    cell : gemmi.UnitCell, optional
        Of a file that does not know it.
    rows_at_a_time : int

    Raises
    ------
    UserError
        As the readers; or an MTZ file holds partials, or a file several datasets.
    """
    given = Given(space_group, cell)
    target = Path(target)
    # named as what `replacing` makes, so that it is known as a leftover
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        chunks = read_chunks(Path(source), given, Path(folder), rows_at_a_time)
        write_unmerged_store(target, map(screened, _in_group(chunks, space_group)))


def _in_group(
    chunks: Iterator[UnmergedData], space_group: gemmi.SpaceGroup | None
) -> Iterator[UnmergedData]:
    for data in chunks:
        yield data if space_group is None else in_group(data, space_group)
