"""Falloff with resolution that the scale keeps; see :mod:`braggflux.merge.fit.gauge`."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.scale.term import ScaleTerm
from braggflux.merge.scale.terms.spectrum import interpolated


class Falloff(ScaleTerm):
    """Function of 1/d^2, piecewise linear; nothing while a model is fitted.

    Parameters
    ----------
    n_knots : int
        Of the prior's mean intensity, from which the falloff is taken.
    """

    knots: Tensor
    log_scale: Tensor

    def __init__(self, n_knots: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.zeros(n_knots).double())
        self.register_buffer("log_scale", torch.zeros(n_knots).double())
        self.is_there = False  # on the host: asked for in every step
        self.register_load_state_dict_post_hook(Falloff._look)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self:
        """All data may need it."""
        return cls(config.n_wilson_knots)

    def _look(self, _keys: object = None) -> None:
        self.is_there = bool(self.knots.any())

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,), or () where there is none."""
        if not self.is_there:
            return self.knots.new_zeros(())
        return interpolated(batch.terms.inv_d2, self.knots, self.log_scale)

    def add(self, knots: Tensor, log_scale: Tensor) -> None:
        """Add a falloff, (n_knots,), at knots [1/A^2] that are always the same."""
        self.knots.copy_(knots)
        self.log_scale += log_scale
        self._look()
