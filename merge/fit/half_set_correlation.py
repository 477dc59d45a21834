r"""Correlation r of an amplitude with its parent, against resolution, from halves of the data.

The halves share no observation, so that the product of the differences child less parent that each
of them gives is free of noise; its mean is (1 - r^2) / 2 for acentric and 1 - r^2 for centric
reflections (:mod:`braggflux.merge.prior.mate_correlation`). Nothing is maximised: no r can win by
swallowing noise, and no amplitude is fitted again.

A pair weighs by the variance of its product, (1 - r^2 + noise)^-2, so that the many pairs whose
noise hides their difference do not hide that of the others.

Means are weighted by the error model's variances; outliers are left out. Robust weights would draw
the observations of both halves to the same amplitude, and the halves would agree about its noise.

The shells' estimates m_s +- e_s of 1 - r^2 are those of a curve through all
(:mod:`braggflux.merge.prior.correlation_curve`), one of Bijvoet mates and one of rows with a
parent in another dataset. 1 - r^2 is never taken for smaller than two standard errors of the
curve: too small, it takes true differences away; too large, it leaves some noise in them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from braggflux.merge.data.table import ObservationTable
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.sums import N_SIGMA, ObservationSums
from braggflux.merge.prior.correlation_curve import Curve, Share, mates_curve, parents_curve
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.mate_correlation import mean_half_set_covariance, random_halves
from braggflux.merge.prior.wilson import Wilson

logger = logging.getLogger(__name__)

#: Mean squares below this, in F^2 over its mean, say nothing of an amplitude difference.
WEAK = 0.2
#: Products over their spread this many times the median are taken for that: no two outliers shall
#: set a shell.
LARGEST = 50.0
MIN_PAIRS = 50
N_SPLITS = 16

Row = dict[str, float | str | None]


@torch.no_grad()
def half_set_correlation(merger: Merger, table: ObservationTable, seed: int) -> list[Row]:
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
    row, weight = batch.first_rows[used], (e.scale**2 / variance)[used]
    norm = difference_norm(merger)
    product, known = mean_half_set_covariance(
        row,
        (o.intensity / e.scale)[used],
        weight,
        prior.child,
        prior.parent,
        norm,
        random_halves(o.exposure_group[used], torch.Generator().manual_seed(seed), N_SPLITS),
    )
    total = weight.new_zeros(len(merger.group)).index_add_(0, row, weight)
    return set_correlation(
        merger, torch.where(known, product, torch.nan), _noise(prior, total, norm)
    )


@torch.no_grad()
def half_set_correlation_of_sums(merger: Merger, sums: ObservationSums) -> list[Row]:
    """Set r as :func:`half_set_correlation`, from sums over two halves of the images."""
    prior = merger.prior.part(DoubleWilson)
    mean, norm = sums.half_set_means(), difference_norm(merger)
    difference = (mean[:, prior.child] - mean[:, prior.parent]) / norm
    return set_correlation(merger, difference.prod(0), _noise(prior, sums["plain_weight"], norm))


def _noise(prior: DoubleWilson, weight: Tensor, norm: Tensor) -> Tensor:
    """Variance of the normalised differences, (C,); ``weight`` of the rows' means, (R,)."""
    return (1 / weight[prior.child] + 1 / weight[prior.parent]) / norm**2


def difference_norm(merger: Merger) -> Tensor:
    """``2 F sqrt(epsilon Sigma)`` of each child and its parent, (C,); NaN where F is too weak.

    Near F = 0 a difference of intensities says nothing of a difference of amplitudes.
    """
    prior = merger.prior.part(DoubleWilson)
    spread, usual = merger.log_spread.exp(), prior.spread()[prior.child]
    square = 0.5 * (spread[prior.child] + spread[prior.parent])
    return torch.where(square > WEAK * usual, 2 * (square * usual).sqrt(), torch.nan)


