"""Weighted merging of observations, and independent half data sets.

Plain arithmetic on scaled intensities: the statistics need an estimate of each reflection that is
free of priors, and two that share no observation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu

Array = NDArray[np.float64]


def friedel_rows(asu: ReciprocalAsu) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of ``asu`` that hold F(+) and F(-) of each non-anomalous reflection.

    Returns
    -------
    plus, minus : (R,) int
        ``minus`` is -1 where there is no separate F(-): centric, or not anomalous.
    """
    plus = np.flatnonzero(asu.friedel_sign > 0)
    mate = asu.friedel_mate[plus]
    return plus, np.where(mate == plus, -1, mate)


@dataclass(frozen=True)
class ScaledReflections:
    """Observations on one common scale, bound to unique reflections.

    Parameters
    ----------
    refl_id : (N,) int
        Row in :class:`~braggflux.merge.output.statistics.UniqueReflections`; Friedel mates share a
        row. Negative: not used.
    friedel_sign : (N,) int
        +1 for F(+) (and all centrics), -1 for F(-).
    intensity, variance : (N,)
        Divided by the scale (squared for the variance). Rows that are not finite or whose variance
        is not positive are not used.
    """

    refl_id: NDArray[np.int64]
    friedel_sign: NDArray[np.int64]
    intensity: Array
    variance: Array

    @classmethod
    def of(
        cls,
        asu: ReciprocalAsu,
        refl_id: NDArray[np.int64],
        intensity: ArrayLike,
        variance: ArrayLike,
    ) -> ScaledReflections:
        """Join the Friedel mates of an anomalous table.

        Parameters
        ----------
        asu : ReciprocalAsu
        refl_id : (N,) int
            Row in ``asu``, negative where absent.
        intensity, variance : (N,)
        """
        refl_id = np.asarray(refl_id)
        plus, _ = friedel_rows(asu)
        joined = np.empty(len(asu), dtype=np.int64)
        joined[plus] = np.arange(len(plus))
        joined[asu.friedel_mate[plus]] = np.arange(len(plus))
        return cls(
            np.where(refl_id >= 0, joined[refl_id], -1),
            asu.friedel_sign[refl_id].astype(np.int64),
            np.asarray(intensity, float),
            np.asarray(variance, float),
        )

    def usable(self) -> ScaledReflections:
        """Select the rows that statistics may count."""
        keep = (self.refl_id >= 0) & np.isfinite(self.intensity) & np.isfinite(self.variance)
        keep &= np.where(np.isfinite(self.variance), self.variance, 0) > 0
        return ScaledReflections(
            self.refl_id[keep],
            self.friedel_sign[keep],
            np.asarray(self.intensity, float)[keep],
            np.asarray(self.variance, float)[keep],
        )


@dataclass(frozen=True)
class HalfSet:
    """One of two independent merges, over the unique reflections; NaN where missing.

    The values may be intensities or amplitudes, as long as both halves hold the same.
    """

    mean: Array
    sigma: Array
    plus: Array
    sigma_plus: Array
    minus: Array
    sigma_minus: Array

    @classmethod
    def of(cls, asu: ReciprocalAsu, value: ArrayLike, sigma: ArrayLike) -> HalfSet:
        """From one value per row of ``asu``; the mean of two mates is weighted by 1/sigma^2."""
        plus, minus = friedel_rows(asu)
        value, sigma = np.asarray(value, float), np.asarray(sigma, float)
        mates = [
            np.where(rows >= 0, x[rows], np.nan) for rows in (plus, minus) for x in (value, sigma)
        ]
        return cls(*mean_of_mates(*mates), *mates)

    def select(self, rows: NDArray[Any]) -> HalfSet:
        """Select rows by index or by mask."""
        return HalfSet(*(getattr(self, f.name)[rows] for f in fields(self)))


