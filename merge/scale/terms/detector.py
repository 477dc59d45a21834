"""Response and profile errors that vary over the detector: a small network of the position.

It sees nothing but where a spot lies. Given the scan too it would compete with B, and could tell
Bijvoet mates apart.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.sweeps import SweepTable
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.scale.term import ScaleTerm

WEIGHT_SD = 0.3


class DetectorResponse(ScaleTerm):
    """One hidden layer on x, y and the distance from the middle of the spots.

    Parameters
    ----------
    sweeps : SweepTable
        Of all observations.
    width : int
        Of the hidden layer.
    """

    centre: Tensor
    half_width: Tensor
    position: Tensor

    def __init__(self, sweeps: SweepTable, width: int = 8) -> None:
        super().__init__()
        self.sweeps = sweeps
        hidden, last = nn.Linear(3, width), nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(hidden, nn.Tanh(), last).double()
        # what positions are centred and scaled by is part of the meaning: saved with the weights
        centre, half_width = sweeps.detector_centre()
        self.register_buffer("centre", centre)
        self.register_buffer("half_width", half_width)
        self.register_buffer("position", self._position(), persistent=False)

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For rotation data with a physical scale."""
        if table.sweeps is None or not config.detector_network_width:
            return None
        return cls(table.sweeps, config.detector_network_width)

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,)."""
        return self.network(self.position[batch.term_rows].double())[:, 0]

    def penalty(self) -> Tensor:
        """Minus the log-prior, () [nats]."""
        total = self.centre.new_zeros(())
        for p in self.network.parameters():
            total = total + 0.5 * (p**2).sum() / WEIGHT_SD**2
        return total

    @torch.no_grad()
    def restore(self) -> None:
        """Centre the positions by what was loaded."""
        self.position.copy_(self._position())

    def _position(self) -> Tensor:
        """Return the network's input for each observation, (N, 3), about within [-1, 1]."""
        xy = self.sweeps.scaled_position(self.centre.cpu(), self.half_width.cpu())
        x, y = xy.unbind(-1)
        return torch.stack([x, y, x**2 + y**2 - 1], -1).float()
