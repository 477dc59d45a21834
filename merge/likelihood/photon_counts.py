r"""Photon-count likelihood of the integrator, in the closed form of the intensity merge.

A table of the integrator says of each observation l(J) = a log(J + beta) - t J (docs/theory.md,
section 2). With I = a/t - beta, its maximum, V(m) = (m + beta) / t, its variance when m is right,
and delta = (I - m) / (m + beta), the deviance is

    2 (l(I) - l(m)) = (I - m)^2 / V(m) * h(delta),
    h(delta) = 2 ((1 + delta) log(1 + delta) - delta) / delta^2 = 1 - delta/3 + delta^2/6 - ...

so that the Normal law needs two changes to be the shifted Poisson: the variance is that of the
*expected* count, and h holds the skew. As a density of I (Stirling's form, section 4 there) the
normalisation takes V(I). A relative error widens V to the error model's D, and Student's t takes
the widened deviance in place of z^2. Under q the mean of the deviance is taken to second order,

    E_q[deviance] = deviance(m) + Var_q[K F^2] (1 + delta) / V(m).

Averages that weigh with the variance of the *observed* count instead believe those observations
most that came out too low.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from braggflux.merge.io.observations import UnmergedData

#: Metadata column of 1 / t: variance that every unit of expected intensity adds. The sigma of such
#: data is that of the background alone, sqrt(beta / t).
PHOTON_VARIANCE = "photon_variance"
_SERIES_BELOW = 0.02


def observed_sigma(
    intensity: ArrayLike, sigma: ArrayLike, photon_variance: ArrayLike
) -> NDArray[np.float64]:
    """Sigma from the observed count, at least that of one photon, (N,)."""
    share = np.asarray(photon_variance)
    variance = np.asarray(sigma) ** 2 + share * np.asarray(intensity)
    return np.sqrt(np.maximum(variance, share**2))


def counted_sigma(
    data: Sequence[UnmergedData], has_counts: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Sigma and 1 / t of all datasets, (N,) each; no 1 / t where none has it, or none is wanted.

    Without ``has_counts`` the sigma of counts is that of the observed one.
    """
    sigma = np.concatenate([d.sigma for d in data])
    if not any(PHOTON_VARIANCE in d.metadata for d in data):
        return sigma, None
    share = np.concatenate([d.metadata.get(PHOTON_VARIANCE, np.zeros(len(d))) for d in data])
    if has_counts:
        return sigma, share
    return observed_sigma(np.concatenate([d.intensity for d in data]), sigma, share), None


def expected_sigma(mean: Tensor, sigma: Tensor, photon_variance: Tensor) -> Tensor:
    """Return sqrt(V(m)), (N,)."""
    return (sigma**2 + photon_variance * mean.clamp_min(0.0)).sqrt()


def as_deviance(
    intensity: Tensor,
    mean: Tensor,
    spread: Tensor,
    variance: Tensor,
    sigma: Tensor,
    photon_variance: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give residual, spread and variance with which a Normal's formula gives the shifted Poisson.

    Parameters
    ----------
    intensity, mean : Tensor, (N,)
        I and m = K <F^2>.
    spread, variance : Tensor, (N,)
        Var_q[K F^2], and D, the error model's variance with V(m) in place of sigma^2.
    sigma : Tensor, (N,)
        sqrt(beta / t).
    photon_variance : Tensor, (N,)
        1 / t; 0 for observations that are no counts, which stay as they are.
    """
    at_mean = sigma**2 + photon_variance * mean.clamp_min(0.0)
    at_maximum = torch.maximum(sigma**2 + photon_variance * intensity, photon_variance**2)
    residual = intensity - mean
    delta = (photon_variance * residual / at_mean).clamp_min(-1.0)
    ratio = at_maximum / at_mean
    return (
        residual * (skew_factor(delta) * ratio).sqrt(),
        spread * (1.0 + delta) * ratio,
        variance * ratio,
    )


def skew_factor(delta: Tensor) -> Tensor:
    """Return h(delta) for delta >= -1: 2 at -1, 1 at 0, falling to 0."""
    is_small = delta.abs() < _SERIES_BELOW
    # without a photon delta is -1 whatever m: the clamp has no gradient there, as it should
    away = torch.where(is_small, 1.0, delta.clamp_min(-1.0 + 1e-12))
    closed = 2 * (torch.xlogy(1 + away, 1 + away) - away) / away**2
    near = torch.where(is_small, delta, 0.0)
    series = 1 - near * (1 / 3 - near * (1 / 6 - near * (1 / 10 - near / 15)))
    return torch.where(is_small, series, closed)
