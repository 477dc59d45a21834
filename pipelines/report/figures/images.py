"""Scale, B, R and I/sigma against image, ours beside DIALS, with the images that stand out."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.pipelines.report.figures.panels import COLOURS, Panel, level, line, panel
from braggflux.pipelines.report.sources import OURS, DataSource, NoDataError, Observations
from braggflux.pipelines.report.table_one import assigned
from braggflux.pipelines.workspace.image_statistics import (
    ImageStatistics,
    read_image_statistics,
)
from braggflux.pipelines.workspace.outputs import IMAGES

Array = NDArray[np.float64]

#: Images on each side that say what is usual, and what is far from it: robust deviations.
N_NEIGHBOURS, N_DEVIATIONS = 5, 6.0
#: Least departure from the neighbours that counts, in the log of the scale.
LEAST_STEP = 0.2
MAX_POINTS = 1500
#: Attribute of the statistics, title and dotted level of each panel.
PANELS = (
    ("scale", "Scale K, relative to the median image", 1.0),
    ("b_factor", "B relative to the median image [Å²]", 0.0),
    ("r", "R of single observations", None),
    ("i_over_sigma", "Mean I/σ(I) of single observations", None),
)


def image_statistics(source: DataSource) -> dict[str, ImageStatistics]:
    """Statistics of the images by program."""
    if source.is_merge:
        own = read_image_statistics(source.files.path / IMAGES, source.name)
        if own is None:
            of = f" of {source.name}" if source.name else ""
            raise NoDataError(f"no {IMAGES}{of}: only a merge in memory writes it")
        return {OURS: own}
    found = source.by_program("observations")
    return {name: _of(observations, source) for name, observations in found.items()}


def _of(o: Observations, source: DataSource) -> ImageStatistics:
    expected = assigned(o, source).mean
    inv_d2 = source.merged.cell.calculate_1_d2_array(o.miller_index.astype(np.int32))
    return ImageStatistics.of(o.image, o.log_scale, inv_d2, o.intensity, o.sigma, expected)


def flagged(statistics: ImageStatistics) -> NDArray[np.int64]:
    """Positions of the images whose scale or R stands out among its neighbours."""
    with np.errstate(all="ignore"):
        odd = _stands_out(np.log(statistics.scale), LEAST_STEP)
        odd |= _stands_out(np.log(statistics.r), 2 * LEAST_STEP) & (statistics.n_obs > 10)
    return np.flatnonzero(odd)


def _stands_out(values: Array, least: float) -> NDArray[np.bool_]:
    n = 2 * N_NEIGHBOURS + 1
    if len(values) < n or not np.isfinite(values).any():
        return np.zeros(len(values), dtype=bool)
    padded = np.pad(values, N_NEIGHBOURS, mode="reflect")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a window without a number has no median
        usual = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, n), axis=1)
    step = np.abs(values - usual)
    spread = 1.4826 * np.nanmedian(step)
    return step > max(least, N_DEVIATIONS * spread)


def against_image(source: DataSource) -> list[Panel]:
    """Draw a panel for each statistic; a mark where an image stands out."""
    found = source.once(image_statistics)
    panels = []
    for name, title, at in PANELS:
        traces = []
        for program, statistics in found.items():
            x, y = thinned(statistics.image, getattr(statistics, name))
            if np.isfinite(y).any():
                style = {"mode": "lines"} if len(x) > 60 else {}
                traces.append(line(x, y, program, COLOURS[program], **style))
        own = found[OURS]
        odd = flagged(own)
        if name in {"scale", "r"} and len(odd):
            marks = line(own.image[odd], getattr(own, name)[odd], "flagged", "@3", mode="markers")
            marks["marker"] = {"color": "@3", "size": 9, "symbol": "diamond-open"}
            traces.append(marks)
        if traces:
            shapes = [] if at is None else [level(at)]
            panels.append(panel(title, traces, "image", "", shapes=shapes))
    if not panels:
        raise NoDataError("the observations name no images")
    return panels


def thinned(x: NDArray[Any], y: Array) -> tuple[Array, Array]:
    """Mean of groups of neighbouring points where there are too many to draw."""
    group = -(-len(x) // MAX_POINTS)
    if group <= 1:
        return np.asarray(x, float), np.asarray(y, float)
    n = len(x) // group * group
    return (
        np.asarray(x[:n], float).reshape(-1, group).mean(axis=1),
        np.asarray(y[:n], float).reshape(-1, group).mean(axis=1),
    )
