"""Our result beside a conventional program's, and both beside the truth where it is known.

Per observation: profile intensities in photons (DIALS' ``intensity.prf``, before any
Lorentz-polarization factor) on matched observations. Per shell: merged intensities and Bijvoet
differences. Every number is a row ``comparison, bin, metric, subject, value, n, reason``; what
could not be computed has an empty value and the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from integrator.errors import UserError
from integrator.io.dials import DialsFlag, ReflectionTable, read_reflections
from merge.io.mtz import MergedMtz, read_merged_mtz
from pipelines.matching import match_observations
from pipelines.report.terminal import write_table
from pipelines.rundir import REFERENCE, RunDirectory, write_rows

Array = NDArray[np.float64]
Row = dict[str, Any]

PEAKS = "anomalous peak height [sigma]"
COLUMNS = ("comparison", "bin", "metric", "subject", "value", "n", "reason")
OURS = "ours"
BOTH = f"{OURS} vs {REFERENCE}"
#: Fewer pairs than this give no number.
MIN_PAIRS = 10
#: Relative difference of cell parameters within which indices mean the same reflections.
CELL_TOLERANCE = 0.02
#: Median absolute value of a standard normal variable.
MEDIAN_ABS_NORMAL = 0.6745
STRENGTH_EDGES = (-np.inf, 1.0, 3.0, 10.0, 30.0, 100.0, np.inf)  # DIALS' I / sigma
PHOTON_EDGES = (0.0, 5.0, 20.0, 100.0, 500.0, 2000.0, np.inf)  # true photons
SHELL_EDGES = (np.inf, 5.0, 3.5, 3.0, 2.5, 2.2, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.0)  # d [A]


def compare(
    run: RunDirectory,
    *,
    integrated: Path | None = None,
    merged: Path | None = None,
    truth: Path | None = None,
    true_counts: Path | None = None,
    full: Path | None = None,
) -> list[Row]:
    """Compare a run with what is given and write compare.csv.

    Parameters
    ----------
    run : RunDirectory
    integrated : Path, optional
        DIALS' integrated.refl of the same frames.
    merged : Path, optional
        Merged MTZ of the conventional program.
    truth : Path, optional
        MTZ with the true F(+), F(-).
    true_counts : Path, optional
        ``.npz`` with ``miller_index``, ``xyz_px`` and ``photons`` of each observation.
    full : Path, optional
        Merged MTZ of more data of the same crystal form.

    Returns
    -------
    list of dict
        The rows of compare.csv.

    Raises
    ------
    UserError
        A named file does not exist or is not what it should be.
    """
    for path in (integrated, merged, truth, true_counts, full):
        if path is not None and not path.is_file():
            raise UserError(f"{path} does not exist; give a file, or leave the option out")
    dials_missing = run.read_provenance()["notes"].get("reference", "not given")
    rows = _compare_observations(run, integrated, true_counts, dials_missing)
    rows += _compare_merged(run, merged, truth, full, dials_missing)
    rows += _compare_peaks(run, dials_missing)
    write_rows(run.compare_file, rows, COLUMNS)
    return rows


def show(rows: Iterable[Row]) -> None:
    """Print one table per comparison: bins down, metrics and subjects across."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(row["comparison"], []).append(row)
    for title, entries in tables.items():
        columns = list(dict.fromkeys((r["metric"], r["subject"]) for r in entries))
        bins = list(dict.fromkeys(r["bin"] for r in entries))
        values = {(r["bin"], r["metric"], r["subject"]): r for r in entries}
        counts = {b: max(r["n"] for r in entries if r["bin"] == b) for b in bins}
        names = [m if subject == BOTH else f"{m} {subject}" for m, subject in columns]
        header = ["", "n", *names]
        body = [
            [b, str(counts[b]), *(_text(values.get((b, *column))) for column in columns)]
            for b in bins
        ]
        reasons = list(dict.fromkeys(r["reason"] for r in entries if r["reason"]))
        write_table(title, header, body, notes=reasons)


