"""Figures of the report, each from plain rows, as data URIs that an HTML page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from braggflux.pipelines.workspace.rundir import REFERENCE

#: Okabe & Ito's colours, told apart by colour-blind readers too.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: Sites drawn as lines; the table has all.
MAX_SITES = 6
MAX_SHOEBOXES = 8
#: Of all figures, for :func:`matplotlib.rc_context`.
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "braggflux",
    "figure.constrained_layout.use": True,
}
Rows = Sequence[Mapping[str, Any]]


def peak_heights(peaks: Rows) -> str | None:
    """Height of the strongest sites per epoch, the reference as a dashed line."""
    epochs = sorted({p["epoch"] for p in peaks if p["epoch"] != REFERENCE})
    if not epochs:
        return None
    sites: dict[str, dict[str, Any]] = {}
    for p in peaks:
        name = f"{p['residue']} {p['chain']}{p['seqid']} {p['atom']}"
        sites.setdefault(name, {})[p["epoch"]] = p["peak_sigma"]
    last = epochs[-1]
    strongest = sorted(sites, key=lambda s: -(sites[s].get(last) or 0.0))[:MAX_SITES]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.2))
        axes = figure.subplots()
        for name, colour in zip(strongest, PALETTE, strict=False):
            heights = [_number(sites[name].get(e)) for e in epochs]
            axes.plot(epochs, heights, "o-", color=colour, markersize=4, label=name)
            if (reference := sites[name].get(REFERENCE)) is not None:
                axes.axhline(reference, color=colour, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.plot([], [], color="#555555", linestyle=(0, (4, 3)), label=REFERENCE, linewidth=1.1)
        axes.set(xlabel="epoch", ylabel="peak height [sigma of the map]")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return svg(figure)


def objective(metrics: Rows) -> str | None:
    """ELBO and its parts per epoch, one small panel each."""
    epochs = [row["epoch"] for row in metrics]
    wanted = [
        key
        for key in dict.fromkeys(k for row in metrics for k in row)
        if key.endswith(("elbo", "nll")) or key.startswith("kl_") or key == "scale_penalty"
    ]
    wanted = [k for k in wanted if any(_is_number(row.get(k)) for row in metrics)]
    if not epochs or not wanted:
        return None
    n_columns = min(3, len(wanted))
    n_rows = -(-len(wanted) // n_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.4 * n_rows))
        panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
        for panel, key in zip(panels, wanted, strict=False):
            values = [_number(row.get(key)) for row in metrics]
            panel.plot(epochs, values, "o-", color=PALETTE[0], markersize=3.5)
            panel.set_title(key, loc="left", fontsize=10)
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
        for panel in panels[len(wanted) :]:
            panel.set_axis_off()
        return svg(figure)


def shell_statistics(rows: Rows) -> str | None:
    """Half-set correlations, I/sigma, completeness and calibration by resolution."""
    shells = [row for row in rows if row["shell"] != "overall"]
    if not shells:
        return None
    x = np.array([_number(row["d_min"]) for row in shells]) ** -2.0
    panels = {
        "half-set correlation": (("cc_half", "CC1/2"), ("cc_anom", "CCanom")),
        "mean I / sigma(I)": (("i_over_sigma", "I/sigma"),),
        "completeness": (
            ("completeness", "all"),
            ("anomalous_completeness", "Bijvoet pairs"),
        ),
        "spread of half-set z (1 = calibrated)": (
            ("z_spread", "mean"),
            ("z_spread_anom", "anomalous"),
        ),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 5.4))
        for axes, (title, lines) in zip(
            figure.subplots(2, 2).ravel(), panels.items(), strict=True
        ):
            for (key, label), colour in zip(lines, PALETTE, strict=False):
                y = [_number(row.get(key)) for row in shells]
                axes.plot(x, y, "o-", color=colour, markersize=3.5, label=label)
            axes.set_title(title, loc="left", fontsize=10)
            if "z (" in title:
                axes.axhline(1.0, color="#999999", linewidth=1)
            else:
                axes.set_ylim(bottom=0)
            _label_with_d(axes, x)
            if len(lines) > 1:
                axes.legend()
        return svg(figure)


def comparison_by_bin(rows: Rows, title: str, metrics: Sequence[str]) -> str | None:
    """One panel per metric of compare.csv: bins across, a line for each subject."""
    chosen = [
        r
        for r in rows
        if r["comparison"] == title and r["value"] and not r["bin"].startswith("all")
    ]
    metrics = [m for m in metrics if any(r["metric"] == m for r in chosen)]
    if not metrics:
        return None
    subjects = list(dict.fromkeys(r["subject"] for r in chosen))
    bins = list(dict.fromkeys(r["bin"] for r in chosen))
    values = {(r["bin"], r["metric"], r["subject"]): float(r["value"]) for r in chosen}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.9))
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            for subject, colour in zip(subjects, PALETTE, strict=False):
                y = [values.get((b, metric, subject), np.nan) for b in bins]
                axes.plot(range(len(bins)), y, "o-", color=colour, markersize=4, label=subject)
            if metric.startswith("rms") and "/" not in metric:
                axes.set_yscale("log")
            else:  # 0.99 to 1.00 must not read "1e-2 + 0.99"
                axes.ticklabel_format(axis="y", useOffset=False)
            axes.set_title(metric, loc="left", fontsize=10)
            axes.set_xticks(range(len(bins)), bins, rotation=40, ha="right", fontsize=8)
        if len(subjects) > 1:
            panels[0].legend(fontsize=8)
        return svg(figure)


def shoebox(counts: NDArray[Any], rate: NDArray[Any] | None, is_valid: NDArray[Any]) -> str:
    """Draw counts, model rate and residual of one box, summed over frames.

    Parameters
    ----------
    counts, rate : (D, H, W)
        Photons and expected photons; without ``rate`` only the counts are drawn.
    is_valid : (D, H, W) bool
        A pixel is blank when no frame has it.
    """
    blank = ~is_valid.any(axis=0)
    observed = np.ma.array(np.where(is_valid, counts, 0).sum(axis=0), mask=blank)
    images: list[tuple[str, Any, str, float | None]] = [("counts", observed, "viridis", None)]
    if rate is not None:
        expected = np.ma.array(np.where(is_valid, rate, 0.0).sum(axis=0), mask=blank)
        residual = (observed - expected) / np.sqrt(np.maximum(expected, 1e-3))
        images += [
            ("model", expected, "viridis", None),
            ("residual / sigma", residual, "RdBu_r", 4),
        ]
    top = max(float(observed.max()) if observed.count() else 0.0, 1.0)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(1.55 * len(images), 1.75))
        for axes, (title, image, colours, limit) in zip(
            figure.subplots(1, len(images), squeeze=False)[0], images, strict=True
        ):
            # A square root keeps the background visible beside a strong spot.
            shown = image if limit else np.sqrt(np.maximum(image, 0))
            low, high = (-limit, limit) if limit else (0.0, np.sqrt(top))
            axes.imshow(shown, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            axes.set_title(title, fontsize=8)
            axes.set(xticks=[], yticks=[])
        return _png(figure)


def _label_with_d(axes: Axes, x: NDArray[Any]) -> None:
    """Label an axis of 1/d^2 with d [A]."""
    ticks = x[:: max(1, len(x) // 6)]
    axes.set_xticks(ticks, [f"{t**-0.5:.2f}" for t in ticks])
    axes.set_xlabel("resolution d [A]")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and np.isfinite(value)


def _number(value: Any) -> float:
    """Float of a JSON or CSV entry, NaN (a gap in the line) when it is missing."""
    return np.nan if value in (None, "") else float(value)


def svg(figure: Figure) -> str:
    """Return a figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
