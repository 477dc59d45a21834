"""Partiality of stills by the distance of a lattice point from the Ewald sphere."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.scale.term import ScaleTerm

START_WIDTH = 2.0  # in standard deviations of the distances


class Partiality(ScaleTerm):
    """``-e^2 / (2 w^2)`` of the distance e, with a learned width w for all."""

    def __init__(self) -> None:
        super().__init__()
        self.log_width = nn.Parameter(torch.tensor(math.log(START_WIDTH), dtype=torch.float64))

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For data that say the distance."""
        return cls() if bool((table.terms.ewald_offset != 0).any()) else None

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,)."""
        return -0.5 * batch.terms.ewald_offset**2 * (-2 * self.log_width).exp()
