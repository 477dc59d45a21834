"""Figures of results, by matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from braggflux.integrator.errors import UserError
from braggflux.pipelines.api.optional import needed
from braggflux.pipelines.maps.anomalous_peaks import AnomalousModel
from braggflux.pipelines.maps.difference_map import DifferenceMap
from braggflux.pipelines.maps.sections import cube_around
from braggflux.pipelines.workspace.rundir import REFERENCE

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

POINTS, STEP = 41, 0.3
LEVELS = (3, 5, 8, 12, 16, 20)
MAX_SITES = 6


def _figure(width: float, height: float) -> Figure:
    with needed("figures"):
        from matplotlib.figure import Figure

    class ShownFigure(Figure):  # type: ignore[misc] # matplotlib has no types
        """A figure that a notebook shows without pyplot."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()

    return ShownFigure(figsize=(width, height), layout="constrained")


def map_sections(density: DifferenceMap, model: AnomalousModel, label: str | None) -> Figure:
    """Draw three sections through a site; the highest without a label.

    Raises
    ------
    UserError
        The model has no site, or none of this label.
    """
    heights = {peak.label: peak.peak_sigma for peak in model.peaks_in(density)}
    if not heights:
        raise UserError(model.why_no_sites)
    label = label or max(heights, key=lambda name: heights[name] or 0.0)
    if label not in heights:
        raise UserError(f"no site {label!r} in the model; there are {', '.join(heights)}")
    site = next(s for s in model.sites if s.label == label)
    cube = cube_around(density.grid, site.fractional[0], POINTS, STEP)
    figure = _figure(9.6, 3.4)
    reach = STEP * (POINTS // 2)
    line = np.linspace(-reach, reach, POINTS)
    limit = max(5.0, float(cube.max()))
    middle = POINTS // 2
    sections: dict[tuple[str, str], Any] = {
        ("x", "y"): cube[:, :, middle],
        ("x", "z"): cube[:, middle, :],
        ("y", "z"): cube[middle, :, :],
    }
    for axes, ((across, up), values) in zip(figure.subplots(1, 3), sections.items(), strict=True):
        extent = (-reach, reach, -reach, reach)
        shown = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "bicubic"}
        image = axes.imshow(values.T, origin="lower", extent=extent, **shown)
        levels = sorted([-x for x in LEVELS] + list(LEVELS))
        axes.contour(line, line, values.T, levels=levels, colors="#222222", linewidths=0.7)
        axes.set(xlabel=f"{across} [Å]", ylabel=f"{up} [Å]")
    figure.colorbar(image, ax=figure.axes, label="sigma of the map", shrink=0.85)
    figure.suptitle(f"Anomalous difference map at {label}: {heights[label]:.2f} sigma")
    return figure


def peaks_by_epoch(peaks: pandas.DataFrame) -> Figure:
    """Draw the strongest sites per epoch, the reference dashed."""
    names = peaks["chain"] + "/" + peaks["residue"] + peaks["seqid"].astype(str)
    names = names + ":" + peaks["atom"]
    # before rows are chosen: pandas fills up a table without rows
    named = peaks.assign(site=names)
    is_reference = named["epoch"] == REFERENCE
    epochs, reference = named[~is_reference], named[is_reference]
    figure = _figure(7.2, 3.8)
    axes = figure.subplots()
    last = epochs[epochs["epoch"] == epochs["epoch"].max()]
    for site in last.sort_values("peak_sigma", ascending=False)["site"][:MAX_SITES]:
        own = epochs[epochs["site"] == site]
        [line] = axes.plot(own["epoch"], own["peak_sigma"], "o-", markersize=4, label=site)
        for height in reference.loc[reference["site"] == site, "peak_sigma"]:
            axes.axhline(height, color=line.get_color(), linestyle="--", linewidth=1)
    title = "dashed: " + REFERENCE if len(reference) else None
    axes.set(xlabel="epoch", ylabel="peak height [sigma of the map]")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(title=title, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def statistics_by_shell(statistics: pandas.DataFrame) -> Figure:
    """Draw CC1/2, CCanom and I/sigma against resolution."""
    shells = statistics[statistics["shell"].astype(str) != "overall"]
    x = shells["d_min"].astype(float) ** -2
    figure = _figure(8.4, 3.2)
    left, right = figure.subplots(1, 2)
    lowest = 0.0
    for name, label in (("cc_half", "CC1/2"), ("cc_anom", "CCanom")):
        values = shells[name].astype(float)
        if values.notna().any():
            left.plot(x, values, "o-", markersize=4, label=label)
            lowest = min(lowest, float(values.min()) - 0.05)
    left.set(ylabel="half-set correlation", ylim=(lowest, 1.05))
    left.legend(frameon=False)
    right.plot(x, shells["i_over_sigma"].astype(float), "o-", markersize=4)
    right.set(ylabel="mean I / sigma", ylim=(0, None))
    ticks = x.iloc[:: max(1, len(x) // 5)]
    for axes in (left, right):
        axes.set_xticks(ticks, [f"{t**-0.5:.2f}" for t in ticks])
        axes.set(xlabel="resolution [Å]", xlim=(0.95 * x.min(), 1.02 * x.max()))
    return figure
