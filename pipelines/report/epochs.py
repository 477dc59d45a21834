"""The table of peak heights in its published form: epochs 1, 3, 5, ... and the last, DIALS, gain.

``peaks.csv`` holds every epoch and site; this is what a reader looks at.
"""

from __future__ import annotations

import sys
from pathlib import Path

from braggflux.pipelines.report.terminal import peaks_table, write_table
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory, write_rows

GAIN = "gain [%]"


def published_table(run: RunDirectory) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows (epochs downwards, DIALS last) and notes, of which the last is the gain."""
    header, rows, notes = peaks_table(run)
    epochs = [int(row[0]) for row in rows if row[0] != REFERENCE]
    shown = {e for e in epochs if e % 2} | set(epochs[-1:])
    rows = [row for row in rows if row[0] == REFERENCE or int(row[0]) in shown]
    if (gain := gain_row(rows)) is not None:
        parts = [f"{name} {g}" for name, g in zip(header[1:], gain[1:], strict=True) if g != "-"]
        notes = [*notes, f"epoch {epochs[-1]} over {REFERENCE} [%]: {', '.join(parts)}"]
    return header, rows, notes


def gain_row(rows: list[list[str]]) -> list[str] | None:
    """Gain of the last epoch over DIALS, per cent; None without either."""
    if len(rows) < 2 or rows[-1][0] != REFERENCE:
        return None
    gain = [GAIN]
    for ours, theirs in zip(rows[-2][1:], rows[-1][1:], strict=True):
        known = ours != "-" and theirs != "-" and float(theirs) > 0
        gain.append(f"{100 * (float(ours) / float(theirs) - 1):+.1f}" if known else "-")
    return gain


def show_peaks(run: RunDirectory, n_columns: int = 8) -> None:
    """Print epoch x site, the leading columns of :func:`published_table`."""
    header, rows, notes = published_table(run)
    if not rows:
        sys.stdout.write("".join(f"{note}\n" for note in notes))
        return
    if len(header) - 1 > n_columns:
        notes.append(f"weaker sites: {run.peaks_file}")
    rows = [row[: n_columns + 1] for row in rows]
    title = "Anomalous peak height [sigma of the map]"
    if run.dataset:
        title += f", {run.dataset}"
    write_table(title, header[: n_columns + 1], rows, notes=notes, emphasis=[REFERENCE])


def write_published_table(run: RunDirectory) -> Path | None:
    """Write the table and the gain as ``peaks_by_epoch.csv``; None without peaks."""
    header, rows, _ = published_table(run)
    if not rows:
        return None
    if (gain := gain_row(rows)) is not None:
        rows = [*rows, gain]
    entries = [
        dict(zip(header, ("" if x == "-" else x for x in row), strict=True)) for row in rows
    ]
    write_rows(run.peaks_by_epoch, entries, header)
    return run.peaks_by_epoch
