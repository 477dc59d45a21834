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

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    read_experiments,
    read_reflections,
    to_array_index,
)
from braggflux.integrator.io.dials.sweeps import sweeps_of
from braggflux.merge.io.formats.dials import MIN_PARTIALITY
from braggflux.pipelines.compare.counts import compare_true_counts
from braggflux.pipelines.compare.merged import compare_merged
from braggflux.pipelines.compare.rows import (
    BOTH,
    COLUMNS,
    MIN_PAIRS,
    OURS,
    TOO_FEW,
    Row,
    correlation,
    make_row,
    missing_row,
)
from braggflux.pipelines.report.terminal import write_note, write_table
from braggflux.pipelines.workspace.file_sums import tell_changed
from braggflux.pipelines.workspace.matching import match_observations
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory, write_rows

Array = NDArray[np.float64]

PEAKS = "anomalous peak height [sigma]"
STRENGTH_EDGES = (-np.inf, 1.0, 3.0, 10.0, 30.0, 100.0, np.inf)  # DIALS' I / sigma


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
    if len(run.data_sets()) > 1:
        raise UserError(
            f"{run.path} holds {len(run.data_sets())} data sets, and one is compared at a time: "
            "run each on its own to compare it, or compare their merged MTZ files"
        )
    for path in (integrated, merged, truth, true_counts, full):
        if path is not None and not path.is_file():
            raise UserError(f"{path} does not exist; give a file, or leave the option out")
    tell_changed((integrated, merged, truth, true_counts, full))
    dials_missing = run.read_provenance()["notes"].get("reference", "not given")
    rows = _compare_observations(run, integrated, true_counts, dials_missing)
    rows += compare_merged(run, merged, truth, full, dials_missing)
    rows += _compare_peaks(run, dials_missing)
    write_rows(run.compare_file, rows, COLUMNS)
    return rows


def known_reference(run: RunDirectory) -> tuple[Path | None, Path | None]:
    """DIALS' integrated.refl and merged MTZ that a run has itself been compared with.

    Returns
    -------
    integrated, merged : Path or None
        Those of the folder ``dials``; the merged one is the run's ``--reference`` before that.
    """
    integrated = run.dials / "integrated.refl"
    merged = run.read_config().reference or run.dials / "merged.mtz"
    return integrated if integrated.is_file() else None, merged if merged.is_file() else None


def show(rows: Iterable[Row]) -> None:
    """Print one table per comparison: bins down, metrics and subjects across.

    Of a comparison without a number, the reason.
    """
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(row["comparison"], []).append(row)
    for title, entries in tables.items():
        reasons = list(dict.fromkeys(r["reason"] for r in entries if r["reason"]))
        if all(r["value"] is None for r in entries):
            write_note(f"{title}: not compared, {'; '.join(reasons)}")
            continue
        columns = list(dict.fromkeys((r["metric"], r["subject"]) for r in entries))
        bins = list(dict.fromkeys(r["bin"] for r in entries))
        values = {(r["bin"], r["metric"], r["subject"]): r for r in entries}
        counts = {b: max(r["n"] for r in entries if r["bin"] == b) for b in bins}
        names = [m if subject == BOTH else f"{m} {subject}" for m, subject in columns]
        header = ["", "n", *names]
        body = [
            [b, str(counts[b]), *(_text(values.get((b, *column))) for column in columns)]
            for b in bins
            if counts[b]  # what has nothing at all is a reason below
        ]
        write_table(title, header, body, notes=reasons, n_fixed=2)


def _compare_observations(
    run: RunDirectory, integrated: Path | None, true_counts: Path | None, dials_missing: str
) -> list[Row]:
    title = "observations by I/sigma of DIALS"
    if not run.integrated_refl.is_file():
        return [missing_row(title, "cc", BOTH, f"{run.integrated_refl.name} is not there yet")]
    all_ours = _our_table(run)
    ours = _profile_fitted(all_ours)
    all_dials = None
    if integrated is None:
        rows = [missing_row(title, "cc", BOTH, f"no integrated.refl of DIALS: {dials_missing}")]
    else:
        dials = read_reflections(integrated)
        if "intensity.prf.value" in dials:
            all_dials = dials
            rows = _against_dials(title, ours, _profile_fitted(dials))
        else:  # too few spots for its profiles
            rows = [
                missing_row(title, "cc", BOTH, f"{integrated.name} has no profile intensities")
            ]
    if true_counts is not None:
        rows += compare_true_counts(run, all_ours, all_dials, true_counts)
    return rows


