"""Merged structure factors as a table over unique reflections, Friedel mates side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.output.half_sets import friedel_rows, mean_of_mates

Array = NDArray[np.float64]

#: In the history of every file whose DANO is the coupled posterior; readers look for the first.
DIFFERENCE = (
    "DANO SIGDANO: coupled posterior of |F(+)| - |F(-)| (double-Wilson prior), mean",
    "  and standard deviation; shrunk by the prior already: use DANO unweighted",
    "FOMDANO: its figure of merit; contained in DANO already",
)


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
    difference, sigma_difference
        (R,) Mean and standard deviation of |F(+)| - |F(-)| under a prior that ties the mates
        (columns DANO, SIGDANO). The prior has shrunk it: it needs no weight.
    merit
        (R,) Figure of merit of that difference (column FOMDANO),
        :mod:`braggflux.merge.output.coupled_difference`.
    normalised
        (R,) E.
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
    difference: Array
    sigma_difference: Array
    merit: Array
    normalised: Array
    is_anomalous: bool = True

    def __len__(self) -> int:
        """Return R."""
        return len(self.miller_index)

    @property
    def has_coupled_differences(self) -> bool:
        """Whether a prior that ties the mates has given their difference."""
        return bool(np.isfinite(self.difference).any())


def merged_table(
    asu: ReciprocalAsu,
    f: ArrayLike,
    sigma_f: ArrayLike,
    i: ArrayLike,
    sigma_i: ArrayLike,
    n_obs: ArrayLike,
    difference: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    normalised: ArrayLike | None = None,
) -> MergedTable:
    """Put the Friedel mates of ``asu`` side by side.

    Rows without any observation (``n_obs`` = 0) are left out, and so is the mate that was not
    observed: a model knows a value for it, but that is a prediction and not a measurement. A
    difference needs both.

    Parameters
    ----------
    asu : ReciprocalAsu
    f, sigma_f, i, sigma_i : (A,)
        One value per row of ``asu``; NaN is allowed.
    n_obs : (A,) int
        Observations of each row.
    difference : (value, sigma, merit), optional
        Coupled |F(+)| - |F(-)| at the rows of F(+), (A,) each.
    normalised : (A,), optional
        E of each row.

    Notes
    -----
    The mean of two mates is weighted by 1/sigma^2 and takes them as independent; see
    :func:`braggflux.merge.output.half_sets.mean_of_mates`. E is their plain mean.
    """
    seen = np.asarray(n_obs) > 0
    plus, minus = friedel_rows(asu)
    kept = observed_reflections(asu, n_obs)
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
    both = seen[plus] & (minus >= 0) & seen[minus]
    for name, k in (("difference", 0), ("sigma_difference", 1), ("merit", 2)):
        own = np.full(len(asu), np.nan) if difference is None else np.asarray(difference[k], float)
        columns[name] = np.where(both, own[plus], np.nan)
    e = np.full(len(asu), np.nan) if normalised is None else np.asarray(normalised, float)
    e = np.stack(mates(e))
    is_there = np.isfinite(e)
    with np.errstate(invalid="ignore"):
        columns["normalised"] = np.where(is_there, e, 0.0).sum(0) / is_there.sum(0)
    return MergedTable(
        miller_index=asu.asu_index[plus],
        is_anomalous=asu.anomalous,
        **columns,
    )


def observed_reflections(asu: ReciprocalAsu, n_obs: ArrayLike) -> NDArray[np.bool_]:
    """Mask of the unique reflections, mates joined, with an observation, (U,) bool."""
    seen = np.asarray(n_obs) > 0
    plus, minus = friedel_rows(asu)
    return seen[plus] | ((minus >= 0) & seen[minus])
