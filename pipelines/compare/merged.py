"""Merged intensities and Bijvoet differences beside another program's and the truth."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.merge.io.mtz import MergedMtz, MergedTable, read_merged_mtz
from braggflux.pipelines.compare.rows import (
    BOTH,
    MIN_PAIRS,
    OURS,
    TOO_FEW,
    Row,
    cc_row,
    correlation,
    make_row,
    missing_row,
)
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory

#: Relative difference of cell parameters within which indices mean the same reflections.
CELL_TOLERANCE = 0.02
#: Differences of the mates: each from its own observations, and as the prior has coupled them.
KINDS = ("Bijvoet", "DANO")
SHELL_EDGES = (np.inf, 5.0, 3.5, 3.0, 2.5, 2.2, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.0)  # d [A]


def compare_merged(
    run: RunDirectory, merged: Path | None, truth: Path | None, full: Path | None, absent: str
) -> list[Row]:
    """Rows of run's merged.mtz against DIALS' (``merged``), the truth and fuller data.

    ``absent`` says why there is no ``merged``.
    """
    title = "merged by resolution [A]"
    if not run.merged.is_file():
        return [missing_row(title, "cc I", BOTH, f"{run.merged.name} is not there yet")]
    ours = read_merged_mtz(run.merged)
    dials = None if merged is None else read_merged_mtz(merged)
    if dials is None:
        rows = [missing_row(title, "cc I", BOTH, f"no merged MTZ of DIALS: {absent}")]
    else:
        rows = _merged_against_dials(title, ours, dials)
    tables = {OURS: ours} | ({} if dials is None else {REFERENCE: dials})
    if truth is not None:
        rows += _merged_against_truth(tables, read_merged_mtz(truth))
    if full is not None:
        rows += _merged_against_full(tables, read_merged_mtz(full))
    return rows


def _merged_against_dials(title: str, ours: MergedMtz, dials: MergedMtz) -> list[Row]:
    if reason := _different_crystal(ours, dials):
        return [missing_row(title, "cc I", BOTH, reason)]
    a, b = _common([ours, dials])
    value, other = ours.table.i_mean[a], dials.table.i_mean[b]
    difference = (ours.table.f_plus - ours.table.f_minus)[a]
    other_difference = (dials.table.f_plus - dials.table.f_minus)[b]
    is_acentric = ~_is_centric(ours, ours.table.miller_index[a])
    rows = []
    for name, q in _shells(ours, ours.table.miller_index[a]):
        pairs = q & np.isfinite(value) & np.isfinite(other)
        rows.append(cc_row(title, name, "cc I", BOTH, value[pairs], other[pairs]))
        pairs = q & is_acentric & np.isfinite(difference) & np.isfinite(other_difference)
        x, y = difference[pairs], other_difference[pairs]
        rows.append(cc_row(title, name, "cc Bijvoet", BOTH, x, y))
    return rows


def _merged_against_full(tables: dict[str, MergedMtz], full: MergedMtz) -> list[Row]:
    """Correlate the intensities that all files have with those of more data."""
    title = "merged against the full data by resolution [A]"
    for name, table in tables.items():
        if reason := _different_crystal(table, full):
            return [missing_row(title, "cc I", name, reason)]
    files = [full, *tables.values()]
    common = _common(files)
    values = np.stack([f.table.i_mean[rows] for f, rows in zip(files, common, strict=True)])
    usable = np.isfinite(values).all(axis=0)
    return [
        cc_row(title, name, "cc I", subject, value[q & usable], values[0][q & usable])
        for name, q in _shells(full, full.table.miller_index[common[0]])
        for subject, value in zip(tables, values[1:], strict=True)
    ]


def _merged_against_truth(tables: dict[str, MergedMtz], truth: MergedMtz) -> list[Row]:
    """Score each file on the Bijvoet pairs that all have, one scale factor per shell."""
    title = "merged against the truth by resolution [A]"
    for name, table in tables.items():
        if reason := _different_crystal(table, truth):
            return [missing_row(title, "cc F", name, reason)]
    files = [truth, *tables.values()]
    common = _common(files)
    mates = [
        np.stack([file.table.f_plus, file.table.f_minus], axis=1)[rows]
        for file, rows in zip(files, common, strict=True)
    ]
    hkl = truth.table.miller_index[common[0]]
    usable = np.all(np.isfinite(mates), axis=(0, 2)) & ~_is_centric(truth, hkl)
    rows = []
    for name, q in _shells(truth, hkl):
        q = q & usable
        n = int(q.sum())
        for subject, values, at in zip(tables, mates[1:], common[1:], strict=True):
            if n < MIN_PAIRS:
                rows.append(missing_row(title, "cc F", subject, TOO_FEW, name, n))
                continue
            f, true = values[q], mates[0][q]
            mean, true_mean = f.mean(1), true.mean(1)
            scale = (mean @ true_mean) / (mean @ mean)
            metrics = {
                "cc F": correlation(mean, true_mean),
                "R F": float(np.abs(scale * mean - true_mean).sum() / true_mean.sum()),
            }
            true_delta = true[:, 0] - true[:, 1]
            for kind, delta in _differences(tables[subject].table).items():
                error = scale * delta[at][q] - true_delta
                metrics[f"cc {kind}"] = correlation(delta[at][q], true_delta)
                metrics[f"rms error {kind}"] = float(np.sqrt(np.mean(error**2)))
            rows += [make_row(title, name, k, subject, v, n) for k, v in metrics.items()]
    # Ours and the reference side by side, metric by metric.
    order = ["cc F", "R F", *(f"{m} {k}" for k in KINDS for m in ("cc", "rms error"))]
    return sorted(rows, key=lambda r: order.index(r["metric"]))


def _differences(table: MergedTable) -> dict[str, NDArray[np.float64]]:
    """Differences of the mates by kind, (R,) each; pairs that no prior ties have their own."""
    own = table.f_plus - table.f_minus
    if not table.has_coupled_differences:
        return {KINDS[0]: own}
    coupled = np.where(np.isfinite(table.difference), table.difference, own)
    return dict(zip(KINDS, (own, coupled), strict=True))


def _common(files: list[MergedMtz]) -> list[NDArray[np.int64]]:
    """Rows of each file for the Miller indices that all have, in one order."""
    rows = [{tuple(h): i for i, h in enumerate(f.table.miller_index.tolist())} for f in files]
    shared = sorted(set.intersection(*(set(r) for r in rows)))
    return [np.array([r[h] for h in shared], dtype=np.int64) for r in rows]


def _shells(file: MergedMtz, hkl: NDArray[Any]) -> Iterable[tuple[str, NDArray[np.bool_]]]:
    d = file.cell.calculate_d_array(hkl)
    for high, low in pairwise(SHELL_EDGES):
        q = (d <= high) & (d > low)
        if q.any():
            yield (f"> {low:g}" if np.isinf(high) else f"{high:g}-{low:g}"), q
    yield "all", np.ones(len(d), bool)


def _is_centric(file: MergedMtz, hkl: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(file.space_group.operations().centric_flag_array(hkl), bool)


def _different_crystal(a: MergedMtz, b: MergedMtz) -> str:
    """Reason why indices of two files do not mean the same reflections, or empty.

    Screw axes make no difference: only the point group and its asymmetric unit do.
    """
    kinds = [
        (f.space_group.point_group_hm(), gemmi.ReciprocalAsu(f.space_group).condition_str())
        for f in (a, b)
    ]
    if kinds[0] != kinds[1]:
        return f"space groups differ: {a.space_group.xhm()} and {b.space_group.xhm()}"
    if not np.allclose(a.cell.parameters, b.cell.parameters, rtol=CELL_TOLERANCE):
        return f"cells differ: {a.cell.parameters} and {b.cell.parameters}"
    return ""
