r"""Likelihood of an expected intensity ``mu = K F^2``, with errors that are not Poisson.

    L(mu) = (1 - w) \int dx Normal(x; 0, s^2) l(mu e^x) + w Outlier(mu)

``l`` is the photon-count likelihood, normalised to a density of the observed intensity. The
integral over the relative error ``x = log u`` (flicker, non-isomorphism; nu = 1 / s^2) is taken by
Laplace's method: the integrand is log-concave, and Gaussian to high order for any ``s`` of a few
per cent. The outlier part is a broad Student-t on the same residual, so that a zinger or an ice
spot loses its say instead of pulling the mean.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson

LOG_2PI = math.log(2 * math.pi)


class ObservationLikelihood(nn.Module, ABC):
    """Mixture of a good part and a broad outlier part, with what both have to learn.

    What is handed over of each observation, the whole photon-count likelihood or its maximum and
    variance alone, is the subclass's matter.

    Parameters
    ----------
    relative_error, outlier_fraction : float
        Starting values.
    """

    outlier_scale = 6.0  # widths of the good part; beyond it the tail takes over
    outlier_dof = 2.0

    def __init__(self, relative_error: float, outlier_fraction: float) -> None:
        super().__init__()
        self.log_error = nn.Parameter(torch.tensor(math.log(relative_error), dtype=torch.float64))
        self.logit_outlier = nn.Parameter(
            torch.logit(torch.tensor(outlier_fraction, dtype=torch.float64))
        )

    @property
    def relative_error(self) -> Tensor:
        """Standard deviation s of the log of the multiplicative error."""
        return self.log_error.clamp(-7.0, 0.0).exp()

    def forward(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Log-density of the observed intensity given ``expected`` (..., B) [photons]."""
        good, outlier = self.components(likelihood, expected)
        w = self.logit_outlier.clamp(-12.0, 0.0)
        return torch.logaddexp(
            good + nn.functional.logsigmoid(-w), outlier + nn.functional.logsigmoid(w)
        )

    def responsibility(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Probability that an observation is not an outlier, (..., B)."""
        good, outlier = self.components(likelihood, expected)
        return torch.sigmoid(good - outlier - self.logit_outlier.clamp(-12.0, 0.0))

    def precision(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Weight of the residual in least squares with the same slope, (..., B) [1/photons^2].

        That of the good part by its probability, and of the Student-t part by the rest.
        """
        good = self.responsibility(likelihood, expected)
        variance = self.variance(likelihood, expected)
        z2 = (likelihood.mode - expected) ** 2 / variance / self.outlier_scale**2
        tail = (self.outlier_dof + 1) / (self.outlier_dof + z2) / self.outlier_scale**2
        return (good + (1 - good) * tail) / variance

    @abstractmethod
    def variance(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Variance of the observed intensity when ``expected`` is right, (..., B)."""

    @abstractmethod
    def good(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Log-density of the observed intensity of a good observation, (..., B)."""

    def components(self, likelihood: ShiftedPoisson, expected: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities of the good and the outlier part, each (..., B)."""
        dof = self.outlier_dof
        scale2 = self.outlier_scale**2 * self.variance(likelihood, expected)
        z2 = (likelihood.mode - expected) ** 2 / scale2
        norm = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - 0.5 * math.log(math.pi * dof)
        outlier = norm - 0.5 * scale2.log() - 0.5 * (dof + 1) * torch.log1p(z2 / dof)
        return self.good(likelihood, expected), outlier


class PhotonCountLikelihood(ObservationLikelihood):
    """The whole photon-count likelihood: its variance is that of the *expected* counts."""

    def variance(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Variance of the observed intensity when ``expected`` is right, (..., B)."""
        return likelihood.variance(expected) + (self.relative_error * expected) ** 2

    def good(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Log-density of the observed intensity of a good observation, (..., B)."""
        return (
            self._marginal(likelihood, expected)
            - likelihood.log_maximum
            - 0.5 * (LOG_2PI + likelihood.observed_variance.log())
        )

    def _marginal(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Laplace integral of the photon-count likelihood over the relative error."""
        a, t = likelihood.effective_counts, likelihood.exposure
        beta = likelihood.effective_background
        variance = self.relative_error**2

        def step(x: Tensor) -> Tensor:
            mean = expected * x.exp()
            share = mean / (mean + beta)
            slope = a * share - t * mean - x / variance
            return (x + slope / (t * mean * share + 1 / variance)).clamp(-3.0, 3.0)

        with torch.no_grad():
            x = step(step(torch.zeros_like(expected)))
        # the last step carries the mode's own derivative, which the curvature needs
        x = step(x)
        mean = expected * x.exp()
        curvature = t * mean**2 / (mean + beta)
        return (
            likelihood.log_prob(mean)
            - 0.5 * x**2 / variance
            - 0.5 * torch.log1p(variance * curvature)
        )


class GaussianLikelihood(ObservationLikelihood):
    """The conventional hand-over, as an ablation: an intensity and its sigma, nothing else.

    sigma^2 is the variance that an ordinary program would hand on, that of the *observed* counts
    (of one photon at the least). A low count of a weak spot then claims a smaller sigma than a
    high one, and means weighted so lie low; the photon-count likelihood does not have this bias.
    """

    def variance(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Variance handed over, and that of the relative error, (..., B)."""
        return likelihood.observed_variance + (self.relative_error * expected) ** 2

    def good(self, likelihood: ShiftedPoisson, expected: Tensor) -> Tensor:
        """Log of Normal(I; mu, sigma^2 + s^2 mu^2), (..., B)."""
        variance = self.variance(likelihood, expected)
        residual = likelihood.mode - expected
        return -0.5 * (LOG_2PI + variance.log() + residual**2 / variance)


def observation_likelihood(
    handover: str, relative_error: float, outlier_fraction: float
) -> ObservationLikelihood:
    """Likelihood by the name of what is handed over, see ``MergeConfig.handover``."""
    kinds = {"photon-counts": PhotonCountLikelihood, "gaussian": GaussianLikelihood}
    return kinds[handover](relative_error, outlier_fraction)
