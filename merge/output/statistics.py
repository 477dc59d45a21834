"""Data-quality statistics by resolution shell, from scaled observations.

The definitions are those of the field and of ``iotbx.merging_statistics``, against which the
tests compare: R factors about the inverse-variance weighted mean, over reflections seen at least
twice (Diederichs & Karplus 1997; Weiss 2001); CC1/2 between random half data sets (Karplus &
Diederichs 2012); R_split between their intensities (White et al. 2012); CCanom between the Bijvoet
differences of two half data sets; shells of equal volume. Systematically absent reflections are
for the caller to leave out.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.atomic import replacing
from braggflux.integrator.crystal.cell import inv_d2
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.crystal.symmetry import is_centric
from braggflux.merge.output.half_sets import (
    HalfSet,
    ScaledReflections,
    friedel_rows,
    half_sets,
    weighted_merge,
)

Array = NDArray[np.float64]
Row = dict[str, Any]

#: Fewer pairs than this give no correlation: with three points any value is likely.
MIN_PAIRS = 10
#: Median of |z| for a standard normal z.
MEDIAN_ABS_NORMAL = 0.6744897501960817

#: Relative difference within which two 1/d^2 are of one reflection.
ROUNDING = 1e-9

COLUMNS = (
    "shell",
    "d_max",
    "d_min",
    "n_obs",
    "n_unique",
    "n_possible",
    "completeness",
    "redundancy",
    "anomalous_completeness",
    "anomalous_redundancy",
    "mean_i",
    "i_over_sigma",
    "r_merge",
    "r_meas",
    "r_pim",
    "r_split",
    "cc_half",
    "cc_half_pairs",
    "cc_anom",
    "cc_anom_pairs",
    "z_spread",
    "z_spread_anom",
    "reason",
)


#: Columns that another random split would change.
OF_HALF_SETS = ("r_split", "cc_half", "cc_anom", "z_spread", "z_spread_anom")


@dataclass(frozen=True)
class UniqueReflections:
    """The non-anomalous unique reflections that ``ScaledReflections.refl_id`` points to.

    Parameters
    ----------
    inv_d2 : (R,)
        1 / d^2 [1/A^2]
    is_centric : (R,) bool
    """

    inv_d2: Array
    is_centric: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return R."""
        return len(self.inv_d2)


@dataclass(frozen=True)
class ResolutionShells:
    """Shells of resolution, from low to high.

    Parameters
    ----------
    edges : (n + 1,)
        1 / d^2 [1/A^2], increasing. The outermost edges belong to the shells.
    """

    edges: Array

    def __len__(self) -> int:
        """Return the number of shells."""
        return len(self.edges) - 1

    def assign(self, inv_d2: Array) -> NDArray[np.int64]:
        """Shell of each reflection, -1 outside."""
        inv_d2 = np.asarray(inv_d2, float)
        low, high = self.edges[0], self.edges[-1]
        # 1/d^2 of one reflection differs in the last digits, by the way it was computed
        inv_d2 = np.where(np.isclose(inv_d2, high, rtol=ROUNDING, atol=0.0), high, inv_d2)
        inv_d2 = np.where(np.isclose(inv_d2, low, rtol=ROUNDING, atol=0.0), low, inv_d2)
        shell = np.searchsorted(self.edges, inv_d2, side="right") - 1
        shell[inv_d2 == high] = len(self) - 1
        shell[(inv_d2 < low) | (inv_d2 > high)] = -1
        return shell

    def d_range(self, shell: int) -> tuple[float, float]:
        """(d_max, d_min) [A] of one shell."""
        low, high = self.edges[shell], self.edges[shell + 1]
        return float("inf") if low <= 0 else low**-0.5, high**-0.5


def resolution_shells(
    inv_d2: Array, n_shells: int, *, d_max: float | None = None, d_min: float | None = None
) -> ResolutionShells:
    """Shells of equal reciprocal-space volume that span the reflections.

    Parameters
    ----------
    inv_d2 : (R,)
        1 / d^2 [1/A^2]
    n_shells : int
    d_max, d_min : float, optional
        Limits [A] instead of those of ``inv_d2``.
    """
    if n_shells < 1:
        raise ValueError(f"n_shells must be at least 1, not {n_shells}")
    inv_d2 = np.asarray(inv_d2, float)
    if inv_d2.size == 0 and None in (d_max, d_min):
        raise ValueError("no reflections to make resolution shells of")
    low = inv_d2.min() if d_max is None else d_max**-2
    high = inv_d2.max() if d_min is None else d_min**-2
    edges = np.linspace(low**1.5, high**1.5, n_shells + 1) ** (2 / 3)
    edges[0], edges[-1] = low, high  # exact, so that the outermost reflections are inside
    return ResolutionShells(edges)


