r"""Correlation r of an amplitude with its parent, against resolution, from halves of the data.

The halves share no observation, so that the product of the differences child less parent that each
of them gives is free of noise; its mean is (1 - r^2) / 2 for acentric and 1 - r^2 for centric
reflections (:mod:`braggflux.merge.prior.mate_correlation`). Nothing is maximised: no r can win by
swallowing noise, and no amplitude is fitted again.

Means are weighted by the error model's variances; outliers are left out. Robust weights would draw
the observations of both halves to the same amplitude, and the halves would agree about its noise.

Shells change gradually. Their estimates m_s +- e_s of 1 - r^2 are those of a random walk u_s of
log(1 - r^2),

    sum_s (m_s - exp u_s)^2 / (2 e_s^2) + sum_s (u_s - u_s-1)^2 / (2 STEP^2)  ->  min,

where a poor one leans on its neighbours. 1 - r^2 is never taken for smaller than two standard
errors: too small, it takes true differences away; too large, it leaves some noise in them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.merge.data.table import ObservationTable
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.sums import N_SIGMA, ObservationSums
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.mate_correlation import mean_half_set_covariance, random_halves

logger = logging.getLogger(__name__)

#: Mean squares below this, in F^2 over its mean, say nothing of an amplitude difference.
WEAK = 0.2
#: Change of log(1 - r^2) from shell to shell, standard deviation.
STEP = 0.3
#: Products this many times the median are taken for that: no two outliers shall set a shell.
LARGEST = 50.0
MIN_PAIRS = 50
N_ERRORS = 2.0
N_SPLITS = 16
N_ROUNDS = 50
SMALLEST, GREATEST = 1e-5, 0.5


@dataclass(frozen=True)
class Share:
    """Estimate of 1 - r^2 of one shell and its standard error; infinite where nothing is known."""

    value: float
    error: float
    n_pairs: int


@torch.no_grad()
def half_set_correlation(
    merger: Merger, table: ObservationTable, seed: int
) -> list[dict[str, float | None]]:
    """Set r of every shell of the double-Wilson prior; returns what was found in each.

    Images fall into the halves as a whole, those that datasets recorded together too: halves must
    not share the errors of an image.

    Parameters
    ----------
    merger : Merger
        Its scales, error model and amplitudes are used as they are.
    table : ObservationTable
        Its used observations count.
    seed : int
        Of the halves.
    """
    prior = merger.prior.part(DoubleWilson)
    batch = table.everything()
    o, e = batch.observations, merger.generative(batch, merger.inference())
    variance = e.alone.variance
    used = o.is_used & (merger.likelihood.share_of_spots(batch, e) > 0.5)
    used &= (o.intensity - e.mean) ** 2 < N_SIGMA**2 * variance
    product, known = mean_half_set_covariance(
        batch.first_rows[used],
        (o.intensity / e.scale)[used],
        (e.scale**2 / variance)[used],
        prior.child,
        prior.parent,
        difference_norm(merger),
        random_halves(o.exposure_group[used], torch.Generator().manual_seed(seed), N_SPLITS),
    )
    return set_correlation(merger, product, known)


@torch.no_grad()
def half_set_correlation_of_sums(
    merger: Merger, sums: ObservationSums
) -> list[dict[str, float | None]]:
    """Set r as :func:`half_set_correlation`, from sums over two halves of the images."""
    prior = merger.prior.part(DoubleWilson)
    mean = sums.half_set_means()
    difference = (mean[:, prior.child] - mean[:, prior.parent]) / difference_norm(merger)
    product = difference.prod(0)
    return set_correlation(merger, product, torch.isfinite(product))


def difference_norm(merger: Merger) -> Tensor:
    """``2 F sqrt(epsilon Sigma)`` of each child and its parent, (C,); NaN where F is too weak.

    Near F = 0 a difference of intensities says nothing of a difference of amplitudes.
    """
    prior = merger.prior.part(DoubleWilson)
    spread, usual = merger.log_spread.exp(), prior.spread()[prior.child]
    square = 0.5 * (spread[prior.child] + spread[prior.parent])
    return torch.where(square > WEAK * usual, 2 * (square * usual).sqrt(), torch.nan)


@torch.no_grad()
def set_correlation(
    merger: Merger, product: Tensor, is_known: Tensor
) -> list[dict[str, float | None]]:
    """Set r of every shell from half-set products of normalised differences, (C,).

    Parameters
    ----------
    merger : Merger
    product : Tensor, (C,)
        Of each child; NaN where it is not usable.
    is_known : Tensor, (C,) bool
    """
    prior = merger.prior.part(DoubleWilson)
    keep = is_known & torch.isfinite(product)
    factor = torch.where(prior.is_centric[prior.child], 1.0, 2.0)
    value, shell = (factor * product)[keep], prior.shell[prior.child][keep]
    if len(value):
        limit = LARGEST * value.abs().median()
        value = value.clamp(-limit, limit)
    n_shells = len(prior.one_minus_r2)
    found = [_mean(value[shell == s]) for s in range(n_shells)]
    smoothed = smooth(found)
    if smoothed is None:  # too few pairs in every shell: all shells together
        smoothed = smooth([_mean(value)])
    if smoothed is None:
        logger.warning(
            "fewer than %d pairs of relatives: r stays at %.4f",
            *(MIN_PAIRS, float(prior.correlation.mean())),
        )
    else:
        prior.one_minus_r2.copy_(smoothed)
    chosen = prior.correlation.tolist()
    logger.debug("r by shell, low to high resolution: %s", " ".join(f"{r:.4f}" for r in chosen))
    return [
        {
            "shell": s,
            "n_pairs": own.n_pairs,
            "one_minus_r2": own.value if math.isfinite(own.error) else None,
            "error": own.error if math.isfinite(own.error) else None,
            "chosen_r": chosen[s],
        }
        for s, own in enumerate(found)
    ]


def _mean(products: Tensor) -> Share:
    n = len(products)
    if n < MIN_PAIRS:
        return Share(0.0, math.inf, n)
    mean, error = float(products.mean()), float(products.std()) / n**0.5
    # below zero the halves contradict each other: errors of the scales that they share
    return Share(mean, max(error, -mean), n)


def smooth(shells: Sequence[Share]) -> Tensor | None:
    """Best values of 1 - r^2 of a random walk through the shells' estimates, (n_shells,).

    Gauss-Newton steps in the logarithm. None where no shell has an estimate.
    """
    mean = torch.tensor([s.value for s in shells], dtype=torch.float64)
    weight = torch.tensor([s.error**-2 for s in shells], dtype=torch.float64)
    if not (weight > 0).any():
        return None
    pooled = float((weight * mean).sum() / weight.sum())
    start = max(pooled, float(weight.sum() ** -0.5))
    u = torch.full_like(mean, math.log(start))
    difference = torch.eye(len(shells), dtype=torch.float64).diff(dim=0)
    walk = difference.T @ difference / STEP**2
    for _ in range(N_ROUNDS):
        share = u.exp()
        precision = (weight * share**2).diag() + walk
        score = weight * share * (mean - share) - walk @ u
        u = (u + torch.linalg.solve(precision, score).clamp(-1, 1)).clamp_min(math.log(SMALLEST))
    share = u.exp()
    error = share * torch.linalg.inv((weight * share**2).diag() + walk).diag().sqrt()
    return torch.hypot(share, N_ERRORS * error).clamp(SMALLEST, GREATEST)
