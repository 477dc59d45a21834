"""Checksums of a finished result's files that have none of their own.

HDF5 files and parameters have theirs inside; those of tables, settings and MTZ files stand in
provenance.json, from the end of the run or merge on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import Struct

from braggflux.integrator.errors import UserError
from braggflux.pipelines.workspace.outputs import PROVENANCE
from braggflux.pipelines.workspace.records.readers import read_json

logger = logging.getLogger(__name__)

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


def tell_changed(paths: Iterable[Path | None]) -> None:
    """Warn of files, given by their own names, that a finished result was left with otherwise.

    A person may have edited them, so that they are no error as in :func:`check_sums`.

    Parameters
    ----------
    paths : iterable of Path or None
        Of any kind; a file without a record is passed by.
    """
    for path in paths:
        if path is None or not path.is_file():
            continue
        for folder in path.absolute().parents[:2]:  # the result's, or one in it
            expected = _recorded(folder).get(path.absolute().relative_to(folder).as_posix())
            if expected is not None and _sum(path) != expected:
                logger.warning(
                    "%s is not as its result was left (by its SHA-256 in %s): it was edited, or "
                    "is damaged; it is read as it is",
                    *(path, folder / PROVENANCE),
                )


class _Sums(Struct):
    files: dict[str, str] = {}


def _recorded(folder: Path) -> dict[str, str]:
    """Checksums in the record of a folder; none of another program's, or a damaged one."""
    with suppress(UserError):
        if (folder / PROVENANCE).is_file():
            return read_json(folder / PROVENANCE, _Sums).get(KEY, {})
    return {}


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
