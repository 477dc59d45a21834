"""compare.csv as tables and panels: one for each comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from braggflux.pipelines.report.figures.panels import Panel, line, panel

Rows = Sequence[Mapping[str, str]]

#: Metrics that say more as curves, of each comparison.
DRAWN = {
    "merged against the truth by resolution [A]": ("cc Bijvoet", "R F"),
    "observations against true photons": ("rms error", "spread of z"),
    "observations against true photons, not cut by an edge or gap": (
        *("rms error", "spread of z"),
    ),
    "error by distance to the next spot [pixels]": ("rms error / bound", "spread of z"),
    "error by place on the detector: resolution [A]": ("rms error / bound", "spread of z"),
    "observations by I/sigma of DIALS": ("cc", "median ratio", "sigma ratio"),
    "merged by resolution [A]": ("cc I", "cc Bijvoet"),
}


def comparison_tables(rows: Rows) -> list[dict[str, Any]]:
    """Title, header, rows, reasons and panels of each comparison."""
    tables = []
    for title in dict.fromkeys(row["comparison"] for row in rows):
        entries = [row for row in rows if row["comparison"] == title]
        columns = list(dict.fromkeys((r["metric"], r["subject"]) for r in entries))
        values = {(r["bin"], r["metric"], r["subject"]): r["value"] for r in entries}
        body = [
            [name, *(short(values.get((name, *column))) for column in columns)]
            for name in dict.fromkeys(r["bin"] for r in entries)
        ]
        tables.append(
            {
                "title": title,
                "header": ["", *(f"{metric} ({subject})" for metric, subject in columns)],
                "rows": body,
                "reasons": list(dict.fromkeys(r["reason"] for r in entries if r["reason"])),
                "panels": _panels(entries, DRAWN.get(title, ())),
            }
        )
    return tables


def _panels(entries: Rows, metrics: Sequence[str]) -> list[Panel]:
    """One panel per metric: bins across, a line for each subject."""
    chosen = [r for r in entries if r["value"] and not r["bin"].startswith("all")]
    subjects = list(dict.fromkeys(r["subject"] for r in chosen))
    bins = list(dict.fromkeys(r["bin"] for r in chosen))
    values = {(r["bin"], r["metric"], r["subject"]): float(r["value"]) for r in chosen}
    panels = []
    for metric in metrics:
        if not any(r["metric"] == metric for r in chosen):
            continue
        traces = []
        for k, subject in enumerate(subjects):
            y = [values.get((b, metric, subject), np.nan) for b in bins]
            if np.isfinite(y).any():
                traces.append(line(bins, y, subject, f"@{k % 6}"))
        is_log = metric.startswith("rms") and "/" not in metric
        axis = {"type": "log"} if is_log else {}
        panels.append(panel(metric, traces, y_axis=axis, x_axis={"type": "category"}))
    return panels


def short(text: str | None) -> str:
    """Four digits of a number, a dash for what is missing."""
    if not text:
        return "–"
    number = float(text)
    return str(int(number)) if number.is_integer() and abs(number) > 1 else f"{number:.4g}"
