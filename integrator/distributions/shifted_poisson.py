"""Shifted-Poisson likelihood of an intensity: what the integrator hands to the merge.

With profile ``rho`` and background ``b`` known, the pixels say of the intensity ``J``

    log L(J) = sum_p n_p log(J rho_p + b_p) - J sum_p rho_p + const.

Around a reference intensity ``J0`` this is replaced by

    l(J) = a log(J + beta) - t J,

where ``t = sum_p rho_p`` over the recorded pixels, and ``beta`` and ``a`` match the expected
information and the score at ``J0``. With r_p = J0 rho_p + b_p,

    beta = t / sum_p(rho_p^2 / r_p) - J0,
    a    = (J0 + beta) sum_p n_p rho_p / r_p.

The form is exact where b/rho is constant over the spot. Its maximum ``a / t - beta`` is linear in
the counts, with weights that depend on ``J0`` only, so it is unbiased for *every* true J whatever
J0 was; J0 decides the efficiency alone (derivation: docs/theory.md, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.integrator.records import TensorRecord


@dataclass(frozen=True)
class ShiftedPoisson(TensorRecord):
    """Likelihood ``a log(J + beta) - t J`` of each observation.

    Parameters
    ----------
    effective_counts : Tensor, (B,)
        a [photons], >= 0.
    effective_background : Tensor, (B,)
        beta [photons, on the scale of J], > 0.
    exposure : Tensor, (B,)
        t in (0, 1].
    """

    effective_counts: Tensor
    effective_background: Tensor
    exposure: Tensor

    def log_prob(self, intensity: Tensor) -> Tensor:
        """Log-likelihood of J = ``intensity`` [photons], up to a constant, (B,)."""
        return (
            torch.xlogy(self.effective_counts, intensity + self.effective_background)
            - self.exposure * intensity
        )

    @property
    def mode(self) -> Tensor:
        """Maximum-likelihood intensity, (B,) [photons]; as low as ``-beta``."""
        return self.effective_counts / self.exposure - self.effective_background

    @property
    def log_maximum(self) -> Tensor:
        """Log-likelihood at :attr:`mode`, (B,)."""
        a, t = self.effective_counts, self.exposure
        # the clamp leaves 0 log 0 = 0 and gives it a gradient: boxes without a photon exist
        return torch.xlogy(a, a.clamp_min(1e-30) / t) - a + t * self.effective_background

    @property
    def observed_variance(self) -> Tensor:
        """Inverse curvature at the mode, (B,) [photons^2]; that of one photon at the least."""
        return self.effective_counts.clamp_min(1.0) / self.exposure**2

    def variance(self, intensity: Tensor) -> Tensor:
        """Variance of :attr:`mode` when the true intensity is ``intensity``, (B,) [photons^2]."""
        return (intensity.clamp_min(0.0) + self.effective_background) / self.exposure

    def tempered(self, information_fraction: Tensor) -> ShiftedPoisson:
        """Keep the maximum, and divide the variance by ``information_fraction`` in (0, 1].

        Used for what the known-profile likelihood leaves out: the share of the information on J
        that is lost because background and profile are estimated from the same pixels.
        """
        return ShiftedPoisson(
            self.effective_counts * information_fraction,
            self.effective_background,
            self.exposure * information_fraction,
        )


def shifted_poisson_from_pixels(
    counts: Tensor, profile: Tensor, background: Tensor, is_valid: Tensor, reference: Tensor
) -> ShiftedPoisson:
    """Match the pixel likelihood of each observation at its reference intensity.

    Parameters
    ----------
    counts, profile, background : Tensor, (B, P)
        Photons, profile fraction, background photons of each voxel.
    is_valid : Tensor, (B, P) bool
    reference : Tensor, (B,)
        J0 >= 0 [photons].

    Returns
    -------
    ShiftedPoisson
        Differentiable in ``profile`` and ``background``.
    """
    rho = torch.where(is_valid, profile, 0.0)
    rate = reference[:, None] * profile + background  # (B, P)
    weight = rho / rate
    exposure = rho.sum(-1)
    information = (rho * weight).sum(-1)
    # 1e-12: a box without a recorded signal pixel has no information; it is flagged and not used.
    shifted = exposure / information.clamp_min(1e-12)  # J0 + beta
    effective_background = (shifted - reference).clamp_min(1e-6)
    return ShiftedPoisson(
        (counts * weight).sum(-1) * shifted, effective_background, exposure.clamp_min(1e-6)
    )
