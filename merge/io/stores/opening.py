"""Any file of this program that holds more than fits into memory, by what it says it is."""

from __future__ import annotations

from pathlib import Path

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.file_kinds import SHOEBOXES, UNMERGED, file_kind
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.merge.io.stores.unmerged_store import UnmergedStore


def open_store(path: str | Path) -> ShoeboxStore | UnmergedStore:
    """Open a store of shoeboxes or of unmerged reflections; a context manager closes it.

    Parameters
    ----------
    path : str or Path
        Written by ``braggflux extract`` or ``run`` (shoeboxes), or ``braggflux convert``
        (unmerged reflections).

    Raises
    ------
    UserError
        The file is missing, truncated, of an unknown version, or no store.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give a store of `braggflux extract` or `convert`")
    kind = file_kind(path)
    if kind == SHOEBOXES:
        return ShoeboxStore.open(path)
    if kind == UNMERGED:
        return UnmergedStore(path)
    raise UserError(
        f"{path} is {kind or 'of no known kind'}; {SHOEBOXES} or {UNMERGED} is needed here"
    )