def _compare_observations(
    run: RunDirectory, integrated: Path | None, true_counts: Path | None, dials_missing: str
) -> list[Row]:
    title = "observations by I/sigma of DIALS"
    if not run.integrated_refl.is_file():
        return [_missing(title, "cc", BOTH, f"{run.integrated_refl.name} is not there yet")]
    ours = _profile_fitted(read_reflections(run.integrated_refl))
    if integrated is None:
        rows = [_missing(title, "cc", BOTH, f"no integrated.refl of DIALS: {dials_missing}")]
        dials = None
    else:
        dials = read_reflections(integrated)
        if "intensity.prf.value" in dials:
            dials = _profile_fitted(dials)
            rows = _against_dials(title, ours, dials)
        else:  # too few spots for its profiles
            rows = [_missing(title, "cc", BOTH, f"{integrated.name} has no profile intensities")]
            dials = None
    if true_counts is not None:
        rows += _against_true_counts(ours, dials, true_counts)
    return rows


def _against_dials(title: str, ours: ReflectionTable, dials: ReflectionTable) -> list[Row]:
    a, b = match_observations(
        ours["miller_index"],
        ours["xyzcal.px"],
        dials["miller_index"],
        dials["xyzcal.px"],
        sweeps=(ours["id"], dials["id"]),
    )
    value, sigma = _intensity(ours.select(a))
    dials_value, dials_sigma = _intensity(dials.select(b))
    strength = dials_value / dials_sigma
    rows = []
    bins = [(_range_name(x, y), x, y) for x, y in pairwise(STRENGTH_EDGES)]
    for name, x, y in [*bins, ("all > 3", 3.0, np.inf)]:
        q = (strength > x) & (strength <= y)
        n = int(q.sum())
        if n < MIN_PAIRS:
            rows.append(_missing(title, "cc", BOTH, _too_few(n), name, n))
            continue
        metrics = {
            "cc": _correlation(value[q], dials_value[q]),
            "sigma ratio": float(np.median(sigma[q] / dials_sigma[q])),
        }
        if x >= 1:  # a ratio to what may be zero says nothing
            metrics["median ratio"] = float(np.median(value[q] / dials_value[q]))
        rows += [_row(title, name, metric, BOTH, v, n) for metric, v in metrics.items()]
    for subject, table, matched in ((OURS, ours, a), (REFERENCE, dials, b)):
        n_alone = len(table) - len(matched)
        rows.append(
            _row("observations in one table only", "all", "count", subject, n_alone, n_alone)
        )
    return rows


def _against_true_counts(
    ours: ReflectionTable, dials: ReflectionTable | None, path: Path
) -> list[Row]:
    title = "observations against true photons"
    if len(np.unique(ours["id"])) > 1:
        reason = "the true photons are of one sweep, the run has several"
        return [_missing(title, "rms error", OURS, reason)]
    with np.load(path, allow_pickle=False) as file:
        if absent := {"miller_index", "xyz_px", "photons"} - set(file):
            raise UserError(f"{path} lacks the arrays {', '.join(sorted(absent))}")
        true_hkl, true_xyz, photons = (file[k] for k in ("miller_index", "xyz_px", "photons"))
    tables = {OURS: ours} | ({} if dials is None else {REFERENCE: dials})
    found = {
        name: match_observations(true_hkl, true_xyz, t["miller_index"], t["xyzcal.px"])
        for name, t in tables.items()
    }
    # Both programs are judged on the observations that both have measured.
    common = np.array(sorted(set.intersection(*(set(r.tolist()) for r, _ in found.values()))))
    rows = []
    for x, y in pairwise(PHOTON_EDGES):
        for name, table in tables.items():
            true_rows, table_rows = found[name]
            keep = np.isin(true_rows, common)
            keep &= (photons[true_rows] >= x) & (photons[true_rows] < y)
            n, label = int(keep.sum()), f"{_range_name(x, y)} photons"
            if n < MIN_PAIRS:
                rows.append(_missing(title, "rms error", name, _too_few(n), label, n))
                continue
            value, sigma = _intensity(table.select(table_rows[keep]))
            error = value - photons[true_rows[keep]]
            spread = float(np.median(np.abs(error / sigma)) / MEDIAN_ABS_NORMAL)
            rms = float(np.sqrt(np.mean(error**2)))
            rows.append(_row(title, label, "rms error", name, rms, n))
            rows.append(_row(title, label, "mean error", name, float(error.mean()), n))
            rows.append(_row(title, label, "spread of z", name, spread, n))
    return rows