def unique_reflections(asu: ReciprocalAsu) -> UniqueReflections:
    """Rows of a table of unique reflections, Friedel mates joined."""
    plus, _ = friedel_rows(asu)
    return UniqueReflections(asu.d[plus] ** -2.0, asu.is_centric[plus])


def possible_reflections(
    cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup, d_min: float
) -> UniqueReflections:
    """All unique reflections to ``d_min`` [A] that the space group does not extinguish."""
    # A hair beyond d_min: the reflection that defined d_min must not be lost to rounding.
    hkl = gemmi.make_miller_array(cell, space_group, d_min * (1 - 1e-6))
    return UniqueReflections(inv_d2(hkl, cell), is_centric(hkl, space_group))


@dataclass(frozen=True)
class ReflectionSums:
    """Sums over the observations of each unique reflection, (R,) each.

    ``deviation`` and ``intensity``: of |I - mean| and of I, for the R factors.
    """

    mean: Array
    sigma: Array
    n_obs: NDArray[np.int64]
    n_plus: NDArray[np.int64]
    n_minus: NDArray[np.int64]
    deviation: Array
    intensity: Array

    @classmethod
    def of(cls, o: ScaledReflections, n_refl: int) -> ReflectionSums:
        """Go through usable observations in memory."""
        mean, sigma, n_obs = weighted_merge(o.refl_id, o.intensity, o.variance, n_refl)
        deviation = np.abs(o.intensity - mean[o.refl_id])
        return cls(
            mean,
            sigma,
            n_obs,
            np.bincount(o.refl_id[o.friedel_sign > 0], minlength=n_refl),
            np.bincount(o.refl_id[o.friedel_sign < 0], minlength=n_refl),
            np.asarray(np.bincount(o.refl_id, deviation, n_refl), dtype=float),
            np.asarray(np.bincount(o.refl_id, o.intensity, n_refl), dtype=float),
        )


