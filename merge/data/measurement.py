r"""Measurements of an intensity: a number with its error, or the photons themselves.

A measurement says how far it lies from an expected intensity m: half of its *deviance*, by which
its log-likelihood l falls short of the maximum there. Of a number with an error it is
((I - m) / sigma)^2. Photons in a box say l(m) = a log(m + beta) - t m (docs/theory.md, section 2):
the deviance is 2 (l(I) - l(m)), the variance V(m) = (m + beta) / t is that of the *expected*
count, and as a density of the observed intensity I = a / t - beta (Stirling's form, section 4
there) the normalisation takes V(I). Weights from the variance of the *observed* count would
believe those observations most that came out too low.

An error model widens V(m) to D. Then

    log p(I | m) = -1/2 (deviance V(m) / D + log(2 pi D c)),    c = V(I) / V(m), for numbers 1,

and Student's t takes the widened deviance in place of z^2. Under q the mean of the deviance is
taken to second order, with the curvature of l: a / (m + beta)^2, for numbers 1 / sigma^2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.records import TensorRecord
from braggflux.merge.io.observations import PHOTON_VARIANCE, UnmergedData

Array = NDArray[np.float64]

_SERIES_BELOW = 1e-3  # of delta, where the root of the deviance has no digits


class Comparison(NamedTuple):
    """Measured against expected, in units of intensity, (N,) each.

    ``square`` is the mean of deviance times V(m) under q, ``residual`` the root of deviance times
    V(m) at the mean, with the sign of I - m: of numbers (I - m)^2 + spread, and I - m.
    """

    residual: Tensor
    square: Tensor


class Measurement(TensorRecord, ABC):
    """Measured intensities, and how far they lie from expected ones, (N,)."""

    @property
    @abstractmethod
    def mode(self) -> Tensor:
        """Maximum-likelihood intensity I, (N,)."""

    @property
    @abstractmethod
    def observed_variance(self) -> Tensor:
        """V(I), (N,)."""

    @abstractmethod
    def variance(self, intensity: Tensor) -> Tensor:
        """V: variance of :attr:`mode` when the true intensity is ``intensity``, (N,)."""

    @abstractmethod
    def compare(self, mean: Tensor, spread: Tensor) -> Comparison:
        """Compare with intensities of the given mean and variance under q, (N,) each."""

    @abstractmethod
    def density_variance(self, mean: Tensor, variance: Tensor) -> Tensor:
        """D c of the density's normalisation, (N,), from the mean and D."""

    @property
    def background_sigma(self) -> Tensor:
        """Standard deviation of an observation that has no intensity of its own, (N,)."""
        return self.variance(torch.zeros_like(self.mode)).sqrt()


@dataclass(frozen=True)
class GaussianMeasurement(Measurement):
    """An intensity and its standard deviation, (N,) each."""

    intensity: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, likelihood: ShiftedPoisson, unit_intensity: float) -> GaussianMeasurement:
        """Take a likelihood of photons for a Normal law, with the variance of the observed count.

        This is what conventional programs hand on: an ablation. A low count of a weak spot claims
        a smaller sigma than a high one, and means weighted so lie low.
        """
        return cls(
            likelihood.mode.double() / unit_intensity,
            likelihood.observed_variance.double().sqrt() / unit_intensity,
        )

    @property
    def mode(self) -> Tensor:
        """The intensity."""
        return self.intensity

    @property
    def observed_variance(self) -> Tensor:
        """Square of sigma."""
        return self.sigma**2

    def variance(self, intensity: Tensor) -> Tensor:
        """Square of sigma, whatever the intensity."""
        return self.sigma**2

    def compare(self, mean: Tensor, spread: Tensor) -> Comparison:
        """Residual and its mean square."""
        residual = self.intensity - mean
        return Comparison(residual, residual**2 + spread)

    def density_variance(self, mean: Tensor, variance: Tensor) -> Tensor:
        """D: that of a Normal."""
        return variance