def _compare_merged(
    run: RunDirectory, merged: Path | None, truth: Path | None, full: Path | None, absent: str
) -> list[Row]:
    title = "merged by resolution [A]"
    if not run.merged.is_file():
        return [_missing(title, "cc I", BOTH, f"{run.merged.name} is not there yet")]
    ours = read_merged_mtz(run.merged)
    dials = None if merged is None else read_merged_mtz(merged)
    if dials is None:
        rows = [_missing(title, "cc I", BOTH, f"no merged MTZ of DIALS: {absent}")]
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
        return [_missing(title, "cc I", BOTH, reason)]
    a, b = _common([ours, dials])
    value, other = ours.table.i_mean[a], dials.table.i_mean[b]
    difference = (ours.table.f_plus - ours.table.f_minus)[a]
    other_difference = (dials.table.f_plus - dials.table.f_minus)[b]
    is_acentric = ~_is_centric(ours, ours.table.miller_index[a])
    rows = []
    for name, q in _shells(ours, ours.table.miller_index[a]):
        pairs = q & np.isfinite(value) & np.isfinite(other)
        rows.append(_cc_row(title, name, "cc I", BOTH, value[pairs], other[pairs]))
        pairs = q & is_acentric & np.isfinite(difference) & np.isfinite(other_difference)
        x, y = difference[pairs], other_difference[pairs]
        rows.append(_cc_row(title, name, "cc Bijvoet", BOTH, x, y))
    return rows


def _merged_against_full(tables: dict[str, MergedMtz], full: MergedMtz) -> list[Row]:
    """Correlate the intensities that all files have with those of more data."""
    title = "merged against the full data by resolution [A]"
    for name, table in tables.items():
        if reason := _different_crystal(table, full):
            return [_missing(title, "cc I", name, reason)]
    files = [full, *tables.values()]
    common = _common(files)
    values = np.stack([f.table.i_mean[rows] for f, rows in zip(files, common, strict=True)])
    usable = np.isfinite(values).all(axis=0)
    return [
        _cc_row(title, name, "cc I", subject, value[q & usable], values[0][q & usable])
        for name, q in _shells(full, full.table.miller_index[common[0]])
        for subject, value in zip(tables, values[1:], strict=True)
    ]


def _merged_against_truth(tables: dict[str, MergedMtz], truth: MergedMtz) -> list[Row]:
    """Score each file on the Bijvoet pairs that all have, one scale factor per shell."""
    title = "merged against the truth by resolution [A]"
    for name, table in tables.items():
        if reason := _different_crystal(table, truth):
            return [_missing(title, "cc F", name, reason)]
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
        for subject, values in zip(tables, mates[1:], strict=True):
            if n < MIN_PAIRS:
                rows.append(_missing(title, "cc F", subject, _too_few(n), name, n))
                continue
            f, true = values[q], mates[0][q]
            mean, true_mean = f.mean(1), true.mean(1)
            scale = (mean @ true_mean) / (mean @ mean)
            delta, true_delta = scale * (f[:, 0] - f[:, 1]), true[:, 0] - true[:, 1]
            metrics = {
                "cc F": _correlation(mean, true_mean),
                "R F": float(np.abs(scale * mean - true_mean).sum() / true_mean.sum()),
                "cc Bijvoet": _correlation(delta, true_delta),
                "rms error Bijvoet": float(np.sqrt(np.mean((delta - true_delta) ** 2))),
            }
            rows += [_row(title, name, k, subject, v, n) for k, v in metrics.items()]
    # Ours and the reference side by side, metric by metric.
    order = ["cc F", "R F", "cc Bijvoet", "rms error Bijvoet"]
    return sorted(rows, key=lambda r: order.index(r["metric"]))


