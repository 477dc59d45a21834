"""Files that are either whole or absent."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from braggflux.integrator.errors import UserError

#: Names of :func:`replacing` for this program's files; a user's `.notes.markdown` is none.
_TEMPORARY = re.compile(
    r"\.(latest|.+\.(pt|mtz|h5|csv|jsonl?|yaml|refl|expt|npz|html|txt|tex|cif))\.[a-z0-9_]{8}(\.npz)?"
)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` that becomes ``path`` when the block succeeds.

    Parameters
    ----------
    path : str or Path
        The file to write.

    Yields
    ------
    Path
        An existing empty file in the same folder; removed when the block raises.

    Raises
    ------
    UserError
        When the folder is missing or not writable, or the disk is full.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; "
            "choose a writable folder with enough space"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_room(path: str | Path, n_bytes: float, what: str) -> None:
    """Refuse to begin with a file that the disk has no room for.

    Parameters
    ----------
    path : str or Path
        The file to write.
    n_bytes : float
        That it will need at least.
    what : str
        That needs them, for the message.

    Raises
    ------
    UserError
    """
    folder = Path(path).absolute().parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # writing will say what is wrong with the folder
        return
    if free < n_bytes:
        raise UserError(
            f"{what} need about {n_bytes / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB free; "
            "make room, choose another --out, or a coarser --d-min"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process has left under temporary names of :func:`replacing`.

    Parameters
    ----------
    folder : Path
        One that only this program writes into, and no other process now.
    """
    for path in folder.glob(".*"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # the parts of a store
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    """Return the process's file mode mask (mkstemp ignores it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
