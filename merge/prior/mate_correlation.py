"""Correlation of relatives: 1 - r^2 by shell, from half sets that share no observation.

The mean product of two independent estimates of the same normalised difference

    delta = (I+ - I-) / (2 F sqrt(epsilon Sigma))

is free of noise; under the double-Wilson prior it is (1 - r^2) / 2. Nothing is maximised, so r
cannot run to 1 as it does when CC1/2, CCanom or the ELBO choose it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

N_SPLITS = 4


def random_halves(
    unit: Tensor, generator: torch.Generator, n_splits: int = N_SPLITS
) -> Iterator[Tensor]:
    """Half, 0 or 1, of each observation, (N,), drawn ``n_splits`` times.

    Parameters
    ----------
    unit : Tensor, (N,) int64
        Number of what falls into a half as a whole: an image, or the observation itself.
    generator : torch.Generator
    n_splits : int
    """
    n_units = int(unit.max()) + 1 if len(unit) else 0
    for _ in range(n_splits):
        yield torch.randint(0, 2, (n_units,), generator=generator).to(unit.device)[unit]


def half_set_covariance(
    row: Tensor,
    intensity: Tensor,
    weight: Tensor,
    plus_row: Tensor,
    minus_row: Tensor,
    norm: Tensor,
    half: Tensor,
) -> tuple[Tensor, Tensor]:
    """Product of half-set Bijvoet differences of each group, and which groups have one.

    Parameters
    ----------
    row, intensity, weight : Tensor, (N,)
        Unique reflection, scaled intensity and inverse variance of each observation.
    plus_row, minus_row, norm : Tensor, (P,)
        Rows of the mates and ``2 F sqrt(epsilon Sigma)``.
    half : Tensor, (N,)
        0 or 1, the half that each observation is in.

    Returns
    -------
    product, is_known : Tensor, (P,)
    """
    n_rows = int(max(plus_row.max(), minus_row.max(), row.max())) + 1
    sums = torch.zeros(2, n_rows, dtype=intensity.dtype, device=row.device)
    weights = torch.zeros_like(sums)
    for h in (0, 1):
        w = torch.where(half == h, weight, 0.0)
        sums[h].index_add_(0, row, w * intensity)
        weights[h].index_add_(0, row, w)
    mean = sums / weights.clamp_min(1e-30)
    difference = (mean[:, plus_row] - mean[:, minus_row]) / norm
    seen = (weights > 0).all(0)
    return difference.prod(0), seen[plus_row] & seen[minus_row]


def mean_half_set_covariance(
    row: Tensor,
    intensity: Tensor,
    weight: Tensor,
    plus_row: Tensor,
    minus_row: Tensor,
    norm: Tensor,
    halves: Iterable[Tensor],
) -> tuple[Tensor, Tensor]:
    """Mean of :func:`half_set_covariance` over several splits ``halves``; otherwise the same.

    Splits of the same observations are no independent data: averaged by group, the groups alone
    count for the standard error.
    """
    total = torch.zeros_like(norm)
    count = torch.zeros_like(norm)
    for half in halves:
        product, known = half_set_covariance(
            row, intensity, weight, plus_row, minus_row, norm, half
        )
        total += torch.where(known, product, 0.0)
        count += known
    return total / count.clamp_min(1), count > 0


def estimate_one_minus_r2(
    products: Tensor, shell: Tensor, n_shells: int, fallback: Tensor
) -> Tensor:
    """``1 - r^2`` of each shell, (n_shells,), from half-set products (P,) of its groups.

    A shell whose estimate is not three standard errors above zero takes the pooled value; where
    even that is not, ``fallback`` stays.
    """
    # winsorised: the product of two outliers must not set a shell
    limit = 50 * products.abs().median().clamp_min(1e-12)
    values = products.clamp(-limit, limit)
    pooled, pooled_error = _mean_and_error(values)
    result = fallback.clone()
    for s in range(n_shells):
        inside = values[shell == s]
        mean, error = _mean_and_error(inside)
        if len(inside) >= 50 and mean > 3 * error:
            result[s] = 2 * mean
        elif len(values) >= 50 and pooled > 3 * pooled_error:
            result[s] = 2 * pooled
    return result.clamp(1e-4, 0.5)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    if len(values) < 2:
        return 0.0, float("inf")
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
