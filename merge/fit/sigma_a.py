"""sigma_A of a model by resolution shell, from moments of the merged intensities.

As for the correlation of Bijvoet mates (:mod:`braggflux.merge.prior.mate_correlation`), nothing is
maximised over amplitudes that are free themselves: such a likelihood runs to perfect agreement.
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
from braggflux.merge.output.amplitudes import scaled_observations, weighted_mean
from braggflux.merge.prior.reference import Reference

logger = logging.getLogger(__name__)

#: Least reflections for an estimate.
MIN_REFLECTIONS = 30
#: Change of sigma_A^2 from shell to shell, standard deviation: models get worse gradually.
STEP = 0.1
#: Standard errors that sigma_A^2 must stand above zero to be believed at all.
N_ERRORS = 2.0
MAX_SIGMA_A2 = 0.998
N_ROUNDS = 20


@torch.no_grad()
def set_sigma_a(merger: Merger, table: ObservationTable) -> list[dict[str, float | None]]:
    """Choose sigma_A of the merger's model from the used observations and the present scales.

    See :func:`choose_sigma_a`, whose rows are returned.
    """
    scaled = scaled_observations(merger, table)
    mean, sigma = weighted_mean(scaled, len(merger.group), table.observations.is_used)
    unit = table.unit_intensity
    return set_sigma_a_from_means(merger, mean / unit, sigma / unit)


@torch.no_grad()
def set_sigma_a_from_means(
    merger: Merger, intensity: Tensor, sigma: Tensor
) -> list[dict[str, float | None]]:
    """As :func:`set_sigma_a`, from merged intensities in units of the table, (R,) each."""
    prior = merger.prior
    model, spread = prior.part(Reference), prior.spread()
    rows = choose_sigma_a(model, intensity, sigma, spread, merger.n_obs)
    shells = " ".join(f"{r['sigma_a']:.3f}" for r in rows)
    logger.info("sigma_A by shell, low to high resolution: %s", shells)
    return rows


@dataclass(frozen=True)
class SigmaA2:
    """Estimate of sigma_A^2 and its standard error, before it is judged."""

    value: float
    error: float
    n_reflections: int

    @property
    def believed(self) -> float:
        """The estimate, or 0 if below :data:`N_ERRORS` standard errors.

        The prior's variance 1 - sigma_A^2 is never taken for smaller than what is known of it.
        """
        if self.value < N_ERRORS * self.error or not math.isfinite(self.error):
            return 0.0
        return max(0.0, 1 - math.hypot(max(1 - self.value, 1 - MAX_SIGMA_A2), self.error))


@torch.no_grad()
def estimate_sigma_a2(
    z: Tensor,
    noise: Tensor,
    z_calc: Tensor,
    is_centric: Tensor,
    n_obs: Tensor | None = None,
) -> SigmaA2:
    """sigma_A^2 from the regression of measured on calculated normalised intensities.

    The mean of E^2 given E_calc^2 is (1 - sigma_A^2) + sigma_A^2 E_calc^2: intercept a and slope b
    give sigma_A^2 = b / (a + b) whatever the scale. Noise of the measurement is independent of the
    model: it enters the weights only, so that wrong sigmas cost precision and no bias, and nothing
    is maximised that could run to 1. Weights are the inverse variances

        noise^2 + c ((1 - s)^2 + 2 s (1 - s) E_calc^2),    c = 1 acentric, 2 centric, s = sigma_A^2

    of the present estimate: weak E_calc tell most of 1 - s. The noise is what is usual at this
    E_calc, see :func:`usual_variance`.

    Parameters
    ----------
    z, noise, z_calc : Tensor, (M,)
        Prior-free I / (epsilon Sigma), its standard deviation, and E_calc^2.
    is_centric : Tensor, (M,) bool
    n_obs : Tensor, (M,), optional
        Observations of each, on which the usual noise depends too.
    """
    n, s = len(z), 0.5
    if n < MIN_REFLECTIONS:
        return SigmaA2(0.0, math.inf, n)
    c = torch.where(is_centric, 2.0, 1.0)
    x = torch.stack([torch.ones_like(z_calc), z_calc], -1)
    usual = usual_variance(noise, z_calc, n_obs)
    for _ in range(N_ROUNDS):
        variance = c * ((1 - s) ** 2 + 2 * s * (1 - s) * z_calc) + usual
        covariance = torch.linalg.inv((x / variance[:, None]).T @ x)
        a, b = (covariance @ (x.T @ (z / variance))).tolist()
        s = min(max(b / (a + b), 0.0), 0.99) if a + b > 0 else 0.0
    if a + b <= 0:
        return SigmaA2(0.0, math.inf, n)
    chi2 = float((((z - x @ x.new_tensor([a, b])) ** 2) / variance).sum()) / (n - 2)
    slope = x.new_tensor([-b, a]) / (a + b) ** 2
    # Bijvoet mates share E_calc and nearly E: together they tell little more than one of them
    n_copies = n / len(torch.unique(z_calc.float()))
    error = float((slope @ covariance @ slope).sqrt()) * math.sqrt(max(chi2, 1.0) * n_copies)
    return SigmaA2(b / (a + b), error, n)


def usual_variance(noise: Tensor, z_calc: Tensor, n_obs: Tensor | None = None) -> Tensor:
    """Geometric mean of noise^2 given E_calc^2 and the number of observations, (M,).

    Where photons are counted, a mean that fell low by chance is taken for a precise one. Weighted
    by its own noise it would pull the intercept of the weak E_calc down, and sigma_A up to 1.

    Parameters
    ----------
    noise, z_calc : Tensor, (M,)
    n_obs : Tensor, (M,), optional
    """
    columns = [torch.ones_like(z_calc), z_calc]
    if n_obs is not None:
        columns.append(n_obs.to(z_calc).clamp_min(1).log())
    x = torch.stack(columns, -1)
    ridge = 1e-9 * len(x) * torch.eye(len(columns), dtype=x.dtype, device=x.device)
    log_variance = noise.square().clamp_min(1e-12).log()
    return (x @ torch.linalg.solve(x.T @ x + ridge, x.T @ log_variance)).exp()


@torch.no_grad()
def choose_sigma_a(
    reference: Reference,
    intensity: Tensor,
    sigma: Tensor,
    spread: Tensor,
    n_obs: Tensor | None = None,
) -> list[dict[str, float | None]]:
    """Set sigma_A^2 of each shell from merged intensities; returns what was found.

    Parameters
    ----------
    reference : Reference
        With a model.
    intensity, sigma : Tensor, (R,)
        Inverse-variance means free of any prior; NaN where not observed.
    spread : Tensor, (R,)
        epsilon Sigma on the same scale.
    n_obs : Tensor, (R,), optional
        Observations of each.
    """
    usable = torch.isfinite(intensity) & torch.isfinite(sigma) & ~reference.e_calc.isnan()

    def estimate(chosen: Tensor) -> SigmaA2:
        return estimate_sigma_a2(
            intensity[chosen] / spread[chosen],
            sigma[chosen] / spread[chosen],
            reference.e_calc[chosen] ** 2,
            reference.is_centric[chosen],
            None if n_obs is None else n_obs[chosen],
        )

    n_shells = len(reference.sigma_a2)
    found = [estimate(usable & (reference.shell == k)) for k in range(n_shells)]
    for k, smoothed in enumerate(smooth(found)):
        reference.sigma_a2[k] = smoothed.believed
    return [
        {
            "shell": k,
            "n_reflections": own.n_reflections,
            "sigma_a2": own.value if math.isfinite(own.error) else None,
            "error": own.error if math.isfinite(own.error) else None,
            "sigma_a": math.sqrt(float(reference.sigma_a2[k])),
        }
        for k, own in enumerate(found)
    ]


def smooth(shells: Sequence[SigmaA2]) -> list[SigmaA2]:
    """Best values of a random walk of step :data:`STEP` through the shells' estimates.

    A poor estimate leans on its neighbours, a good one stays.
    """
    weight = torch.tensor([s.error**-2 for s in shells], dtype=torch.float64)
    if not (weight > 0).any():
        return list(shells)
    value = torch.tensor([s.value for s in shells], dtype=torch.float64)
    step = torch.eye(len(shells), dtype=torch.float64).diff(dim=0)
    covariance = torch.linalg.inv(weight.diag() + step.T @ step / STEP**2)
    value, error = covariance @ (weight * value), covariance.diag().sqrt()
    pairs = zip(shells, value.tolist(), error.tolist(), strict=True)
    return [SigmaA2(v, e, s.n_reflections) for s, v, e in pairs]