def _our_table(run: RunDirectory) -> ReflectionTable:
    """Our integrated.refl with DIALS' array indices as frames.

    Versions that did not write integrated.expt beside it counted from each scan's own start.
    """
    table = read_reflections(run.integrated_refl)
    expt = run.read_config().expt
    if run.integrated_expt.is_file() or expt is None or not expt.is_file():
        return table
    return to_array_index(table, sweeps_of(read_experiments(expt)))


def _sweeps(
    ours: ReflectionTable, dials: ReflectionTable
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sweep of each row of both tables: by experiment identifier, where they share any."""
    number = {name: i for i, name in ours.identifiers.items() if name}
    if not number.keys() & set(dials.identifiers.values()):
        return ours["id"], dials["id"]
    found = dials["id"].astype(np.int64)
    for i in np.unique(dials["id"]).tolist():
        # below any of ours where the run did not have it
        found[dials["id"] == i] = number.get(dials.identifiers.get(i, ""), -2 - abs(i))
    return ours["id"], found


def _against_dials(title: str, ours: ReflectionTable, dials: ReflectionTable) -> list[Row]:
    a, b = match_observations(
        ours["miller_index"],
        ours["xyzcal.px"],
        dials["miller_index"],
        dials["xyzcal.px"],
        sweeps=_sweeps(ours, dials),
    )
    value, sigma = _intensity(ours.select(a))
    dials_value, dials_sigma = _intensity(dials.select(b))
    strength = dials_value / dials_sigma
    # what dials.scale does not use either: of a reflection that was recorded for a thousandth,
    # profile fitting may give anything, and one such value decides a correlation
    partiality = dials.columns.get("partiality", np.ones(len(dials)))[b]
    is_recorded = partiality >= MIN_PARTIALITY
    rows = []
    bins = [(_range_name(x, y), x, y) for x, y in pairwise(STRENGTH_EDGES)]
    for name, x, y in [*bins, ("all > 3", 3.0, np.inf)]:
        q = is_recorded & (strength > x) & (strength <= y)
        n = int(q.sum())
        if n < MIN_PAIRS:
            rows.append(missing_row(title, "cc", BOTH, TOO_FEW, name, n))
            continue
        metrics = {
            "cc": correlation(value[q], dials_value[q]),
            "sigma ratio": float(np.median(sigma[q] / dials_sigma[q])),
        }
        if x >= 1:  # a ratio to what may be zero says nothing
            metrics["median ratio"] = float(np.median(value[q] / dials_value[q]))
        rows += [make_row(title, name, metric, BOTH, v, n) for metric, v in metrics.items()]
    for subject, table, matched in ((OURS, ours, a), (REFERENCE, dials, b)):
        n_alone = len(table) - len(matched)
        rows.append(
            make_row("observations in one table only", "all", "count", subject, n_alone, n_alone)
        )
    return rows


def _compare_peaks(run: RunDirectory, dials_missing: str) -> list[Row]:
    title = PEAKS
    peaks = run.read_peaks()
    epochs = [p["epoch"] for p in peaks if p["epoch"] != REFERENCE]
    if not epochs:
        return [missing_row(title, "height", OURS, "no epoch has peaks yet")]
    rows = []
    for subject, epoch in ((OURS, max(epochs)), (REFERENCE, REFERENCE)):
        found = [p for p in peaks if p["epoch"] == epoch]
        for p in found:
            site = f"{p['residue']} {p['chain']}{p['seqid']} {p['atom']}"
            rows.append(make_row(title, site, "height", subject, p["peak_sigma"], 1))
            if p["difference"] == "coupled":
                own = p["peak_sigma_own"]
                rows.append(make_row(title, site, "height of F(+) - F(-)", subject, own, 1))
        if not found:
            rows.append(missing_row(title, "height", subject, dials_missing))
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


def _range_name(low: float, high: float) -> str:
    if np.isinf(low):
        return f"<= {high:g}"
    return f"> {low:g}" if np.isinf(high) else f"{low:g}-{high:g}"


def _text(row: Row | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    value = row["value"]
    return str(value) if isinstance(value, int) else f"{value:.4g}"