@dataclass(frozen=True)
class PhotonCounts(ShiftedPoisson, Measurement):
    """The integrator's likelihood of the photons, in the units of a table of observations.

    Gradients of a, beta and t pass through.
    """

    @classmethod
    def of(cls, likelihood: ShiftedPoisson, unit_intensity: float) -> PhotonCounts:
        """Convert a likelihood of photons, with its graph; intensities in ``unit_intensity``."""
        return cls(
            likelihood.effective_counts.double(),
            likelihood.effective_background.double() / unit_intensity,
            likelihood.exposure.double() * unit_intensity,
        )

    def compare(self, mean: Tensor, spread: Tensor) -> Comparison:
        """Deviance of the shifted Poisson and its signed root, times V(m)."""
        shifted = mean + self.effective_background
        variance = self.variance(mean)
        at_mean = 2 * variance * (self.log_maximum - self.log_prob(mean))
        curvature = self.effective_counts / shifted**2
        difference = self.mode - mean
        delta = difference / shifted
        is_far = delta.abs() > _SERIES_BELOW
        root = torch.where(is_far, at_mean, 1.0).clamp_min(1e-30).sqrt()
        near = difference * (1 - delta / 6)
        residual = torch.where(is_far, root * difference.sign(), near)
        return Comparison(residual, at_mean + variance * curvature * spread)

    def density_variance(self, mean: Tensor, variance: Tensor) -> Tensor:
        """D V(I) / V(m), (N,)."""
        return variance * self.observed_variance / self.variance(mean)


@dataclass(frozen=True)
class PartlyCounted(Measurement):
    """Files with photon counts beside files with numbers.

    Parameters
    ----------
    is_counted : Tensor, (N,) bool
    counts : PhotonCounts
        Where counted; any valid values elsewhere.
    numbers : GaussianMeasurement
        Of the others.
    """

    is_counted: Tensor
    counts: PhotonCounts
    numbers: GaussianMeasurement

    @property
    def mode(self) -> Tensor:
        """Maximum-likelihood intensity, (N,)."""
        return self._chosen(self.counts.mode, self.numbers.mode)

    @property
    def observed_variance(self) -> Tensor:
        """V(I), (N,)."""
        return self._chosen(self.counts.observed_variance, self.numbers.observed_variance)

    def variance(self, intensity: Tensor) -> Tensor:
        """V, (N,)."""
        return self._chosen(self.counts.variance(intensity), self.numbers.variance(intensity))

    def compare(self, mean: Tensor, spread: Tensor) -> Comparison:
        """Compare each with what it is."""
        counts, numbers = self.counts.compare(mean, spread), self.numbers.compare(mean, spread)
        return Comparison(*map(self._chosen, counts, numbers))

    def density_variance(self, mean: Tensor, variance: Tensor) -> Tensor:
        """D c, (N,)."""
        return self._chosen(
            self.counts.density_variance(mean, variance),
            self.numbers.density_variance(mean, variance),
        )

    def _chosen(self, counted: Tensor, number: Tensor) -> Tensor:
        return torch.where(self.is_counted, counted, number)


def measurement_of(intensity: Array, sigma: Array, photon_variance: Array | None) -> Measurement:
    """Build a measurement from columns of files, (N,) each.

    Parameters
    ----------
    intensity, sigma : (N,)
    photon_variance : (N,) or None
        1 / t, where sigma is sqrt(beta / t); 0 for observations that are no counts.
    """
    numbers = GaussianMeasurement(torch.as_tensor(intensity), torch.as_tensor(sigma))
    if photon_variance is None:
        return numbers
    is_counted = photon_variance > 0
    t = 1.0 / np.where(is_counted, photon_variance, 1.0)
    beta = sigma**2 * t
    # a box without a photon has exactly none, whatever the rounding
    a = np.maximum(t * (intensity + beta), 0.0)
    counts = PhotonCounts(*(torch.as_tensor(v) for v in (a, beta, t)))
    if is_counted.all():
        return counts
    return PartlyCounted(torch.as_tensor(is_counted), counts, numbers)


def observed_sigma(intensity: ArrayLike, sigma: ArrayLike, photon_variance: ArrayLike) -> Array:
    """Sigma from the observed count, at least that of one photon, (N,)."""
    share = np.asarray(photon_variance)
    variance = np.asarray(sigma) ** 2 + share * np.asarray(intensity)
    return np.sqrt(np.maximum(variance, share**2))


def counted_sigma(data: Sequence[UnmergedData], has_counts: bool) -> tuple[Array, Array | None]:
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
