"""Rows of a comparison: ``comparison, bin, metric, subject, value, n, reason``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.pipelines.workspace.rundir import REFERENCE

Array = NDArray[np.float64]
Row = dict[str, Any]

COLUMNS = ("comparison", "bin", "metric", "subject", "value", "n", "reason")
OURS = "ours"
BOTH = f"{OURS} vs {REFERENCE}"
#: Fewer pairs than this give no number.
MIN_PAIRS = 10
TOO_FEW = f"fewer than {MIN_PAIRS} pairs"


def correlation(x: Array, y: Array) -> float | None:
    """Pearson's, None where one side does not vary."""
    if x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def cc_row(title: str, name: str, metric: str, subject: str, x: Array, y: Array) -> Row:
    """Row of a correlation, or why there is none."""
    if len(x) < MIN_PAIRS:
        return missing_row(title, metric, subject, TOO_FEW, name, len(x))
    return make_row(title, name, metric, subject, correlation(x, y), len(x))


def make_row(title: str, name: str, metric: str, subject: str, value: float | None, n: int) -> Row:
    """Row of a value; None is "not defined here"."""
    reason = "not defined here" if value is None else ""
    return dict(zip(COLUMNS, (title, name, metric, subject, value, n, reason), strict=True))


def missing_row(
    title: str, metric: str, subject: str, reason: str, name: str = "all", n: int = 0
) -> Row:
    """Row of what could not be computed."""
    return dict(zip(COLUMNS, (title, name, metric, subject, None, n, reason), strict=True))