def mean_of_mates(
    plus: Array, sigma_plus: Array, minus: Array, sigma_minus: Array
) -> tuple[Array, Array]:
    """Inverse-variance weighted mean of Friedel mates and its sigma; NaN counts as not there.

    The mates count as independent: where a prior ties them, sigma is a lower bound.
    """
    total, weighted = np.zeros(len(plus)), np.zeros(len(plus))
    for value, sigma in ((plus, sigma_plus), (minus, sigma_minus)):
        seen = np.isfinite(value) & (sigma > 0)
        weight = np.zeros(len(value))
        weight[seen] = sigma[seen] ** -2.0
        total += weight
        weighted += np.where(seen, value, 0.0) * weight
    total[total == 0] = np.nan
    return weighted / total, total**-0.5


def weighted_merge(
    refl_id: NDArray[np.int64], intensity: Array, variance: Array, n_refl: int
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Inverse-variance weighted mean of each reflection's observations.

    Parameters
    ----------
    refl_id : (N,) int
        In 0 .. n_refl - 1.
    intensity, variance : (N,)
        ``variance`` > 0.
    n_refl : int
        R

    Returns
    -------
    mean, sigma : (R,)
        NaN where there is no observation; ``sigma`` from the given variances alone.
    n_obs : (R,) int
    """
    if np.any(np.asarray(refl_id) < 0):
        raise ValueError(
            "refl_id holds negative rows (absent reflections): select them away first"
        )
    weight = 1.0 / np.asarray(variance, float)
    n_obs = np.bincount(refl_id, minlength=n_refl)
    total = np.bincount(refl_id, weights=weight, minlength=n_refl).astype(float)  # int if N = 0
    total[n_obs == 0] = np.nan
    mean = np.bincount(refl_id, weights=weight * intensity, minlength=n_refl) / total
    return mean, total**-0.5, n_obs


def split_half_sets(
    refl_id: NDArray[np.int64], friedel_sign: NDArray[np.int64], seed: int = 0
) -> NDArray[np.int64]:
    """Assign every observation to half 0 or half 1, at random but balanced.

    Within each reflection, and within each of its Friedel mates, the halves differ by at most one
    observation; which half has the odd one is random.

    Returns
    -------
    (N,) int, 0 or 1
    """
    rng = np.random.default_rng(seed)
    refl_id = np.asarray(refl_id)
    # Alternate along each reflection's observations, ordered by Friedel sign and then at random:
    # both the reflection and each mate are then runs of an alternating sequence.
    order = np.lexsort((rng.random(len(refl_id)), friedel_sign, refl_id))
    _, start, group = np.unique(refl_id[order], return_index=True, return_inverse=True)
    rank = np.arange(len(refl_id)) - start[group]
    half = np.empty(len(refl_id), dtype=np.int64)
    half[order] = (rank + rng.integers(0, 2, size=len(start))[group]) % 2
    return half


def merge_half(observations: ScaledReflections, n_refl: int) -> HalfSet:
    """Merge observations into the mean of each reflection and of each Friedel mate."""
    o = observations

    def merged(keep: NDArray[np.bool_]) -> tuple[Array, Array]:
        return weighted_merge(o.refl_id[keep], o.intensity[keep], o.variance[keep], n_refl)[:2]

    everything = np.ones(len(o.refl_id), dtype=bool)
    return HalfSet(*merged(everything), *merged(o.friedel_sign > 0), *merged(o.friedel_sign < 0))


def half_sets(
    observations: ScaledReflections, n_refl: int, seed: int = 0
) -> tuple[HalfSet, HalfSet]:
    """Split the observations at random and merge each half."""
    o = observations.usable()
    half = split_half_sets(o.refl_id, o.friedel_sign, seed)
    halves = []
    for i in (0, 1):
        k = half == i
        part = ScaledReflections(o.refl_id[k], o.friedel_sign[k], o.intensity[k], o.variance[k])
        halves.append(merge_half(part, n_refl))
    return halves[0], halves[1]
