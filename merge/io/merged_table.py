"""Merged structure factors as a table over unique reflections, Friedel mates side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.output.half_sets import HalfSet, friedel_rows, mean_of_mates

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MergedTable:
    """One row per unique reflection, Friedel mates joined; NaN where there is no value.

    Centric reflections (and all, in data merged without keeping Friedel mates apart) have their
    value under F(+) and nothing under F(-), as in the files of ``dials.merge``.

    Parameters
    ----------
    miller_index : (R, 3) int32
        In the CCP4 asymmetric unit.
    f_plus, sigma_f_plus, f_minus, sigma_f_minus, i_plus, sigma_i_plus, i_minus, sigma_i_minus
        (R,) Structure-factor amplitudes, intensities and their standard deviations.
    f, sigma_f, i_mean, sigma_i_mean
        (R,) Both mates together.
    n_plus, n_minus
        (R,) Number of observations.
    half_sets : dict of str to HalfSet
        Independent merges of a part of the observations each, by column name. ``"F1"`` becomes the
        MTZ columns ``F1 SIGF1 F1(+) SIGF1(+) F1(-) SIGF1(-)``; the name's first letter, F or I,
        says what is held.
    is_anomalous : bool
        Friedel mates were kept apart.
    """

    miller_index: NDArray[np.int32]
    f_plus: Array
    sigma_f_plus: Array
    f_minus: Array
    sigma_f_minus: Array
    i_plus: Array
    sigma_i_plus: Array
    i_minus: Array
    sigma_i_minus: Array
    f: Array
    sigma_f: Array
    i_mean: Array
    sigma_i_mean: Array
    n_plus: Array
    n_minus: Array
    half_sets: dict[str, HalfSet] = field(default_factory=dict)
    is_anomalous: bool = True

    def __post_init__(self) -> None:
        """Refuse half-set names that say neither amplitude nor intensity."""
        for name in self.half_sets:
            if name[:1] not in ("F", "I") or not name[1:]:
                raise ValueError(f"half-set name {name!r} must be F or I and a suffix, like 'F1'")

    def __len__(self) -> int:
        """Return R."""
        return len(self.miller_index)


def merged_table(
    asu: ReciprocalAsu,
    f: ArrayLike,
    sigma_f: ArrayLike,
    i: ArrayLike,
    sigma_i: ArrayLike,
    n_obs: ArrayLike,
    half_sets: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
) -> MergedTable:
    """Put the Friedel mates of ``asu`` side by side.

    Rows without any observation (``n_obs`` = 0) are left out, and so is the mate that was not
    observed: a model knows a value for it, but that is a prediction and not a measurement.

    Parameters
    ----------
    asu : ReciprocalAsu
    f, sigma_f, i, sigma_i : (A,)
        One value per row of ``asu``; NaN is allowed.
    n_obs : (A,) int
        Observations of each row.
    half_sets : mapping of str to (value, sigma), optional
        Per row of ``asu``; NaN where the half saw nothing. Names as :class:`MergedTable` says.

    Notes
    -----
    The mean of two mates is weighted by 1/sigma^2 and takes them as independent; see
    :func:`braggflux.merge.output.half_sets.mean_of_mates`.
    """
    seen = np.asarray(n_obs) > 0
    plus, minus = friedel_rows(asu)
    kept = seen[plus] | ((minus >= 0) & seen[minus])
    plus, minus = plus[kept], minus[kept]

    def mates(values: ArrayLike) -> tuple[Array, Array]:
        values = np.where(seen, np.asarray(values, float), np.nan)
        return values[plus], np.where(minus >= 0, values[minus], np.nan)

    given = {"f": f, "sigma_f": sigma_f, "i": i, "sigma_i": sigma_i, "n": n_obs}
    columns = {}
    for name, values in given.items():
        columns[f"{name}_plus"], columns[f"{name}_minus"] = mates(values)
    for value, mean in (("f", "f"), ("i", "i_mean")):
        columns[mean], columns[f"sigma_{mean}"] = mean_of_mates(
            *(
                columns[f"{prefix}{value}_{m}"]
                for m in ("plus", "minus")
                for prefix in ("", "sigma_")
            )
        )
    halves = {
        name: HalfSet.of(asu, value, sigma).select(kept)
        for name, (value, sigma) in (half_sets or {}).items()
    }
    return MergedTable(
        miller_index=asu.asu_index[plus],
        half_sets=halves,
        is_anomalous=asu.anomalous,
        **columns,
    )
