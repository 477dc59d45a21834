"""Peak heights of the anomalous map and the objective, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from braggflux.pipelines.report.figures.panels import Panel, level, line, panel
from braggflux.pipelines.report.sources import DataSource, NoDataError, NotMeantError
from braggflux.pipelines.workspace.rundir import REFERENCE

#: Sites drawn as lines; the table has all.
MAX_SITES = 6
#: Parts of the evidence by their key in metrics.jsonl, as a crystallographer would say it.
PARTS = {
    "merge_elbo": (
        "Evidence of the merge",
        "log-probability of the scaled observations, per observation; higher is better",
    ),
    "merge_nll": (
        "Misfit of observations to amplitudes",
        "-log p(J | K F²), per observation; what R_meas is to scaling",
    ),
    "pixel_nll": (
        "Misfit of pixels to profile and background",
        "-log p(counts), per observation, up to a constant; falls as profiles fit",
    ),
    "kl_structure_factor": (
        "Information gained on amplitudes",
        "distance of q(F) from Wilson statistics (or the prior chosen), per observation",
    ),
    "kl_profile": (
        "Departure of profiles from the usual one",
        "distance of each spot's profile from the learned mean, per observation",
    ),
    "kl_background": (
        "Departure of the background from smooth",
        "distance of each spot's background from its neighbours', per observation",
    ),
    "scale_penalty": (
        "Restraint of scales",
        "how far scale, B and absorption lie from their restraints, per observation",
    ),
}


def peak_heights(source: DataSource) -> list[Panel]:
    """Height of the strongest sites per epoch, the reference as a dashed line."""
    if source.is_merge:
        raise NotMeantError("a merge has no epochs to follow")
    peaks = source.files.read_peaks()
    epochs = sorted({p["epoch"] for p in peaks if p["epoch"] != REFERENCE})
    if not epochs:
        raise NoDataError(source.notes.get("peaks", "no epoch has ended yet"))
    sites: dict[str, dict[Any, Any]] = {}
    for p in peaks:
        name = f"{p['residue']} {p['chain']}{p['seqid']} {p['atom']}"
        sites.setdefault(name, {})[p["epoch"]] = p["peak_sigma"]
    strongest = sorted(sites, key=lambda s: -(sites[s].get(epochs[-1]) or 0.0))[:MAX_SITES]
    traces = []
    for k, name in enumerate(strongest):
        heights = [_number(sites[name].get(e)) for e in epochs]
        traces.append(line(epochs, heights, name, f"@{k}"))
        if (reference := sites[name].get(REFERENCE)) is not None:
            ends = [epochs[0], epochs[-1]]
            own = {"mode": "lines", "dash": "dash", "showlegend": False}
            own |= {"hovertemplate": f"{REFERENCE}, {name}: %{{y:.2f}}<extra></extra>"}
            traces.append(line(ends, [reference] * 2, name, f"@{k}", **own))
    axis = {"rangemode": "tozero"}
    across = {"dtick": 1} if len(epochs) <= 15 else {}
    drawing = panel(
        "Anomalous peak heights",
        traces,
        "epoch",
        "height [σ of the map]",
        x_axis=across,
        y_axis=axis,
        height=360,
        wide=True,
    )
    return [drawing]


def objective(source: DataSource) -> list[Panel]:
    """Evidence and its parts per epoch, one panel each."""
    if source.is_merge:
        raise NotMeantError("a merge keeps no record per epoch")
    metrics = source.metrics()
    wanted = [key for key in PARTS if any(_is_number(row.get(key)) for row in metrics)]
    if not wanted:
        raise NoDataError("metrics.jsonl has no parts of the objective yet")
    epochs = [row["epoch"] for row in metrics]
    return [_part(epochs, metrics, key) for key in wanted]


def _part(epochs: Sequence[int], metrics: Sequence[Mapping[str, Any]], key: str) -> Panel:
    title, words = PARTS[key]
    trace = line(epochs, [_number(row.get(key)) for row in metrics])
    return panel(title, [trace], "epoch", "nats") | {"note": f"{words} ({key})"}


def amplitude_quality(source: DataSource) -> list[Panel]:
    """Statistics of the merged data per epoch."""
    if source.is_merge:
        raise NotMeantError("a merge keeps no record per epoch")
    metrics = source.metrics()
    if not metrics:
        raise NoDataError("no epoch has ended yet")
    of = f"/{source.name}" if source.name else ""
    titles = {"cc_half": "CC1/2", "cc_anom": "CCanom", "r_pim": "R_pim", "z_spread": "spread of z"}
    epochs = [row["epoch"] for row in metrics]
    panels = []
    for key, title in titles.items():
        values = [_number(row.get(key + of)) for row in metrics]
        shapes = [level(1.0)] if key == "z_spread" else []
        panels.append(panel(title, [line(epochs, values)], "epoch", title, shapes=shapes))
    return panels


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _number(value: Any) -> float:
    return float("nan") if value in (None, "") else float(value)