@torch.no_grad()
def set_correlation(merger: Merger, product: Tensor, noise: Tensor) -> list[Row]:
    """Set r of every child from half-set products of normalised differences, (C,).

    Parameters
    ----------
    merger : Merger
    product : Tensor, (C,)
        Of each child; NaN where it is not usable.
    noise : Tensor, (C,)
        Variance of the normalised difference of all observations; that of a half is twice as much.
    """
    prior = merger.prior.part(DoubleWilson)
    factor = torch.where(prior.is_centric[prior.child], 1.0, 2.0).to(product.dtype)
    value, error = factor * product, 2 * factor * noise
    rows: list[Row] = []
    for kind, own, curve in curves(merger):
        used = own & torch.isfinite(value) & torch.isfinite(error)
        # weights want r: at first it is as if differences were as large as their noise
        found, share = _through_shells(prior, curve, value, error + error[used].median(), used)
        if share is not None:
            found, share = _through_shells(prior, curve, value, error + share, used)
        if share is None:
            r = float((1 - prior.one_minus_r2[own]).sqrt().mean())
            logger.warning("fewer than %d pairs of relatives: r stays at %.4f", MIN_PAIRS, r)
        else:
            prior.one_minus_r2[own] = share[own]
        rows += _rows(kind, found, prior.one_minus_r2[own], prior.shell[prior.child][own])
    chosen = (1 - prior.by_shell()).sqrt().tolist()
    logger.debug("r by shell, low to high resolution: %s", " ".join(f"{r:.4f}" for r in chosen))
    return rows


def _through_shells(
    prior: DoubleWilson, curve: Curve, value: Tensor, spread: Tensor, used: Tensor
) -> tuple[list[Share], Tensor | None]:
    """Estimates of the shells, and the curve through them, (C,); None where too few are used.

    ``spread`` is the standard deviation of each value, (C,).
    """
    if bool(used.any()):
        limit = LARGEST * (value / spread)[used].abs().median() * spread
        value = torch.maximum(torch.minimum(value, limit), -limit)
    shell, weight = prior.shell[prior.child], torch.where(used, spread**-2, 0.0)
    own = [used & (shell == s) for s in range(prior.n_shells)]
    found = [_mean(value[inside], weight[inside]) for inside in own]
    share = curve.through(found, shell, weight)
    if share is None:  # too few pairs in every shell: all shells together
        pooled = [_mean(value[used], weight[used])]
        share = curve.through(pooled, torch.zeros_like(shell), weight)
    return found, share


def curves(merger: Merger) -> Iterator[tuple[str, Tensor, Curve]]:
    """Name, children, (C,) bool, and curve of 1 - r^2 of each kind of relatives that there is."""
    prior = merger.prior.part(DoubleWilson)
    is_mate = merger.joined[prior.child] == prior.parent
    if bool(is_mate.any()):
        yield "mate", is_mate, mates_curve(merger.prior.part(Wilson), prior.child)
    if not bool(is_mate.all()):
        yield "parent", ~is_mate, parents_curve(prior.shell[prior.child], prior.n_shells)


def _rows(kind: str, found: list[Share], share: Tensor, shell: Tensor) -> list[Row]:
    """Say what was found and chosen in each shell; ``share`` and ``shell`` are of the children."""
    return [
        {
            "relative": kind,
            "shell": s,
            "n_pairs": own.n_pairs,
            "one_minus_r2": own.value if math.isfinite(own.error) else None,
            "error": own.error if math.isfinite(own.error) else None,
            "chosen_r": float((1 - share[shell == s].mean()).sqrt()),
        }
        for s, own in enumerate(found)
        if bool((shell == s).any())
    ]


def _mean(products: Tensor, weight: Tensor) -> Share:
    n = len(products)
    if n < MIN_PAIRS:
        return Share(0.0, math.inf, n)
    mean = (weight * products).sum() / weight.sum()
    error = (weight * (products - mean)).square().sum().sqrt() / weight.sum()
    # below zero the halves contradict each other: errors of the scales that they share
    return Share(float(mean), max(float(error), -float(mean)), n)
