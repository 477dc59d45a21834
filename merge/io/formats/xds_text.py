"""Text of XDS' reflection files: header and rows.

Free format: ``!NAME= value`` (several on a line), ``!ITEM_H=1`` for each column or, in
INTEGRATE.HKL, the names of the columns with commas between, then one row for each observation.
gemmi's reader keeps most of the header to itself and accepts only the layouts of CORRECT and
XSCALE; DIALS writes others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.text_files import open_binary

Array = NDArray[np.float64]

_PAIR = re.compile(r"(\S+?)=\s*(.*?)(?=\s+\S+?=|\s*$)")
_NAMES = re.compile(r"[A-Z][A-Z0-9]*(,[A-Z0-9]+)+,?")
_END_OF_HEADER, _END_OF_DATA = "END_OF_HEADER", "END_OF_DATA"


@dataclass(frozen=True)
class XdsText:
    """One file.

    Parameters
    ----------
    path : Path
    header : dict of str to str
        Values by name.
    sets : dict of int to dict of str to str
        Of XSCALE: header of each input file by its number (ISET).
    columns : dict of str to (N,)
        Names as in the file: ``IOBS``, ``SIGMA(IOBS)``, ``ZD`` and so on.
    """

    path: Path
    header: dict[str, str]
    sets: dict[int, dict[str, str]]
    columns: dict[str, Array]

    def numbers(self, name: str, n: int = 1, iset: int | None = None) -> list[float] | None:
        """Return the first ``n`` numbers of a line of the header, None where there is no line.

        Parameters
        ----------
        name : str
        n : int
        iset : int, optional
            The line of this input file, else that of the whole.

        Raises
        ------
        UserError
            The line has no such numbers.
        """
        text = self.sets.get(iset, {}).get(name, self.header.get(name))
        if text is None:
            return None
        try:
            values = [float(word) for word in text.split()[:n]]
        except ValueError:
            values = []
        if len(values) < n:
            raise UserError(
                f"{self.path}: the header has {name}= {text!r}, {n} number(s) are needed; the "
                "file is damaged: write it again"
            )
        return values


_MOST_COLUMNS = 1000


def read_text(path: Path) -> XdsText:
    """Read a file of XDS.

    Raises
    ------
    UserError
        It ends too early, or its rows do not have the columns that its header names.
    """
    header: dict[str, str] = {}
    sets: dict[int, dict[str, str]] = {}
    items: list[str] = []
    with open_binary(path) as file:
        lines = (line.decode("latin-1").strip() for line in file)
        for line in lines:
            text = line.lstrip("! ")
            if text.startswith(_END_OF_HEADER):
                break
            if _NAMES.fullmatch(text):
                items += [name for name in text.split(",") if name]
                continue
            pairs = dict(_PAIR.findall(text))
            number = pairs.pop("ISET", "")
            (sets.setdefault(int(number), {}) if number.isdigit() else header).update(pairs)
        else:
            raise UserError(f"{path} ends within its header; copy or write it again")
        table = _table(_rows(lines, path), path)
    items = items or _items(header)
    if len(items) != table.shape[1]:
        raise UserError(
            f"{path} has {table.shape[1]} columns where its header names {len(items)} "
            f"({' '.join(items)}); it is damaged: write it again"
        )
    return XdsText(path, header, sets, dict(zip(items, table.T, strict=True)))


def _items(header: dict[str, str]) -> list[str]:
    """Names of the columns by their numbers, ``!ITEM_IOBS=4``."""
    prefix = "ITEM_"
    found = {int(v): k for k, v in header.items() if k.startswith(prefix) and v.isdigit()}
    if max(found, default=0) > _MOST_COLUMNS:
        raise ValueError(f"the header names column {max(found)}; there are a dozen")
    names = [found.get(i + 1, f"column {i + 1}") for i in range(max(found, default=0))]
    return [name.removeprefix(prefix) for name in names]


def _rows(lines: Iterable[str], path: Path) -> Iterator[str]:
    for line in lines:
        if line.startswith(f"!{_END_OF_DATA}"):
            return
        if line and not line.startswith("!"):
            yield line
    raise UserError(f"{path} ends before !{_END_OF_DATA}; copy or write it again")


def _table(rows: Iterator[str], path: Path) -> Array:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path} holds no reflections; give a file that does")
    try:
        return np.loadtxt(chain([first], rows), ndmin=2)
    except ValueError as error:
        raise UserError(
            f"{path} has a row of reflections that cannot be read ({error}); it is damaged: "
            "write it again"
        ) from error
