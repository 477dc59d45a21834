"""Checksums of a finished result's files that have none of their own.

HDF5 files and parameters have theirs inside; those of tables, settings and MTZ files stand in
provenance.json, from the end of the run or merge on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braggflux.integrator.errors import UserError

KEY = "files"
#: What commands read back and none rewrites once a result is finished.
PATTERNS = (
    *("config.yaml", "metrics.json*", "*peaks.csv", "*statistics.csv", "stage_times.csv"),
    *("*merged.mtz", "*half_sets.mtz", "*unmerged.mtz", "*integrated.refl", "*integrated.expt"),
    *("shoebox_examples.npz", "images.csv", "indexing.csv", "mtz/*.mtz"),
)


def sums_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a folder, by their names in it."""
    found = sorted({path for pattern in PATTERNS for path in folder.glob(pattern)})
    return {path.relative_to(folder).as_posix(): _sum(path) for path in found}


def check_sums(folder: Path, record: Mapping[str, Any]) -> None:
    """Look whether files are those that a finished result was left with.

    Parameters
    ----------
    folder : Path
    record : mapping
        Content of provenance.json; that of earlier versions and of unfinished results has no
        checksums. A file that is gone is no damage.

    Raises
    ------
    UserError
        A file has changed.
    """
    for name, expected in record.get(KEY, {}).items():
        path = folder / name
        if path.is_file() and _sum(path) != expected:
            raise UserError(
                f"{path} has changed since this result was finished (by its SHA-256 in "
                "provenance.json); take both from a copy, or make the result anew in another --out"
            )


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
