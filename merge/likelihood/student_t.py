r"""Student's t and Normal laws in closed form under q(F).

    I_i ~ Student-t(m_i, D_i, dof) or Normal(m_i, D_i),    m_i = sum over harmonics of K F^2

Of photons, z^2 is the deviance of the counts (:mod:`braggflux.merge.data.measurement`). The
observations of a cluster have an error in common (:mod:`braggflux.merge.likelihood.common_error`).

Student's t is a Normal with a random precision. With its optimal Gamma posterior the expected
log-likelihood needs only the mean and the variance ``v_i`` of K F^2 under q,

    E log p >= log c - 1/2 log|D| - (dof + n) / 2 log(1 + E[z^2] / dof),

a lower bound of the ELBO, exact for the Normal: no sampling and no quadrature.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.measurement import Measurement
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.likelihood.base import IndependentLikelihood
from braggflux.merge.likelihood.common_error import CommonError, Misfit, correlated
from braggflux.merge.likelihood.error_model import ErrorModel, error_parameter
from braggflux.merge.likelihood.expectation import Expectation
from braggflux.merge.scale.base import Scale


class Normal(IndependentLikelihood):
    """Normal law.

    Parameters
    ----------
    error : ErrorModel
    common : CommonError
    """

    def __init__(self, error: ErrorModel, common: CommonError) -> None:
        super().__init__(error)
        self.common = common

    @classmethod
    def build(cls, table: ObservationTable, config: MergeConfig) -> Self:
        """Make the law for a table."""
        common = CommonError(table.has_clusters and config.error_model)
        return cls(ErrorModel.build(table, config), common)

    def expectation(
        self,
        measured: Measurement,
        mean: Tensor,
        spread: Tensor,
        k: Tensor,
        scale: Scale,
        usual: Tensor,
    ) -> Expectation:
        """Add the error in common."""
        expected = super().expectation(measured, mean, spread, k, scale, usual)
        return replace(expected, common=self.common(mean, scale.log_common))

    def forward(self, batch: Batch, expected: Expectation) -> Tensor:
        """Bound of the expected log-density of each cluster, (C,); of each observation without."""
        if batch.cluster is None:
            return super().forward(batch, expected)
        measured = batch.observations.measured
        comparison = measured.compare(expected.mean, expected.spread)
        norm = measured.density_variance(expected.mean, expected.variance)
        return self.law(correlated(comparison, expected, norm, batch.cluster))

    def log_density(self, batch: Batch, expected: Expectation) -> Tensor:
        """Bound of the expected log-density of each observation, (N,)."""
        measured = batch.observations.measured
        z2 = measured.compare(expected.mean, expected.spread).square / expected.variance
        norm = measured.density_variance(expected.mean, expected.variance)
        return self.law(Misfit(z2, norm.log(), torch.ones_like(z2)))

    def law(self, misfit: Misfit) -> Tensor:
        """Log-density of an n-dimensional measurement, expected under q."""
        return -0.5 * (misfit.z2 + misfit.log_det + misfit.n * math.log(2 * math.pi))

    def weight(self, batch: Batch, expected: Expectation) -> Tensor:
        """Ones, (N,)."""
        return torch.ones_like(expected.mean)

    @property
    def error_parameters(self) -> dict[str, float]:
        """Those of the error model and of the error in common."""
        return self.error.values | self.common.values


class StudentT(Normal):
    """Student's t: outliers are forgiven.

    Parameters
    ----------
    error : ErrorModel
    common : CommonError
    dof : float or None
        Degrees of freedom; learned from 16 when None.
    """

    def __init__(self, error: ErrorModel, common: CommonError, dof: float | None = None) -> None:
        super().__init__(error, common)
        self.log_dof = error_parameter(math.log(dof or 16.0), dof is None)

    @classmethod
    def build(cls, table: ObservationTable, config: MergeConfig) -> Self:
        """Make the law for a table."""
        common = CommonError(table.has_clusters and config.error_model)
        return cls(ErrorModel.build(table, config), common, config.dof)

    @property
    def dof(self) -> Tensor:
        """Degrees of freedom, above 2: the variance exists."""
        return self.log_dof.clamp(math.log(2.05), 8.0).exp()

    def law(self, misfit: Misfit) -> Tensor:
        """Bound of the expected log-density of an n-dimensional measurement."""
        z2, log_det, n = misfit
        dof = self.dof
        norm = torch.lgamma((dof + n) / 2) - torch.lgamma(dof / 2)
        norm = norm - 0.5 * n * torch.log(math.pi * dof)
        return norm - 0.5 * log_det - 0.5 * (dof + n) * torch.log1p(z2 / dof)

    @torch.no_grad()
    def weight(self, batch: Batch, expected: Expectation) -> Tensor:
        """Precision of each observation times D, as expected, (N,): small for outliers."""
        nothing = torch.zeros_like(expected.mean)
        square = batch.observations.measured.compare(expected.mean, nothing).square
        dof = self.dof
        return (dof + 1) / (dof + square / expected.variance)

    @property
    def error_parameters(self) -> dict[str, float]:
        """Those of the Normal and the degrees of freedom."""
        return super().error_parameters | {"dof": float(self.dof.detach())}
