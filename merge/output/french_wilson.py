"""Amplitudes from intensities with Wilson's prior, by quadrature.

French & Wilson (1978), Acta Cryst. A34, 517; or, in Wilson's place, Rice's law or the folded
normal about an amplitude that a model gives (:mod:`braggflux.merge.prior.reference`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

N_NODES = 256
ROWS_AT_A_TIME = 1024  # of the quadrature
N_SIGMA = 7.0
LEAST_LOG = 25.0  # below the maximum of the log-density: no mass


def french_wilson(
    intensity: Tensor,
    sigma: Tensor,
    expected: Tensor,
    is_centric: Tensor,
    model: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of F given an intensity and its sigma.

    Parameters
    ----------
    intensity, sigma, expected : Tensor, (R,)
        Measured intensity, its standard deviation, and epsilon Sigma of Wilson's prior.
    is_centric : Tensor, (R,) bool
    model : tuple of Tensor, (R,) each, optional
        Centre D F_calc and variance S of the prior; NaN for Wilson's.

    Returns
    -------
    mean, standard_deviation : Tensor, (R,)
    """
    given = (intensity, sigma, expected, is_centric, *(model or ()))
    # Made before the first part: small results among freed large ones would break up the heap.
    found = torch.empty(2, len(intensity), dtype=expected.dtype, device=expected.device)
    parts = zip(*(x.split(ROWS_AT_A_TIME) for x in given), strict=True)
    for part, into in zip(parts, found.split(ROWS_AT_A_TIME, dim=1), strict=True):
        into[0], into[1] = _french_wilson(*part)
    return found[0], found[1]


def _french_wilson(
    intensity: Tensor, sigma: Tensor, expected: Tensor, is_centric: Tensor, *model: Tensor
) -> tuple[Tensor, Tensor]:
    """Posterior of some rows, by quadrature."""
    # an acentric exp(-I / E) prior moves a Gaussian by -sigma^2 / E, and spreads no wider
    slope = torch.where(is_centric, 0.5, 1.0).to(expected.dtype) / expected
    centre = intensity - sigma**2 * slope
    upper = (centre.clamp_min(0.0) + N_SIGMA * sigma).sqrt()
    # far below zero the posterior decays as exp(-I |centre| / sigma^2): look at that range only
    decay = N_SIGMA**2 * sigma**2 / centre.abs().clamp_min(1e-30)
    upper = torch.where(centre < -N_SIGMA * sigma, torch.minimum(upper, decay.sqrt()), upper)
    lower = (centre - N_SIGMA * sigma).clamp_min(0.0).sqrt()

    def log_density(f: Tensor) -> Tensor:
        log_p = -0.5 * ((f**2 - centre[:, None]) / sigma[:, None]) ** 2
        log_p = log_p + torch.where(is_centric[:, None], 0.0, 1.0) * f.log()
        return log_p + over_wilson(f, expected, is_centric, *model) if model else log_p

    if model:
        lower, upper = _where_the_mass_is(log_density, lower, upper, *model)
    f = _nodes(lower, upper)
    p = torch.softmax(log_density(f), -1)
    mean = (p * f).sum(-1)
    return mean, (p * (f - mean[:, None]) ** 2).sum(-1).sqrt()


def _nodes(lower: Tensor, upper: Tensor) -> Tensor:
    """Middles of equal parts of each row's range, (R, Q)."""
    share = (torch.arange(N_NODES, dtype=lower.dtype, device=lower.device) + 0.5) / N_NODES
    return lower[:, None] + (upper - lower)[:, None] * share


def _where_the_mass_is(
    log_density: Callable[[Tensor], Tensor],
    lower: Tensor,
    upper: Tensor,
    centre: Tensor,
    variance: Tensor,
) -> tuple[Tensor, Tensor]:
    """Range of the posterior, (R,) each: data and model may contradict each other.

    ``lower`` and ``upper`` are the range that the data allow; ``centre`` and ``variance`` the
    model's, NaN for none.
    """
    width = N_SIGMA * variance.sqrt()
    lower = torch.fmin(lower, (centre - width).clamp_min(0.0))
    upper = torch.fmax(upper, centre + width)
    f, step = _nodes(lower, upper), (upper - lower) / N_NODES
    log_p = log_density(f)
    has_mass = log_p > log_p.amax(-1, keepdim=True) - LEAST_LOG
    first = torch.where(has_mass, f, torch.inf).amin(-1)
    last = torch.where(has_mass, f, -torch.inf).amax(-1)
    return (first - step).clamp_min(0.0), last + step


def over_wilson(
    f: Tensor, expected: Tensor, is_centric: Tensor, centre: Tensor, variance: Tensor
) -> Tensor:
    """Log of the prior about a model over Wilson's, (R, Q), up to a constant; 0 where NaN."""
    stiffness = torch.where(is_centric, 0.5, 1.0).to(expected.dtype)[:, None]
    x = 2 * stiffness * f * (centre / variance)[:, None]
    rice = torch.special.i0e(x).log() + x
    folded = x + torch.log1p(torch.exp(-2 * x))
    square = stiffness * f**2 * (1 / variance - 1 / expected)[:, None]
    return torch.where(is_centric[:, None], folded, rice).sub(square).nan_to_num(0.0)
