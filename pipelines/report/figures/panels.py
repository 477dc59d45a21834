"""Panels: plotly traces and layouts as plain data, drawn by the page itself.

A colour is written ``@0`` ... ``@6``, ``@ink`` or ``@soft``: the page puts in the colour of its
light or dark theme. DIALS is always ``@soft``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from braggflux.pipelines.report.sources import OURS
from braggflux.pipelines.workspace.rundir import REFERENCE

Trace = dict[str, Any]
Panel = dict[str, Any]

#: Colour of each program.
COLOURS = {OURS: "@0", REFERENCE: "@1"}
DIGITS = 5


def numbers(values: ArrayLike, digits: int = DIGITS) -> Any:
    """Nested lists of rounded numbers; what is not finite becomes None, a gap."""
    array = np.asarray(values, dtype=float)
    if array.ndim > 1:
        return [numbers(row, digits) for row in array]
    return [float(f"{x:.{digits}g}") if np.isfinite(x) else None for x in array.tolist()]


def line(x: ArrayLike, y: ArrayLike, name: str = "", colour: str = "@0", **options: Any) -> Trace:
    """Points joined by a line; ``mode`` and ``dash`` may change that."""
    dash = options.pop("dash", "solid")
    texts = np.asarray(x).dtype.kind in "US"
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": np.asarray(x).tolist() if texts else numbers(x),
        "y": numbers(y),
        "name": name,
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"color": colour, "size": 5},
        "showlegend": bool(name),
    }
    return trace | options


def panel(
    title: str,
    traces: Sequence[Trace],
    x: str = "",
    y: str = "",
    *,
    height: int = 280,
    wide: bool = False,
    **layout: Any,
) -> Panel:
    """One drawing with its axes' titles; ``x_axis`` and ``y_axis`` add to their settings."""
    x_axis = {"title": {"text": x}} | layout.pop("x_axis", {})
    y_axis = {"title": {"text": y}} | layout.pop("y_axis", {})
    return {
        "title": title,
        "traces": list(traces),
        "layout": {"xaxis": x_axis, "yaxis": y_axis} | layout,
        "height": height,
        "wide": wide,
    }


def resolution_axis(inv_d2: ArrayLike, n: int = 6) -> dict[str, Any]:
    """Axis of 1/d^2 that is labelled with d [A]."""
    inv_d2 = np.asarray(inv_d2, dtype=float)
    ticks = np.linspace(inv_d2.min(), inv_d2.max(), n)
    return {
        "tickvals": numbers(ticks),
        "ticktext": [f"{t**-0.5:.2f}" if t > 0 else "∞" for t in ticks],
    }


def level(y: float, text: str = "") -> dict[str, Any]:
    """Dotted horizontal line at ``y``, for the layout's ``shapes``."""
    shape: dict[str, Any] = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    shape["line"] = {"color": "@soft", "width": 1, "dash": "dot"}
    if text:
        shape["label"] = {"text": text, "textposition": "end", "font": {"size": 11}}
    return shape


def heatmap(
    z: ArrayLike, x: ArrayLike, y: ArrayLike, scale: str = "Viridis", **options: Any
) -> Trace:
    """Image of values (slow, fast); ``zmid`` puts the middle of a two-sided scale."""
    trace = {"type": "heatmap", "z": numbers(z, 3), "x": numbers(x), "y": numbers(y)}
    bar = {"thickness": 10, "len": 0.9, "outlinewidth": 0}
    return trace | {"colorscale": scale, "colorbar": bar} | options
