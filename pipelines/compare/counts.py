"""Errors of single observations against the true photons of simulated frames.

Beside each program's errors stands a bound: the standard deviation ``sqrt((J + beta) / t)`` that
our own likelihood expects at the *true* photons J. It comes from the fitted profile and background
and holds what was spent on estimating them, so it lies a little above the Cramer-Rao bound of a
known profile. Groups other than strength compare ``error / bound``, or a few strong spots would
decide them. Neighbours and place are judged on spots that no edge or gap cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.dials import DialsFlag, ReflectionTable
from braggflux.integrator.io.intensity_file import read_intensities
from braggflux.integrator.types import Flag, IntensityTable
from braggflux.pipelines.compare.rows import MIN_PAIRS, OURS, TOO_FEW, Row, make_row, missing_row
from braggflux.pipelines.workspace.matching import match_observations
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

BOUND = "bound"
SUMMED = f"{REFERENCE} summed"
STRENGTH = "observations against true photons"
UNCUT = "observations against true photons, not cut by an edge or gap"
KEPT = "observations kept"
#: Median absolute value of a standard normal variable.
MEDIAN_ABS_NORMAL = 0.6745
PHOTON_EDGES = (0.0, 5.0, 20.0, 100.0, 500.0, 2000.0, np.inf)
DISTANCE_EDGES = (0.0, 5.0, 7.0, 9.0, 12.0, np.inf)  # pixels
D_EDGES = (np.inf, 5.0, 3.5, 3.0, 2.5, 2.2, 0.0)  # A
#: A frame of distance between neighbours counts as so many pixels.
PIXELS_PER_FRAME = 2.0
FLAG_CLASSES = {
    "whole": 0,
    "overlapped": Flag.OVERLAPPED,
    "cut by an edge": Flag.PARTIAL_EDGE,
    "gap or bad pixel in the core": Flag.MASKED_CORE,
    "zinger, hot pixel or shadow": Flag.DEFECT,
}


@dataclass(frozen=True)
class Measured:
    """A program's value for each true observation, (N,); NaN where it has none."""

    intensity: Array
    sigma: Array

    @property
    def is_kept(self) -> Bools:
        """Whether there is a value."""
        return np.isfinite(self.intensity)


def compare_true_counts(
    run: RunDirectory, ours: ReflectionTable, dials: ReflectionTable | None, path: Path
) -> list[Row]:
    """Rows of errors by strength, neighbours, position and flags, and of what was kept.

    Parameters
    ----------
    run : RunDirectory
    ours : ReflectionTable
        Its integrated.refl, all rows, in the order of intensities.h5.
    dials : ReflectionTable, optional
        DIALS' integrated.refl.
    path : Path
        ``.npz`` with ``miller_index``, ``xyz_px`` (frames as in the tables: DIALS' array
        indices) and ``photons``.
    """
    if len(np.unique(ours["id"])) > 1:
        reason = "the true photons are of one sweep, the run has several"
        return [missing_row(STRENGTH, "rms error", OURS, reason)]
    with (
        reading(path, "copy it again"),
        np.load(path, allow_pickle=False) as file,
    ):
        if absent := {"miller_index", "xyz_px", "photons"} - set(file):
            raise UserError(f"{path} lacks the arrays {', '.join(sorted(absent))}")
        hkl, xyz, photons = (file[k] for k in ("miller_index", "xyz_px", "photons"))
    found = {OURS: _measured(hkl, xyz, ours, "prf")}
    if dials is not None:
        found[REFERENCE] = _measured(hkl, xyz, dials, "prf")
        if "intensity.sum.value" in dials:
            found[SUMMED] = _measured(hkl, xyz, dials, "sum")
    # all programs are judged on the observations that all have measured
    common = np.logical_and.reduce([m.is_kept for m in found.values()])
    true_rows, rows = match_observations(hkl, xyz, ours["miller_index"], ours["xyzcal.px"])
    bound, flags = np.full(len(photons), np.nan), np.full(len(photons), -1)
    table, reason = _photon_counts(run, len(ours))
    if table is not None:
        likelihood = table.likelihood[torch.as_tensor(rows)]
        bound[true_rows] = likelihood.variance(torch.as_tensor(photons[true_rows])).sqrt()
        flags[true_rows] = table.flags[rows]
    result = list(_by_strength(STRENGTH, found, photons, bound, common))
    if reason:
        result.append(missing_row(STRENGTH, "rms error", BOUND, reason))
    d = np.full(len(photons), np.nan)
    if "d" in ours:
        d[true_rows] = ours["d"][rows]
    uncut = common
    if (flags >= 0).any():
        # true counts may be those recorded: of a cut spot, less than the whole that is estimated
        uncut = common & (flags >= 0) & (flags & (Flag.PARTIAL_EDGE | Flag.MASKED_CORE) == 0)
        result += _by_strength(UNCUT, found, photons, bound, uncut)
    if np.isfinite(bound).any():
        distance = _bins(neighbour_distance(xyz), DISTANCE_EDGES)
        for title, bins, chosen in (
            ("error by distance to the next spot [pixels]", distance, uncut),
            ("error by place on the detector: resolution [A]", _bins(d, D_EDGES), uncut),
            ("error by flag", _classes(flags), common),
        ):
            result += _relative(title, bins, found, photons, bound, chosen)
    listed = np.zeros(len(photons), dtype=bool)
    listed[true_rows] = True
    return result + _kept(found, photons, flags, listed)