def shell_statistics(
    observations: ScaledReflections | ReflectionSums,
    unique: UniqueReflections,
    shells: ResolutionShells,
    *,
    possible: UniqueReflections | None = None,
    halves: tuple[HalfSet, HalfSet] | None = None,
    intensity_halves: tuple[HalfSet, HalfSet] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Statistics of every shell, then of all shells together.

    Parameters
    ----------
    observations : ScaledReflections or ReflectionSums
        On one scale; unusable rows are left out here. Sums of observations that are not in memory
        need both kinds of halves.
    unique : UniqueReflections
    shells : ResolutionShells
    possible : UniqueReflections, optional
        What could have been measured (:func:`possible_reflections`), for completeness.
    halves : tuple of HalfSet, optional
        Two independent merges, for instance of two models that saw half of the observations each;
        random halves of ``observations`` without it.
    intensity_halves : tuple of HalfSet, optional
        Merged intensities for R_split, when ``halves`` are amplitudes; random halves without it.
    seed : int
        Of the random halves.

    Returns
    -------
    list of dict
        Keys :data:`COLUMNS`. ``None`` is what could not be computed; ``reason`` says why.
    """
    if isinstance(observations, ReflectionSums):
        per_reflection = observations
    else:
        usable = observations.usable()
        per_reflection = ReflectionSums.of(usable, len(unique))
        intensity_halves = intensity_halves or half_sets(usable, len(unique), seed)
        halves = halves or intensity_halves
    if halves is None or intensity_halves is None:
        raise ValueError("sums of observations need halves of both kinds")
    shell_of = shells.assign(unique.inv_d2)
    rows = []
    for i in [*range(len(shells)), None]:
        chosen = shell_of >= 0 if i is None else shell_of == i
        row, reasons = _moments(per_reflection, unique, chosen)
        if possible is not None:
            possible_shell = shells.assign(possible.inv_d2)
            inside = possible_shell >= 0 if i is None else possible_shell == i
            _add_completeness(row, reasons, per_reflection, unique, chosen, possible, inside)
        _add_half_set_statistics(row, reasons, halves, chosen & ~unique.is_centric, chosen)
        row["r_split"] = r_split(*(h.mean[chosen] for h in intensity_halves))
        d_max = shells.d_range(0 if i is None else i)[0]
        d_min = shells.d_range(len(shells) - 1 if i is None else i)[1]
        row |= {"shell": "overall" if i is None else i, "d_max": d_max, "d_min": d_min}
        row["reason"] = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        rows.append({name: row.get(name) for name in COLUMNS})
    return rows


def average_over_repeats(repeats: Sequence[list[Row]]) -> list[Row]:
    """Average what depends on the random halves over several tables of :func:`shell_statistics`.

    A repeat without a value does not count; the rest is that of the first.
    """
    rows = []
    for same in zip(*repeats, strict=True):
        row = dict(same[0])
        for name in OF_HALF_SETS:
            known = [r[name] for r in same if r[name] is not None]
            row[name] = sum(known) / len(known) if known else None
        rows.append(row)
    return rows


def _moments(
    p: ReflectionSums, unique: UniqueReflections, chosen: NDArray[np.bool_]
) -> tuple[Row, dict[str, str]]:
    """Compute counts, mean intensity and R factors of the chosen reflections."""
    seen = chosen & (p.n_obs > 0)
    n_obs, n_unique = int(p.n_obs[seen].sum()), int(seen.sum())
    row: Row = {"n_obs": n_obs, "n_unique": n_unique}
    if n_unique == 0:
        return row, {"all": "no observations"}
    acentric = seen & ~unique.is_centric
    n_mates = int(np.sum(p.n_plus[acentric] > 0) + np.sum(p.n_minus[acentric] > 0))
    row["redundancy"] = n_obs / n_unique
    row["anomalous_redundancy"] = n_obs / (n_mates + n_unique - int(acentric.sum()))
    row["mean_i"] = float(np.mean(p.mean[seen]))
    row["i_over_sigma"] = float(np.mean(p.mean[seen] / p.sigma[seen]))
    multiple = seen & (p.n_obs > 1)
    total = p.intensity[multiple].sum()
    if total <= 0:
        why = "no reflection seen twice" if not multiple.any() else "mean intensity not positive"
        return row, {"r_merge, r_meas, r_pim": why}
    n, deviation = p.n_obs[multiple], p.deviation[multiple]
    row["r_merge"] = float(deviation.sum() / total)
    row["r_meas"] = float(np.sum(deviation * np.sqrt(n / (n - 1))) / total)
    row["r_pim"] = float(np.sum(deviation * np.sqrt(1 / (n - 1))) / total)
    return row, {}


def _add_completeness(
    row: Row,
    reasons: dict[str, str],
    p: ReflectionSums,
    unique: UniqueReflections,
    chosen: NDArray[np.bool_],
    possible: UniqueReflections,
    inside: NDArray[np.bool_],
) -> None:
    """Fractions of the possible reflections, and of the possible Bijvoet pairs, that were seen."""
    n_possible = int(inside.sum())
    n_pairs = int(np.sum(inside & ~possible.is_centric))
    row["n_possible"] = n_possible
    if n_possible == 0:
        reasons["completeness"] = "no reflection is possible"
        return
    row["completeness"] = row["n_unique"] / n_possible
    if n_pairs == 0:
        reasons["anomalous_completeness"] = "no acentric reflection is possible"
        return
    paired = chosen & ~unique.is_centric & (p.n_plus > 0) & (p.n_minus > 0)
    row["anomalous_completeness"] = int(paired.sum()) / n_pairs


def _add_half_set_statistics(
    row: Row,
    reasons: dict[str, str],
    halves: tuple[HalfSet, HalfSet],
    acentric: NDArray[np.bool_],
    chosen: NDArray[np.bool_],
) -> None:
    """Correlations between the halves and the spread of their differences in units of sigma."""
    first, second = halves
    comparisons = {
        "cc_half": ("z_spread", chosen, [(h.mean, h.sigma) for h in halves]),
        "cc_anom": (
            "z_spread_anom",
            acentric,
            [(h.plus - h.minus, np.hypot(h.sigma_plus, h.sigma_minus)) for h in (first, second)],
        ),
    }
    for name, (spread, where, ((x, sigma_x), (y, sigma_y))) in comparisons.items():
        both = where & np.isfinite(x) & np.isfinite(y)
        n_pairs = int(both.sum())
        row[f"{name}_pairs"] = n_pairs
        if n_pairs < MIN_PAIRS:
            reasons[f"{name}, {spread}"] = f"{n_pairs} pairs, {MIN_PAIRS} needed"
            continue
        if x[both].std() == 0 or y[both].std() == 0:
            reasons[name] = "all values are equal"
        else:
            row[name] = float(np.corrcoef(x[both], y[both])[0, 1])
        z = (x - y)[both] / np.hypot(sigma_x, sigma_y)[both]
        row[spread] = float(np.median(np.abs(z)) / MEDIAN_ABS_NORMAL)


def r_split(first: Array, second: Array) -> float | None:
    """R_split of two merges of half of the images (White et al. 2012, J. Appl. Cryst. 45, 335).

    ``sum |I1 - I2| / sum (I1 + I2) * sqrt(2)``: the factor 2^-1/2 is for the halves having half of
    the observations. None without reflections in both, or where their sum is not positive.
    """
    both = np.isfinite(first) & np.isfinite(second)
    total = 0.5 * (first + second)[both].sum()
    if total <= 0:
        return None
    return float(np.abs(first - second)[both].sum() / total / np.sqrt(2))


def write_statistics_csv(path: str | Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows of :func:`shell_statistics`; an empty field is what could not be computed.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