def _compare_peaks(run: RunDirectory, dials_missing: str) -> list[Row]:
    title = PEAKS
    peaks = run.read_peaks()
    epochs = [p["epoch"] for p in peaks if p["epoch"] != REFERENCE]
    if not epochs:
        return [_missing(title, "height", OURS, "no epoch has peaks yet")]
    rows = []
    for subject, epoch in ((OURS, max(epochs)), (REFERENCE, REFERENCE)):
        found = [p for p in peaks if p["epoch"] == epoch]
        for p in found:
            site = f"{p['residue']} {p['chain']}{p['seqid']} {p['atom']}"
            rows.append(_row(title, site, "height", subject, p["peak_sigma"], 1))
        if not found:
            rows.append(_missing(title, "height", subject, dials_missing))
    return rows


def _profile_fitted(table: ReflectionTable) -> ReflectionTable:
    table.require(
        ("intensity.prf.value", "intensity.prf.variance", "flags", "xyzcal.px", "miller_index"),
        "to compare observations; give an integrated table",
    )
    return table.select(
        table.has_flag(DialsFlag.INTEGRATED_PRF) & (table["intensity.prf.variance"] > 0)
    )


def _intensity(table: ReflectionTable) -> tuple[Array, Array]:
    """Photons and their standard deviation, (N,) each."""
    return table["intensity.prf.value"], np.sqrt(table["intensity.prf.variance"])


def _common(files: list[MergedMtz]) -> list[NDArray[np.int64]]:
    """Rows of each file for the Miller indices that all have, in one order."""
    rows = [{tuple(h): i for i, h in enumerate(f.table.miller_index.tolist())} for f in files]
    shared = sorted(set.intersection(*(set(r) for r in rows)))
    return [np.array([r[h] for h in shared], dtype=np.int64) for r in rows]


def _shells(file: MergedMtz, hkl: NDArray) -> Iterable[tuple[str, NDArray[np.bool_]]]:
    d = file.cell.calculate_d_array(hkl)
    for high, low in pairwise(SHELL_EDGES):
        q = (d <= high) & (d > low)
        if q.any():
            yield (f"> {low:g}" if np.isinf(high) else f"{high:g}-{low:g}"), q
    yield "all", np.ones(len(d), bool)


def _is_centric(file: MergedMtz, hkl: NDArray) -> NDArray[np.bool_]:
    return np.asarray(file.space_group.operations().centric_flag_array(hkl), bool)


def _different_crystal(a: MergedMtz, b: MergedMtz) -> str:
    """Say why indices of two files do not mean the same reflections, or nothing.

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


def _correlation(x: Array, y: Array) -> float | None:
    if x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _cc_row(title: str, name: str, metric: str, subject: str, x: Array, y: Array) -> Row:
    if len(x) < MIN_PAIRS:
        return _missing(title, metric, subject, _too_few(len(x)), name, len(x))
    return _row(title, name, metric, subject, _correlation(x, y), len(x))


def _row(title: str, name: str, metric: str, subject: str, value: float | None, n: int) -> Row:
    reason = "not defined here" if value is None else ""
    return dict(zip(COLUMNS, (title, name, metric, subject, value, n, reason), strict=True))


def _missing(
    title: str, metric: str, subject: str, reason: str, name: str = "all", n: int = 0
) -> Row:
    return dict(zip(COLUMNS, (title, name, metric, subject, None, n, reason), strict=True))


def _too_few(n: int) -> str:
    return f"fewer than {MIN_PAIRS} pairs"


def _range_name(low: float, high: float) -> str:
    if np.isinf(low):
        return f"<= {high:g}"
    return f"> {low:g}" if np.isinf(high) else f"{low:g}-{high:g}"


def _text(row: Row | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    return f"{row['value']:.4g}"
