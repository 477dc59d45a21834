"""The figures of the report. A new one is a function that draws it and a line in :data:`FIGURES`.

A figure is drawn from the files of a run directory alone, so that `braggflux report` can draw it
again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from braggflux.pipelines.report import plots
from braggflux.pipelines.workspace.rundir import RunDirectory, read_rows

#: Sections of the page, each shown above its table; `more` has only what is listed here.
SECTIONS = ("peaks", "objective", "statistics", "more")


class ReportFigure(NamedTuple):
    """A figure and its place.

    Parameters
    ----------
    section : str
        One of :data:`SECTIONS`.
    caption : str
    draw : callable
        Image of a run as a data URI (:func:`braggflux.pipelines.report.plots.svg`); None where
        the run has nothing to show yet.
    """

    section: str
    caption: str
    draw: Callable[[RunDirectory], str | None]


FIGURES: dict[str, ReportFigure] = {
    "peak heights": ReportFigure(
        "peaks",
        "Strongest sites; dashed: the reference, from the same frames.",
        lambda run: plots.peak_heights(run.read_peaks()),
    ),
    "objective": ReportFigure(
        "objective",
        "elbo: evidence lower bound; nll: negative log likelihood; kl: divergence of a posterior "
        "from its prior.",
        lambda run: plots.objective(run.read_metrics()),
    ),
    "shells": ReportFigure(
        "statistics",
        "Resolution is the high-resolution edge of each shell.",
        lambda run: plots.shell_statistics(read_rows(run.statistics_file)),
    ),
}


def drawn(run: RunDirectory) -> dict[str, list[dict[str, str]]]:
    """Image and caption of the figures of each section, as far as the run has them."""
    page: dict[str, list[dict[str, str]]] = {section: [] for section in SECTIONS}
    for figure in FIGURES.values():
        image = figure.draw(run)
        if image is not None:
            page[figure.section].append({"image": image, "caption": figure.caption})
    return page
