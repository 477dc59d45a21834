"""Whether errors are what the sigmas say: between half sets, and among symmetry mates."""

from __future__ import annotations

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.merge.io.formats.unmerged_mtz import load_mtz
from braggflux.pipelines.report.figures.panels import COLOURS, Panel, Trace, line, panel
from braggflux.pipelines.report.sources import DataSource, NoDataError
from braggflux.pipelines.report.table_one import assigned

Array = NDArray[np.float64]

EDGES = np.linspace(-5, 5, 51)
#: Quantiles of the normal-probability plot.
QUANTILES = np.linspace(-3.6, 3.6, 73)
MIN_VALUES = 100


def half_set_z(source: DataSource) -> dict[str, Array]:
    """Z of the difference of two half sets: of mean amplitudes, and of Bijvoet differences."""
    path = source.files.half_sets
    if not path.is_file():
        raise NoDataError(f"{path.name} is not there yet")
    mtz = load_mtz(path)
    labels = mtz.column_labels()

    def column(label: str) -> Array:
        if label not in labels:
            return np.full(mtz.nreflections, np.nan)
        return np.array(mtz.column_with_label(label), dtype=float)

    with np.errstate(all="ignore"):
        mean = (column("F1") - column("F2")) / np.hypot(column("SIGF1"), column("SIGF2"))
        first, second = (column(f"F{k}(+)") - column(f"F{k}(-)") for k in "12")
        variance = sum(column(f"SIGF{k}({s})") ** 2 for k in "12" for s in "+-")
        z = (first - second) / np.sqrt(variance)
        acentric = ~np.asarray(_centric(mtz))
    found = {"mean amplitude": mean, "Bijvoet difference": np.where(acentric, z, np.nan)}
    found = {name: x[np.isfinite(x)] for name, x in found.items()}
    found = {name: x for name, x in found.items() if len(x) >= MIN_VALUES}
    if not found:
        raise NoDataError(f"{path.name} has fewer than {MIN_VALUES} reflections in both halves")
    return found


def _centric(mtz: gemmi.Mtz) -> NDArray[np.bool_]:
    hkl = mtz.make_miller_array().astype(np.int32)
    return np.asarray(mtz.spacegroup.operations().centric_flag_array(hkl), dtype=bool)


def between_half_sets(source: DataSource) -> list[Panel]:
    """Histogram and normal-probability plot of z between half sets."""
    found = half_set_z(source)
    colours = dict(zip(found, ("@0", "@2"), strict=False))
    return _panels(found, colours, "half sets")


def among_mates(source: DataSource) -> list[Panel]:
    """Histogram and normal-probability plot of z of observations about their mates' mean."""
    found = {}
    for name, observations in source.by_program("observations").items():
        z = assigned(observations, source).z
        if np.isfinite(z).sum() >= MIN_VALUES:
            found[name] = z[np.isfinite(z)]
    if not found:
        raise NoDataError("too few reflections were observed more than once")
    return _panels(found, COLOURS, "observations")


def _panels(found: dict[str, Array], colours: dict[str, str], what: str) -> list[Panel]:
    middle = (EDGES[1:] + EDGES[:-1]) / 2
    normal = np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi)
    bell = line(middle, normal, "normal", "@soft", mode="lines", dash="dot")
    straight = line([-3.6, 3.6], [-3.6, 3.6], "", "@soft", mode="lines", dash="dot")
    histograms: list[Trace] = []
    curves: list[Trace] = []
    for name, z in found.items():
        share = np.histogram(z, EDGES)[0] / len(z) / np.diff(EDGES)
        label = f"{name}, spread {robust_spread(z):.2f}"
        step = {"mode": "lines"}
        histograms.append(line(middle, share, label, colours[name], **step))
        order = np.sort(z)
        expected = _normal_quantiles(len(z))
        inside = np.abs(QUANTILES) < expected[-1]
        q = np.interp(QUANTILES[inside], expected, order)
        curves.append(
            line(QUANTILES[inside], np.clip(q, -9, 9), name, colours[name], mode="lines")
        )
    return [
        panel(f"z of {what}", [*histograms, bell], "z", "density"),
        panel(f"Normal-probability plot, {what}", [*curves, straight], "expected z", "observed z"),
    ]


def _normal_quantiles(n: int) -> Array:
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return np.asarray(torch.special.ndtri(share).numpy())


def robust_spread(z: Array) -> float:
    """Estimate the standard deviation from the median of |z|."""
    return float(np.median(np.abs(z)) * 1.4826)
