"""Tables on standard output: framed on a terminal, aligned plain text in a file or pipe."""

from __future__ import annotations

import csv
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory

Cells = Sequence[Sequence[str]]

#: More sites of one kind than this are shown as their mean.
MAX_SINGLE_SITES = 5
#: Columns of characters that a table may take: a terminal's least usual width.
MAX_WIDTH = 80
#: Between two columns, framed or plain.
_GAP = 2


def write_table(
    title: str,
    header: Sequence[str],
    rows: Cells,
    *,
    notes: Sequence[str] = (),
    emphasis: Sequence[str] = (),
    n_fixed: int = 1,
) -> None:
    """Print a table; one that is wider than :data:`MAX_WIDTH` goes on below, part by part.

    Parameters
    ----------
    title : str
    header : sequence of str
        The first column is aligned left, the others right.
    rows : sequence of rows of str
    notes : sequence of str
        Lines under the table, e.g. why something is missing.
    emphasis : sequence of str
        First cells of rows that a terminal shows in bold.
    n_fixed : int
        Columns from the left that every part of a wide table repeats.
    """
    for k, columns in enumerate(fitting_columns(header, rows, n_fixed)):
        part = [[row[i] for i in columns] for row in (header, *rows)]
        heading = title if k == 0 else f"{title}, continued"
        if sys.stdout.isatty():
            _write_framed(heading, part[0], part[1:], emphasis)
        else:
            sys.stdout.write("\n".join(plain_table(heading, part[0], part[1:])) + "\n\n")
    for note in notes:
        sys.stdout.write(_wrapped(note))
    if notes:
        sys.stdout.write("\n")


def fitting_columns(header: Sequence[str], rows: Cells, n_fixed: int) -> list[list[int]]:
    """Split a table's columns into parts that fit :data:`MAX_WIDTH`, each with the first ones.

    Returns
    -------
    list of list of int
        Numbers of the columns of each part; a column wider than all room has a part alone.
    """
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    fixed = list(range(min(n_fixed, len(header))))
    room = MAX_WIDTH - sum(widths[i] + _GAP for i in fixed)
    parts, used = [list(fixed)], 0
    for i in range(len(fixed), len(header)):
        if used and used + widths[i] + _GAP > room:
            parts.append(list(fixed))
            used = 0
        parts[-1].append(i)
        used += widths[i] + _GAP
    return parts


def _wrapped(note: str) -> str:
    """Set a note as an item of a list."""
    lines = textwrap.wrap(note, MAX_WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def write_note(text: str) -> None:
    """Print a paragraph that stands alone, as wide as a table may be."""
    sys.stdout.write("\n".join(textwrap.wrap(text, MAX_WIDTH)) + "\n\n")


def write_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write CSV to standard output; None is an empty field, a float has two decimals."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{x:.2f}" if isinstance(x, float) else x for x in row])


def plain_table(title: str, header: Sequence[str], rows: Cells) -> list[str]:
    """Lines of an aligned table."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    lines = [title, _aligned(header, widths), rule]
    return lines + [_aligned(row, widths) for row in rows]


def peaks_table(run: RunDirectory) -> tuple[list[str], list[list[str]], list[str]]:
    """Arrange peaks.csv as epoch x site.

    Sites are grouped by residue and atom name (iodides, sulfurs of cysteines, ...), the strongest
    group first; a group of more than :data:`MAX_SINGLE_SITES` has one column, its mean.

    Returns
    -------
    header, rows, notes : list
        Epochs downwards, the reference last; a note says why the reference has no row.
    """
    peaks = run.read_peaks()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for peak in peaks:
        groups.setdefault((peak["residue"], peak["atom"]), []).append(peak)
    strongest = sorted(groups.values(), key=lambda g: -_mean_height(g))
    columns = [column for group in strongest for column in _columns(group)]
    epochs = [e for e in dict.fromkeys(p["epoch"] for p in peaks) if e != REFERENCE]
    if any(p["epoch"] == REFERENCE for p in peaks):
        epochs.append(REFERENCE)
    rows = [
        [str(e), *(_height([p for p in column if p["epoch"] == e]) for _, column in columns)]
        for e in epochs
    ]
    notes = _which_differences(columns)
    reasons = run.read_provenance()["notes"]
    if (reason := reasons.get("peaks")) is not None:
        notes.append(f"no peaks: {reason}")
    if (reason := reasons.get("reference")) is not None:
        notes.append(f"no {REFERENCE} row: {reason}")
    return ["epoch", *(name for name, _ in columns)], rows, notes


def _which_differences(columns: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[str]:
    """Note which difference the heights are of, where not all are of F(+) - F(-)."""
    peaks = [p for _, entries in columns for p in entries]
    coupled = {p["epoch"] for p in peaks if p["difference"] == "coupled"}
    if not coupled:
        return []
    note = "heights in the map of DANO, the coupled difference, unweighted"
    if own := [str(e) for e in dict.fromkeys(p["epoch"] for p in peaks) if e not in coupled]:
        note += f"; {', '.join(own)}: of F(+) - F(-), weighted by their errors"
    last = max(e for e in coupled if e != REFERENCE)
    shown = []
    for name, entries in columns[:MAX_SINGLE_SITES]:
        of_last = [p | {"peak_sigma": p["peak_sigma_own"]} for p in entries if p["epoch"] == last]
        shown.append(f"{name} {_height(of_last)}")
    return [note, f"epoch {last} by F(+) - F(-), weighted: {', '.join(shown)}"]


def _columns(group: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Name and entries (of all epochs) of each column for one kind of site."""
    sites: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for peak in group:
        sites.setdefault((peak["chain"], peak["seqid"]), []).append(peak)
    residue, atom = group[0]["residue"], group[0]["atom"]
    if len(sites) > MAX_SINGLE_SITES:
        return [(f"{residue} {atom}, mean of {len(sites)}", group)]
    has_chains = len({seqid for _, seqid in sites}) < len(sites)
    return [
        (f"{residue} {chain if has_chains else ''}{seqid}", entries)
        for (chain, seqid), entries in sites.items()
    ]


def _height(entries: list[dict[str, Any]]) -> str:
    has_height = any(p["peak_sigma"] is not None for p in entries)
    return f"{_mean_height(entries):.2f}" if has_height else "-"


def _mean_height(entries: list[dict[str, Any]]) -> float:
    heights = [p["peak_sigma"] for p in entries if p["peak_sigma"] is not None]
    return sum(heights) / len(heights) if heights else 0.0


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]).rstrip()


def _write_framed(title: str, header: Sequence[str], rows: Cells, emphasis: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAVY
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAVY)
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(c) for c in row), style="bold" if row[0] in emphasis else None)
    Console(file=sys.stdout).print(table)
