"""Records of a run directory as they are read back: each file against its schema, at one place.

They are written by the program, but copied, edited and damaged by others. What is read is plain
values; the schemas say which.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.schema import converted

REMEDY = "take it from a copy, or start anew in another --out"
#: Of the tables; the columns of all others are numbers.
TEXT_COLUMNS = frozenset(
    (
        *("shell", "reason", "dataset", "stage", "epoch"),
        *("chain", "seqid", "residue", "atom", "difference"),
        *("comparison", "bin", "metric", "subject"),
    )
)


class Git(Struct):
    """State of the source tree."""

    commit: str
    has_uncommitted_changes: bool


class Session(Struct):
    """What made a result, and when."""

    started: datetime
    ended: datetime | None = None
    braggflux: str = ""
    argv: list[str] = []
    host: str = ""
    platform: str = ""
    python: str = ""
    git: Git | None = None
    cpu_count: int | None = None
    gpu: str | None = None
    packages: dict[str, str | None] = {}


class InputFile(Struct):
    """A file that was read."""

    path: str
    size: Annotated[int, Meta(ge=0)]
    sha256: str | None = None
    reason: str | None = None


class RunRecord(Struct):
    """``provenance.json`` of a run."""

    sessions: Annotated[list[Session], Meta(min_length=1)]
    inputs: dict[str, InputFile]
    notes: dict[str, str]
    files: dict[str, str] = {}


class MergeRecord(Session, kw_only=True):
    """``provenance.json`` of a merge."""

    inputs: dict[str, InputFile]
    files: dict[str, str] = {}


class _EpochNumber(Struct):
    epoch: Annotated[int, Meta(ge=0, le=10**9)]


_Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
_Metrics = dict[str, bool | _Number | str | dict[str, str] | None]


def read_json(path: Path, kind: Any = dict) -> dict[str, Any]:
    """Read a JSON file, and check it.

    Parameters
    ----------
    path : Path
    kind : type
        Schema, of :mod:`msgspec`.

    Raises
    ------
    UserError
    """
    with reading(path, REMEDY):
        document = msgspec.json.decode(path.read_bytes())
        converted(document, kind)
        return document


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, one mapping a line; nothing where there is none.

    Raises
    ------
    UserError
    """
    if not path.is_file():
        return []
    with reading(path, REMEDY):
        rows = [msgspec.json.decode(line) for line in path.read_bytes().splitlines() if line]
        for row in rows:
            converted(row, _EpochNumber)
            converted(row, _Metrics)
    return rows


def read_rows(path: Path, needed: Sequence[str] = ()) -> list[dict[str, str]]:
    """Read the rows of a CSV file; nothing where there is none.

    Parameters
    ----------
    path : Path
    needed : sequence of str
        Columns that must be there.

    Raises
    ------
    UserError
        Lines of another length than the first, columns that are missing, or fields that are
        neither a number nor empty, where these are no columns of text.
    """
    if not path.is_file():
        return []
    with reading(path, REMEDY), path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
        names = reader.fieldnames or []
        if missing := set(needed) - set(names):
            raise ValueError(f"it has no column {sorted(missing)[0]}")
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values():
                raise ValueError(f"line {number} has not {len(names)} fields")
    return rows


def read_table(path: Path, needed: Sequence[str] = ()) -> list[dict[str, str]]:
    """Read a CSV file whose columns, but for :data:`TEXT_COLUMNS`, are finite numbers or empty.

    Raises
    ------
    UserError
    """
    rows = read_rows(path, needed)
    for number, row in enumerate(rows, 2):
        for name, text in row.items():
            if text and name not in TEXT_COLUMNS and not _is_finite(text):
                raise UserError(
                    f"{path}: line {number} has {name} = {text[:40]!r}, no number; {REMEDY}"
                )
    return rows


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