def neighbour_distance(xyz: Array) -> Array:
    """Distance to the nearest other spot [pixels], (N,), see :data:`PIXELS_PER_FRAME`."""
    points = np.asarray(xyz, float) * (1.0, 1.0, PIXELS_PER_FRAME)
    return cKDTree(points).query(points, k=2)[0][:, 1]


def _measured(hkl: NDArray[Any], xyz: Array, table: ReflectionTable, kind: str) -> Measured:
    bit = DialsFlag.INTEGRATED_PRF if kind == "prf" else DialsFlag.INTEGRATED_SUM
    value, variance = (table[f"intensity.{kind}.{k}"] for k in ("value", "variance"))
    chosen = np.flatnonzero(table.has_flag(bit) & (variance > 0))
    table = table.select(chosen)
    true_rows, rows = match_observations(hkl, xyz, table["miller_index"], table["xyzcal.px"])
    columns = np.full((2, len(hkl)), np.nan)
    columns[0, true_rows] = value[chosen][rows]
    columns[1, true_rows] = np.sqrt(variance[chosen][rows])
    return Measured(*columns)


def _photon_counts(run: RunDirectory, n: int) -> tuple[IntensityTable | None, str]:
    """Table of the run with the rows of its integrated.refl, or why there is none."""
    path = run.intensities
    if not path.is_file():
        return None, f"no {path.name}: `braggflux run` with --resume adds it to an earlier run"
    table = read_intensities(path)
    if len(table) != n:
        return None, f"{path.name} has {len(table)} rows, integrated.refl {n}: not of one run"
    return table, ""


def _bins(values: Array, edges: tuple[float, ...]) -> Iterator[tuple[str, Bools]]:
    for a, b in pairwise(edges):
        low, high = min(a, b), max(a, b)
        name = f"> {low:g}" if np.isinf(high) else f"{a:g}-{b:g}"
        yield name, (values >= low) & (values < high)


def _classes(flags: NDArray[np.int64]) -> Iterator[tuple[str, Bools]]:
    for name, bit in FLAG_CLASSES.items():
        yield name, (flags >= 0) & ((flags & bit > 0) if bit else (flags == 0))


def _by_strength(
    title: str, found: dict[str, Measured], photons: Array, bound: Array, common: Bools
) -> Iterator[Row]:
    for name, inside in _bins(photons, PHOTON_EDGES):
        label, keep = f"{name} photons", common & inside
        n = int(keep.sum())
        for subject, measured in found.items():
            if n < MIN_PAIRS:
                yield missing_row(title, "rms error", subject, TOO_FEW, label, n)
                continue
            error = measured.intensity[keep] - photons[keep]
            rms = float(np.sqrt(np.mean(error**2)))
            yield make_row(title, label, "rms error", subject, rms, n)
            yield make_row(title, label, "mean error", subject, float(error.mean()), n)
            z = spread(error / measured.sigma[keep])
            yield make_row(title, label, "spread of z", subject, z, n)
        if n >= MIN_PAIRS and np.isfinite(bound[keep]).all():
            rms = float(np.sqrt(np.mean(bound[keep] ** 2)))
            yield make_row(title, label, "rms error", BOUND, rms, n)


def _relative(
    title: str,
    bins: Iterable[tuple[str, Bools]],
    found: dict[str, Measured],
    photons: Array,
    bound: Array,
    common: Bools,
) -> Iterator[Row]:
    for name, inside in bins:
        keep = common & inside & np.isfinite(bound)
        n = int(keep.sum())
        for subject, measured in found.items() if n else ():
            if n < MIN_PAIRS:
                yield missing_row(title, "rms error / bound", subject, TOO_FEW, name, n)
                continue
            error = measured.intensity[keep] - photons[keep]
            rms = float(np.sqrt(np.mean((error / bound[keep]) ** 2)))
            yield make_row(title, name, "rms error / bound", subject, rms, n)
            bias = float(error.sum() / photons[keep].sum())
            yield make_row(title, name, "relative bias", subject, bias, n)
            z = spread(error / measured.sigma[keep])
            yield make_row(title, name, "spread of z", subject, z, n)


def _kept(
    found: dict[str, Measured], photons: Array, flags: NDArray[np.int64], listed: Bools
) -> list[Row]:
    """Rows with the number of observations of each program, and errors of those DIALS lacks."""
    n = int(listed.sum())
    rows = [
        make_row(KEPT, "all", "count", subject, int((m.is_kept & listed).sum()), n)
        for subject, m in found.items()
    ]
    if REFERENCE not in found:
        return rows
    alone = found[OURS].is_kept & ~found[REFERENCE].is_kept
    classes = [("ours alone", alone)]
    if (flags >= 0).any():  # without intensities.h5 nobody knows the flags
        classes += [(f"ours alone, {name}", alone & q) for name, q in _classes(flags)]
    for name, q in classes:
        count = int(q.sum())
        rows.append(make_row(KEPT, name, "count", OURS, count, count))
        if count >= MIN_PAIRS:
            error = found[OURS].intensity[q] - photons[q]
            z = spread(error / found[OURS].sigma[q])
            rows.append(make_row(KEPT, name, "spread of z", OURS, z, count))
    return rows


def spread(z: Array) -> float:
    """Robust standard deviation about zero."""
    return float(np.median(np.abs(z)) / MEDIAN_ABS_NORMAL)
