"""Scale that is known before anything is learned."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.scale.term import ScaleTerm


class KnownScale(ScaleTerm):
    """-log(L/P) where it was not applied, and for stills the mean level of the image."""

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self:
        """All data have it."""
        return cls()

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,)."""
        return batch.terms.base_log_scale
