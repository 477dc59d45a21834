"""Likelihood of a measurement given what the model expects of it: what every law can be asked.

The sums over rows, the outputs, held-out scores and starts ask only this. A new law is one file
with a subclass of :class:`IndependentLikelihood` and its line in
:mod:`braggflux.merge.likelihood.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.measurement import Measurement
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.likelihood.error_model import ErrorModel
from braggflux.merge.likelihood.expectation import Expectation, sum_clusters
from braggflux.merge.scale.base import Scale


class ObservationLikelihood(nn.Module, ABC):
    """Law of the measurements."""

    @abstractmethod
    def variance(self, measured: Measurement, mean: Tensor, scale: Scale) -> Tensor:
        """D, the variance of a measurement about its expected intensity, (N,)."""

    @abstractmethod
    def forward(self, batch: Batch, expected: Expectation) -> Tensor:
        """Bound of the expected log-density of each cluster, (C,); of each observation without."""

    @abstractmethod
    def weight(self, batch: Batch, expected: Expectation) -> Tensor:
        """Precision of each observation times D if it is the spot, (N,): small for outliers.

        That of least squares with the same slope, without gradients.
        """

    def share_of_spots(self, batch: Batch, expected: Expectation) -> Tensor:
        """Probability of each observation to be its own spot, (N,)."""
        return torch.ones_like(expected.mean)

    def expectation(
        self,
        measured: Measurement,
        mean: Tensor,
        spread: Tensor,
        k: Tensor,
        scale: Scale,
        usual: Tensor,
    ) -> Expectation:
        """Complete what is expected with what this law needs to know beside it.

        Parameters
        ----------
        measured : Measurement
        mean, spread, k : Tensor, (N,)
            As in :class:`Expectation`.
        scale : Scale
            With the errors that depend on the place.
        usual : Tensor, (N,)
            Intensity that is usual at that resolution and scale.
        """
        return Expectation(mean, spread, self.variance(measured, mean, scale), k)

    @property
    def error_parameters(self) -> dict[str, float]:
        """Values for the log."""
        return {}


class IndependentLikelihood(ObservationLikelihood):
    """A law with the error model, whose observations are independent.

    Subclasses give the density of one observation and its weight.

    Parameters
    ----------
    error : ErrorModel
    """

    def __init__(self, error: ErrorModel) -> None:
        super().__init__()
        self.error = error

    @classmethod
    def build(cls, table: ObservationTable, config: MergeConfig) -> Self:
        """Make the law for a table."""
        return cls(ErrorModel.build(table, config))

    @abstractmethod
    def log_density(self, batch: Batch, expected: Expectation) -> Tensor:
        """Bound of the expected log-density of each observation, (N,)."""

    def variance(self, measured: Measurement, mean: Tensor, scale: Scale) -> Tensor:
        """D of the error model, (N,)."""
        return self.error(measured.variance(mean), mean, scale.relative_error)

    def forward(self, batch: Batch, expected: Expectation) -> Tensor:
        """Sum the log-densities of each cluster, (C,); those of the observations without."""
        if expected.shared is not None:
            expected = replace(expected, variance=expected.variance + expected.shared**2)
        return sum_clusters(self.log_density(batch, expected), batch.cluster)

    @property
    def error_parameters(self) -> dict[str, float]:
        """Those of the error model."""
        return self.error.values
