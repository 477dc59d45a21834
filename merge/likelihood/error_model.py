"""Error model: how much larger the errors are than the counting statistics say.

    D = sdfac^2 (V + sdB m + (sdadd m)^2 + (e m)^2)        (Evans 2006, Acta Cryst. D62, 72)

V is the variance of the measurement, m the expected intensity, and e a further relative error that
the scale model may know of the place.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable

MIN_VARIANCE = 0.05  # least share of V that a negative sdB may leave


def error_parameter(value: float, is_learned: bool) -> nn.Parameter:
    """Return a number of an error model, learned or fixed."""
    return nn.Parameter(torch.tensor(value, dtype=torch.float64), is_learned)


class ErrorModel(nn.Module):
    """D from V.

    Parameters
    ----------
    is_learned : bool
        Otherwise sdfac = 1, sdB = sdadd = 0.
    sigma_unit : float
        Typical sigma, the unit of sdB.
    """

    sigma_unit: Tensor

    def __init__(self, is_learned: bool, sigma_unit: float) -> None:
        super().__init__()
        self.register_buffer("sigma_unit", torch.tensor(sigma_unit, dtype=torch.float64))
        self.log_sdfac = error_parameter(0.0, is_learned)
        self.sdb = error_parameter(0.0, is_learned)
        self.log_sdadd = error_parameter(math.log(0.03) if is_learned else -20.0, is_learned)

    @classmethod
    def build(cls, table: ObservationTable, config: MergeConfig) -> Self:
        """Make the model for the errors of a table."""
        sigma = table.observations.measured.background_sigma
        return cls(config.error_model, float(sigma.median()))

    def forward(self, variance: Tensor, expected: Tensor, relative: Tensor | None) -> Tensor:
        """D, (N,), from V and m; ``relative`` (N,) is a further error in units of m."""
        floor = MIN_VARIANCE * variance
        share = (2 * self.log_sdadd.clamp_max(2.0)).exp()
        if relative is not None:
            share = share + relative**2
        total = variance + self.sdb * self.sigma_unit * expected + share * expected**2
        return (2 * self.log_sdfac).exp() * torch.maximum(total, floor)

    @property
    def values(self) -> dict[str, float]:
        """Values for the log."""
        return {
            "sdfac": float(self.log_sdfac.detach().exp()),
            "sdb": float(self.sdb.detach() * self.sigma_unit),
            "sdadd": float(self.log_sdadd.detach().exp()),
        }
