"""Arrays in a file of NumPy that is either whole or absent."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from braggflux.integrator.atomic import replacing


def write_arrays(path: str | Path, arrays: Mapping[str, ArrayLike], *, pack: bool = True) -> None:
    """Write an ``.npz``.

    Parameters
    ----------
    path : str or Path
    arrays : mapping
        By their names in the file.
    pack : bool
        Whether to compress them.

    Raises
    ------
    UserError
        The folder is missing or not writable, or the disk is full.
    """
    # In memory first: an archive that fails half-way complains once more when it is freed.
    buffer = io.BytesIO()
    (np.savez_compressed if pack else np.savez)(buffer, **arrays)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
