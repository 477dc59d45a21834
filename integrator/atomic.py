"""Files that are either whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from braggflux.integrator.errors import UserError


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


def _umask() -> int:
    """Return the process's file mode mask (mkstemp ignores it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
