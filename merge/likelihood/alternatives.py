"""Alternatives to the spot: blank places and stray reflections.

Where the scale model gives log-odds that a spot is *blank* (in a shadow, on a dead module:
predicted and integrated, but without a photon of its own), the density is a mixture with
Normal(0, V(0)), and with intensities that are usual at that resolution and scale, for *stray*
spots: harmonics outside the range, overlaps, wrong indices. The spots of a cluster are at one
place, and blank or stray together.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from braggflux.merge.data.measurement import Measurement
from braggflux.merge.data.table import Batch
from braggflux.merge.likelihood.base import ObservationLikelihood
from braggflux.merge.likelihood.error_model import error_parameter
from braggflux.merge.likelihood.expectation import Alternatives, Expectation
from braggflux.merge.scale.base import Scale

STRAY_LOG_ODDS = -6.0  # before anything is learned


class WithAlternatives(ObservationLikelihood):
    """Mixture of a law of spots with blank and stray ones.

    Parameters
    ----------
    spots : ObservationLikelihood
    """

    def __init__(self, spots: ObservationLikelihood) -> None:
        super().__init__()
        self.spots = spots
        self.stray_log_odds = error_parameter(STRAY_LOG_ODDS, True)

    def variance(self, measured: Measurement, mean: Tensor, scale: Scale) -> Tensor:
        """D of spots, (N,)."""
        return self.spots.variance(measured, mean, scale)

    def expectation(
        self,
        measured: Measurement,
        mean: Tensor,
        spread: Tensor,
        k: Tensor,
        scale: Scale,
        usual: Tensor,
    ) -> Expectation:
        """Add the alternatives, where the scale model gives their odds."""
        expected = self.spots.expectation(measured, mean, spread, k, scale, usual)
        sigma = measured.background_sigma
        others = Alternatives.of(measured.mode, sigma, scale.blank_log_odds, usual)
        return replace(expected, alternatives=others)

    def forward(self, batch: Batch, expected: Expectation) -> Tensor:
        """Bound of the expected log-density of the mixture, (C,)."""
        density = self.spots(batch, expected)
        others = expected.alternatives
        if others is None:
            return density
        mixture = torch.logaddexp(density, self._of_others(others, batch.cluster))
        log_odds = others.by_cluster(batch.cluster)[1]
        return mixture - torch.log1p(log_odds.exp() + self.stray_log_odds.exp())

    def weight(self, batch: Batch, expected: Expectation) -> Tensor:
        """Precision of each observation times D if it is the spot, (N,)."""
        return self.spots.weight(batch, expected)

    @torch.no_grad()
    def share_of_spots(self, batch: Batch, expected: Expectation) -> Tensor:
        """Probability of each observation to be its own spot, (N,)."""
        others = expected.alternatives
        if others is None:
            return torch.ones_like(expected.mean)
        density = self.spots(batch, expected)
        share = torch.sigmoid(density - self._of_others(others, batch.cluster))
        return share if batch.cluster is None else share[batch.cluster]

    @property
    def error_parameters(self) -> dict[str, float]:
        """Those of the spots."""
        return self.spots.error_parameters

    def _of_others(self, others: Alternatives, cluster: Tensor | None) -> Tensor:
        """Log-density of all that is no spot, relative to odds of 1 for the spot, (C,)."""
        blank, log_odds, stray = others.by_cluster(cluster)
        return torch.logaddexp(blank + log_odds, stray + self.stray_log_odds)
