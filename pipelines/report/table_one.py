"""Table 1, ours beside DIALS: one scorer for both, so that a difference is one of the data.

Both programs' scaled, unmerged observations are assigned to the same unique reflections (cell,
space group and resolution of ours) and go through
:func:`braggflux.merge.output.statistics.shell_statistics` with the same random halves. DIALS'
own tables differ in a few ways that docs/report.md lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from braggflux.merge.io.mtz import MergedMtz
from braggflux.merge.output.half_sets import ScaledReflections
from braggflux.merge.output.statistics import (
    Row,
    possible_reflections,
    resolution_shells,
    shell_statistics,
    unique_reflections,
)
from braggflux.pipelines.report.sources import (
    OURS,
    DataSource,
    NoDataError,
    Observations,
    finite_mean,
)
from braggflux.pipelines.workspace.rundir import REFERENCE

Array = NDArray[np.float64]

N_SHELLS = 10

#: Rows of Table 1: key of a statistic, its name, decimals.
ENTRIES = (
    ("n_obs", "Observations", 0),
    ("n_unique", "Unique reflections", 0),
    ("redundancy", "Redundancy", 1),
    ("completeness", "Completeness [%]", 1),
    ("i_over_sigma", "Mean I/σ(I)", 1),
    ("r_merge", "R_merge", 3),
    ("r_meas", "R_meas", 3),
    ("r_pim", "R_pim", 3),
    ("cc_half", "CC1/2", 3),
    ("anomalous_completeness", "Anomalous completeness [%]", 1),
    ("anomalous_redundancy", "Anomalous redundancy", 1),
    ("cc_anom", "CCanom", 3),
)


class Scores(NamedTuple):
    """Statistics of both programs.

    Parameters
    ----------
    rows : dict of str to list of dict
        Rows of each shell and of all, by program.
    basis : str
        What they were computed from, in words.
    reason : str
        Why DIALS is missing, or misses some; empty where it does not.
    """

    rows: dict[str, list[Row]]
    basis: str
    reason: str


def score(source: DataSource) -> Scores:
    """Score what the data set has: observations of both, else files of less.

    Raises
    ------
    NoDataError
        There is nothing yet.
    """
    try:
        observations = source.by_program("observations")
    except NoDataError as why:
        return _without_observations(source, str(why))
    rows = {name: score_observations(o, source) for name, o in observations.items()}
    reason = source.why_no_reference("observations")
    if reason and not source.why_no_reference("merged"):
        rows[REFERENCE] = score_merged(source.merged_reference, source)
        reason = f"DIALS from its merged file, without R factors and half sets: {reason}"
    return Scores(rows, "scaled, unmerged observations; random halves of the observations", reason)


def bound(o: Observations, source: DataSource) -> ScaledReflections:
    """Bind observations to the unique reflections of ours."""
    asu = source.asu
    return ScaledReflections.of(asu, asu.refl_id(o.miller_index), o.intensity, o.sigma**2)


class Assigned(NamedTuple):
    """What the mates of each observation say of it, (N,) each; NaN where it has none.

    Parameters
    ----------
    mean : (N,)
        Weighted mean of all observations of its reflection, Bijvoet mates apart.
    z : (N,)
        Its difference from that of the others, in units of the error of that difference.
    """

    mean: Array
    z: Array


def assigned(o: Observations, source: DataSource) -> Assigned:
    """Compare observations with their symmetry mates."""
    row = source.asu.refl_id(o.miller_index)
    mean, z = np.full(len(row), np.nan), np.full(len(row), np.nan)
    ok = (row >= 0) & np.isfinite(o.intensity) & np.isfinite(o.sigma) & (o.sigma > 0)
    n, own = len(source.asu), row[ok]
    weight = o.sigma[ok] ** -2.0
    total = np.bincount(own, weight, n)
    sums = np.bincount(own, weight * o.intensity[ok], n)
    mean[ok] = sums[own] / total[own]
    others = total[own] - weight
    has_others = np.bincount(own, minlength=n)[own] > 1
    with np.errstate(all="ignore"):
        of_others = (sums[own] - weight * o.intensity[ok]) / others
        z[ok] = (o.intensity[ok] - of_others) / np.sqrt(1 / weight + 1 / others)
    z[np.flatnonzero(ok)[~has_others]] = np.nan
    return Assigned(mean, z)


def score_observations(observations: Observations, source: DataSource) -> list[Row]:
    """Statistics of scaled observations by shell, then of all."""
    asu = source.asu
    unique = unique_reflections(asu)
    return shell_statistics(
        bound(observations, source),
        unique,
        resolution_shells(unique.inv_d2, N_SHELLS),
        possible=possible_reflections(asu.cell, asu.space_group, asu.d_min),
    )


def score_merged(merged: MergedMtz, source: DataSource) -> list[Row]:
    """Statistics that a merged file still has: completeness, redundancy, I/sigma."""
    asu, table = source.asu, merged.table
    unique = unique_reflections(asu)
    shells = resolution_shells(unique.inv_d2, N_SHELLS)
    at = asu.refl_id(table.miller_index)
    seen = np.isfinite(table.i_mean) & (at >= 0)
    inv_d2 = asu.d[at] ** -2.0
    shell, of_possible = shells.assign(inv_d2), shells.assign(unique.inv_d2)
    n_obs = np.nan_to_num(table.n_plus) + np.nan_to_num(table.n_minus)
    rows = []
    for i in [*range(len(shells)), None]:
        own = seen & (shell >= 0 if i is None else shell == i)
        n_possible = int((of_possible >= 0 if i is None else of_possible == i).sum())
        n, total = int(own.sum()), int(n_obs[own].sum())
        d_max, d_min = (
            shells.d_range(i or 0)[0],
            shells.d_range(len(shells) - 1 if i is None else i)[1],
        )
        row: Row = {"shell": "overall" if i is None else i, "d_max": d_max, "d_min": d_min}
        row |= {"n_unique": n, "n_obs": total or None}
        row["completeness"] = n / n_possible if n_possible else None
        row["redundancy"] = total / n if n and total else None
        ratio = table.i_mean[own] / table.sigma_i_mean[own]
        row["i_over_sigma"] = finite_mean(ratio)
        rows.append(row)
    return rows


def _without_observations(source: DataSource, why: str) -> Scores:
    rows = {OURS: [_numbers(row) for row in source.statistics()]}
    basis = "statistics.csv; our half sets are amplitudes under Wilson's prior"
    if not source.why_no_reference("observations"):
        rows[REFERENCE] = score_observations(source.reference_observations, source)
        return Scores(rows, f"{basis}, DIALS' are intensities", "")
    reason = source.why_no_reference("merged")
    if not reason:
        rows[REFERENCE] = score_merged(source.merged_reference, source)
        reason = f"DIALS from its merged file, without R factors and half sets: {why}"
    return Scores(rows, basis, reason)


def _numbers(row: Mapping[str, str]) -> Row:
    def number(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text or None

    return {key: number(value) for key, value in row.items()}


def table_one(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Header and rows of Table 1: overall, lowest and outer shell of each program.

    Returns
    -------
    header, rows : list
        The first column names the statistic.
    """
    places = (("overall", -1), ("low", 0), ("outer", -2))
    header = ["", *(f"{name}, {place}" for name in scores.rows for place, _ in places)]
    limits = [_limits(rows[at]) for rows in scores.rows.values() for _, at in places]
    table = [["Resolution [Å]", *limits]]
    for key, title, decimals in ENTRIES:
        factor = 100 if title.endswith("[%]") else 1
        values = [rows[at].get(key) for rows in scores.rows.values() for _, at in places]
        table.append([title, *(formatted(v, decimals, factor) for v in values)])
    return header, table


def formatted(value: Any, decimals: int, factor: float = 1.0) -> str:
    """Write a number with so many decimals; a dash for what is missing."""
    if not isinstance(value, int | float) or not np.isfinite(value):
        return "–"
    return f"{factor * value:,.{decimals}f}"


def _limits(row: Row) -> str:
    return f"{float(row['d_max']):.2f}–{float(row['d_min']):.2f}"


def shells_of(rows: Sequence[Row]) -> list[Row]:
    """Rows of the shells, without that of all."""
    return [row for row in rows if row["shell"] != "overall"]
