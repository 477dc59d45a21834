"""The figures of the report. A new one is a function that draws it and a line in :data:`FIGURES`.

A figure is drawn from the files of a run directory alone, so that `braggflux report` can draw it
again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from braggflux.pipelines.report.figures import maps, peaks, shells
from braggflux.pipelines.report.figures.panels import Panel
from braggflux.pipelines.report.sources import DataSource, NoDataError

#: Sections of the page in their order, with their headings.
SECTIONS = {
    "peaks": "Anomalous signal",
    "map": "Maps",
    "statistics": "Quality against resolution",
    "intensities": "What the intensities show",
    "images": "Scales against image",
    "detector": "Detector and profiles",
    "calibration": "Are the sigmas right?",
    "objective": "Course of the fit",
    "more": "More",
}


class ReportFigure(NamedTuple):
    """A figure and its place.

    Parameters
    ----------
    section : str
        One of :data:`SECTIONS`.
    title, caption : str
        The caption says what is drawn and what good looks like.
    draw : callable
        Panels (:func:`braggflux.pipelines.report.figures.panels.panel`) of a data set;
        :class:`~braggflux.pipelines.report.sources.NoDataError` says why there are none.
    """

    section: str
    title: str
    caption: str
    draw: Callable[[DataSource], list[Panel]]


FIGURES: dict[str, ReportFigure] = {
    "peak-heights": ReportFigure(
        "peaks",
        "Peak heights, epoch by epoch",
        "Anomalous difference map at the strongest sites of the model; dashed: DIALS from the "
        "same frames. Good: above the dashed lines and level at the end. A height has a noise of "
        "about one sigma.",
        peaks.peak_heights,
    ),
    "anomalous-map": ReportFigure(
        "map",
        "Anomalous difference map around the strongest sites",
        "Sections through each site, parallel to the a b plane, in sigma of the map; circles: "
        "atoms of the model within 1 Å of the section. Good: one round peak on its atom, nothing "
        "else as high. A high peak where no atom is marked is a site that the model lacks.",
        maps.anomalous_sections,
    ),
    "density": ReportFigure(
        "map",
        "Electron density of the best ordered ring",
        "Map of |F| with the phases of the model, in its plane, in sigma. Good: a closed ring "
        "around the atoms. The phases are the model's, so that this judges the amplitudes alone.",
        maps.density_sections,
    ),
    "shells": ReportFigure(
        "statistics",
        "By resolution shell",
        "Both programs by the same scorer. Good: CC1/2 near 1 and falling smoothly, above 0.3 in "
        "the last shell; CCanom above 0.3 where a substructure is to be found.",
        shells.by_resolution,
    ),
    "objective": ReportFigure(
        "objective",
        "Parts of the evidence",
        "What the fit maximises, taken apart. Good: level at the end; if not, train longer.",
        peaks.objective,
    ),
    "quality-by-epoch": ReportFigure(
        "objective",
        "Merged data after every epoch",
        "Good: no longer improving; CCanom that falls while CC1/2 rises would be overfitting.",
        peaks.amplitude_quality,
    ),
}


def drawn(source: DataSource) -> list[dict[str, Any]]:
    """Draw all figures of a data set: records with section, name, title, caption, panels, reason.

    ``reason`` says why there are no panels; empty where there are.
    """
    page = []
    for name, figure in FIGURES.items():
        entry = {"name": name, **figure._asdict(), "panels": [], "reason": ""}
        del entry["draw"]
        try:
            entry["panels"] = figure.draw(source)
        except NoDataError as reason:
            entry["reason"] = str(reason)
        page.append(entry)
    return page
