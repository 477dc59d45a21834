"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from braggflux.integrator.errors import UserError, brief

#: What the system says of a disk that is full, of a quota that is used up, of a file too large.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: What is left of a user's share of a disk, no program can tell.
_NO_SHARE = "your quota on it is used up: remove files of yours, or ask for a larger one"
_AGAIN = "give the command again (run, process: with --resume), or choose another --out"
#: Names of :func:`replacing` for this program's files; a user's `.notes.markdown` is none.
_TEMPORARY = re.compile(
    r"\.(latest|.+\.(pt|mtz|h5|csv|jsonl?|yaml|refl|expt|npz|html|txt|tex|cif))\.[a-z0-9_]{8}"
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
    with writing(target):
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            temporary.chmod(0o666 & ~_umask())
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a failure to write ``path`` into an error of one line.

    Raises
    ------
    UserError
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {why_not_written(error, path)}") from error


def why_not_written(error: OSError, path: str | Path) -> str:
    """Return what the system said, the room that there is, and the remedy.

    Parameters
    ----------
    error : OSError
    path : str or Path
        File that could not be written; what there was of it is removed already.
    """
    folder = Path(path).absolute().parent
    reason = os.strerror(error.errno) if error.errno in FULL else error.strerror or brief(error)
    if error.errno == errno.EDQUOT:
        return f"{reason} on the disk of {folder}; {_NO_SHARE}; then {_AGAIN}"
    if error.errno == errno.EFBIG:
        return f"{reason} for that disk or for `ulimit -f`; raise that limit, then {_AGAIN}"
    if error.errno == errno.ENOSPC:
        return f"{reason}; it needs more than {_free(folder)}: make room, then {_AGAIN}"
    return f"{reason}; choose a writable folder with enough space"


def _free(folder: Path) -> str:
    """Return the room on the disk of a folder, for a message."""
    try:
        return f"the {shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder}"
    except OSError:
        return f"{folder} has"


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


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what a killed process has left under temporary names of :func:`replacing`.

    Parameters
    ----------
    folder : Path
        One that only this program writes into, and no other process now.
    name : str, optional
        Only those of this file, of any folder, that no other process writes now.
    """
    for path in folder.glob(".*"):
        if not _TEMPORARY.fullmatch(path.name) or (name and path.name[1:-9] != name):
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
