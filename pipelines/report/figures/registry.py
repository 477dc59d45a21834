"""The figures of the report. A new one is a function that draws it and a line in :data:`FIGURES`.

A figure is drawn from the files of a run directory alone, so that `braggflux report` can draw it
again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from braggflux.pipelines.report.figures import (
    calibration,
    detector,
    images,
    intensities,
    maps,
    peaks,
    shells,
)
from braggflux.pipelines.report.figures.panels import Panel
from braggflux.pipelines.report.sources import DataSource, NoDataError, NotMeantError

logger = logging.getLogger(__name__)

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
    "wilson": ReportFigure(
        "intensities",
        "Wilson plot",
        "Log of the mean intensity over that of the atoms of an average protein. Good: a straight "
        "line beyond 4.5 Å (the wiggles at 6 and 4 Å are those of every protein). A single spike "
        "is an ice ring, a rise at the end an overestimated weak background; the slope is B.",
        intensities.wilson_plot,
    ),
    "l-test": ReportFigure(
        "intensities",
        "Twinning: L test",
        "Local statistics of acentric intensities (Padilla & Yeates 2003). Good: on the dotted "
        "line, mean |L| 0.50. Towards the dashed line the crystal is twinned: solve and refine "
        "with the twin law.",
        intensities.twinning,
    ),
    "patterson": ReportFigure(
        "intensities",
        "Translational pseudo-symmetry",
        "Patterson function of 15 to 5 Å through its highest peak more than 10 Å from the origin. "
        "Good: below 20 % of the origin. Above, molecules are related by a translation: tell the "
        "phasing program, and expect classes of weak reflections.",
        intensities.pseudo_translation,
    ),
    "anisotropy": ReportFigure(
        "intensities",
        "Anisotropy",
        "Mean I/σ in cones of 30° about the axes; the limit of each is where it falls below 2. "
        "Good: the same along all. Limits that differ by more than 0.3 Å deserve an "
        "anisotropic cut-off.",
        intensities.anisotropy,
    ),
    "images": ReportFigure(
        "images",
        "Scale, B, R and I/σ against image",
        "Median scale of the observations on each image, its falloff with resolution, and how "
        "single observations agree with their mean. Good: smooth but for the flicker of the beam, "
        "B slowly growing with dose, R level. A diamond is an image far from its neighbours: look "
        "at it, and leave it out if the crystal or beam was gone.",
        images.against_image,
    ),
    "absorption": ReportFigure(
        "images",
        "Absorption",
        "Transmission as scaling found it, over the directions of the diffracted beam in the "
        "frame of the crystal. Good: smooth, within a few per cent to 20 %. Directions that no "
        "reflection has taken are filled by the restraint.",
        detector.absorption_surface,
    ),
    "residuals": ReportFigure(
        "detector",
        "Residuals of intensities over the detector",
        "Each observation against the mean of its symmetry mates, in sigma. Good: no pattern, "
        "mean z² near 1. A stripe or a patch is a shadow, a bad module or an ice ring: mask it.",
        detector.residuals_on_detector,
    ),
    "positions": ReportFigure(
        "detector",
        "Positions of strong spots",
        "Observed less predicted. Good: below half a pixel and half a frame, without drift. "
        "A trend along the scan is a cell or orientation that changes: refine scan-varying.",
        detector.positions,
    ),
    "profiles": ReportFigure(
        "detector",
        "Profiles over the detector",
        "Mean of strong spots in nine regions, summed over frames, square root. Good: compact and "
        "alike; streaks are split crystals or mosaic blocks, tails towards an edge parallax.",
        detector.profiles,
    ),
    "z-half-sets": ReportFigure(
        "calibration",
        "Between half sets",
        "Differences of random halves in units of their sigmas. Good: the normal curve, and a "
        "straight line of slope 1. Steeper: sigmas too small; flatter: too large.",
        calibration.between_half_sets,
    ),
    "z-mates": ReportFigure(
        "calibration",
        "Among symmetry mates",
        "Single observations against the mean of the others. Good: as above; bent ends are "
        "outliers. Our sigmas are those of the error model, larger for outliers.",
        calibration.among_mates,
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
        except NotMeantError:
            continue
        except NoDataError as reason:
            entry["reason"] = str(reason)
        except (ValueError, ArithmeticError, LookupError) as error:
            # a page that lacks one figure is better than none after hours of computing
            logger.warning("report: %s cannot be drawn: %s", name, error, exc_info=True)
            entry["reason"] = f"these data cannot be drawn ({error})"
        page.append(entry)
    return page
