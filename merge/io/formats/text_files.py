"""Text files of other programs, compressed or not."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from braggflux.integrator.errors import UserError

_GZIP_MAGIC = b"\x1f\x8b"


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, or what is compressed in it by gzip.

    Raises
    ------
    UserError
        It cannot be read; also when that shows only within the ``with`` block.
    """
    try:
        with path.open("rb") as file:
            is_compressed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        with gzip.open(path, "rb") if is_compressed else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({error}); check that it is complete, or give another"
        ) from error


def head_of(path: Path, n_bytes: int = 4096) -> bytes:
    """Return the first bytes of a file, decompressed."""
    with open_binary(path) as file:
        return file.read(n_bytes)


def stem_of(path: Path) -> str:
    """Return the name of a file without its suffix, and without that of the compression."""
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem
