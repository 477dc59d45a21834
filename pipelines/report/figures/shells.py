"""Statistics by resolution shell, ours beside DIALS."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from braggflux.merge.output.statistics import Row
from braggflux.pipelines.report.figures.panels import (
    COLOURS,
    Panel,
    level,
    line,
    panel,
    resolution_axis,
)
from braggflux.pipelines.report.sources import DataSource
from braggflux.pipelines.report.table_one import Scores, score, shells_of

Array = NDArray[np.float64]

#: Key of the statistic, title of its panel, whether its axis starts at 0, dotted level.
PANELS = (
    ("cc_half", "CC1/2", False, None),
    ("cc_anom", "CCanom", True, 0.3),
    ("i_over_sigma", "Mean I/σ(I)", True, 2.0),
    ("r_pim", "R_pim", True, None),
    ("completeness", "Completeness", True, None),
    ("anomalous_completeness", "Anomalous completeness", True, None),
    ("redundancy", "Redundancy", True, None),
    ("z_spread", "Spread of z between half sets (1: sigmas are right)", True, 1.0),
)


def by_resolution(source: DataSource) -> list[Panel]:
    """Draw a panel for each statistic."""
    return [
        _panel(source.once(score), *entry)
        for entry in PANELS
        if any(row.get(entry[0]) for rows in source.once(score).rows.values() for row in rows)
    ]


def _panel(scores: Scores, key: str, title: str, from_zero: bool, at: float | None) -> Panel:
    traces = []
    for name, rows in scores.rows.items():
        x, y = curve(rows, key)
        if np.isfinite(y).any():
            traces.append(line(x, y, name, COLOURS[name]))
    x, _ = curve(next(iter(scores.rows.values())), key)
    return panel(
        title,
        traces,
        "resolution d [Å]",
        "",
        x_axis=resolution_axis(x),
        y_axis={"rangemode": "tozero"} if from_zero else {},
        shapes=[] if at is None else [level(at)],
    )


def curve(rows: list[Row], key: str) -> tuple[Array, Array]:
    """Middle of each shell in 1/d^2 and the value there, (n,) each; NaN for none."""
    shells = shells_of(rows)
    edges = np.array([[float(row["d_max"]), float(row["d_min"])] for row in shells])
    values = [row.get(key) for row in shells]
    y = [v if isinstance(v, int | float) else np.nan for v in values]
    return (edges**-2.0).mean(axis=1), np.array(y, dtype=float)
