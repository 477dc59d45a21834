"""Expected intensity of each observation, and the alternatives to its spot."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

STRAY_NORM = math.log(math.pi * math.sqrt(3.0) / 2)  # of Student's t, 3 degrees of freedom


@dataclass(frozen=True)
class Alternatives:
    """Densities of what may have been measured instead of the spot, (N,) each.

    Parameters
    ----------
    blank : Tensor
        Log-density of the intensity, were there no spot.
    blank_log_odds : Tensor
        Of being blank, before the intensity is known.
    stray : Tensor
        Log-density of the intensity, were it another reflection's.
    """

    blank: Tensor
    blank_log_odds: Tensor
    stray: Tensor

    @classmethod
    def of(
        cls, intensity: Tensor, sigma: Tensor, log_odds: Tensor | None, usual: Tensor
    ) -> Alternatives | None:
        """Log-densities if no spot, or another reflection, was measured; None without odds.

        Parameters
        ----------
        intensity, sigma : Tensor, (N,)
            ``sigma``: without any intensity.
        log_odds : Tensor, (N,), or None
            Of being blank.
        usual : Tensor, (N,)
            Intensity of other reflections there.
        """
        if log_odds is None:
            return None
        blank = -0.5 * (intensity / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
        width = (sigma**2 + usual**2).sqrt()
        # Student's t of 3 degrees of freedom: an intensity has a long tail
        stray = -2 * torch.log1p((intensity / width) ** 2 / 3) - width.log() - STRAY_NORM
        return cls(blank, log_odds, stray)

    def by_cluster(self, cluster: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the log-densities and average the log-odds of each cluster, (C,)."""
        if cluster is None:
            return self.blank, self.blank_log_odds, self.stray
        values = (self.blank, self.blank_log_odds, self.stray, torch.ones_like(self.stray))
        blank, odds, stray, count = (sum_clusters(v, cluster) for v in values)
        return blank, odds / count, stray


@dataclass(frozen=True)
class Expectation:
    """Intensity that the model expects of each observation, with its variances, (N,).

    Parameters
    ----------
    mean, spread : Tensor
        Mean m and variance of K F^2 under q(F).
    variance : Tensor
        D: that of the measurement about m.
    scale : Tensor
        K; with harmonics, ``mean`` over <F^2> of the first.
    common : Tensor or None
        Error s m that the observations of a cluster share; laws without one leave it out.
    alternatives : Alternatives or None
        What else may have been measured.
    shared : Tensor or None
        Deviation of a cluster's observations because the root of their amplitudes is uncertain:
        another error in common.
    """

    mean: Tensor
    spread: Tensor
    variance: Tensor
    scale: Tensor
    common: Tensor | None = None
    alternatives: Alternatives | None = None
    shared: Tensor | None = None

    @property
    def alone(self) -> Expectation:
        """Of each observation for itself: the error in common is a part of its variance."""
        if self.common is None:
            return self
        return replace(self, variance=self.variance + self.common**2)


def sum_clusters(values: Tensor, cluster: Tensor | None) -> Tensor:
    """Sum values, (N,), by cluster, (C,); ``cluster`` counts from 0 and does not decrease."""
    if cluster is None:
        return values
    total = torch.zeros(int(cluster[-1]) + 1, dtype=values.dtype, device=values.device)
    return total.index_add(0, cluster, values)
