r"""Radiation damage: resolution falloff ``-B(phi) / (2 d^2)`` along a sweep, piecewise linear.

Only its change over the scan can be known beside F: its mean is 0, and the scale of a frame is
that at the mean 1/d^2.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.sweeps import SweepTable
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.hat_functions import hat_design
from braggflux.merge.scale.term import ScaleTerm, parts

B_SD = 3.0  # prior standard deviation of B [A^2]
START_BEND = 0.1  # of B from knot to knot [A^2]; learned. Damage is smooth, one knot is noisy.


class BFactor(ScaleTerm):
    """B along each sweep.

    Parameters
    ----------
    sweeps : SweepTable
        Of all observations.
    spacing_deg : float
        Rotation between knots.
    """

    centre: Tensor
    centre_inv_d2: Tensor
    design: Tensor

    def __init__(self, sweeps: SweepTable, spacing_deg: float = 10.0) -> None:
        super().__init__()
        self.sweeps, self.n_knots = sweeps, sweeps.knots_along(spacing_deg)
        self.b_factor = nn.Parameter(torch.zeros(sum(self.n_knots), dtype=torch.float64))
        self.log_b_bend = nn.Parameter(torch.tensor(np.log(START_BEND), dtype=torch.float64))
        along, inv_d2 = self._along_sweeps(), sweeps.d.double() ** -2
        # what the term is centred by is part of the meaning of B: saved with it
        self.register_buffer("centre", along.mean(0))
        self.register_buffer("centre_inv_d2", inv_d2.mean())
        self.register_buffer("design", self._design(along, inv_d2), persistent=False)

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For rotation data with a physical scale."""
        return None if table.sweeps is None else cls(table.sweeps, config.b_factor_spacing_deg)

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,)."""
        return self.design[batch.term_rows].double() @ self.b_factor

    def penalty(self) -> Tensor:
        """Minus the log-prior, () [nats]."""
        total = 0.5 * (self.b_factor**2).sum() / B_SD**2
        bend = self.log_b_bend.clamp(-7.0, 2.0)
        for knots in parts(self.b_factor, self.n_knots):
            change = knots.diff(n=2)
            total = total + 0.5 * (change**2).sum() * torch.exp(-2 * bend) + len(change) * bend
        return total + 0.5 * ((bend - np.log(START_BEND)) / 1.0) ** 2

    @torch.no_grad()
    def fresh_crystal_factor(self, inv_d2: Tensor) -> Tensor:
        """Turn intensities at the mean dose into those at the start of the first scan.

        B is centred in training; what the crystal scattered before any damage is larger by
        ``exp((B_mean - B_start) / (2 d^2))``.
        """
        change = self.centre @ self.b_factor - self.b_factor[0]
        return torch.exp(0.5 * change * inv_d2)

    @torch.no_grad()
    def restore(self) -> None:
        """Centre the observations by what was loaded."""
        self.design.copy_(self._design(self._along_sweeps(), self.sweeps.d.double() ** -2))

    def _along_sweeps(self) -> Tensor:
        """Interpolation on the knots of every sweep, (N, sum of n_knots)."""
        s = self.sweeps
        return b_design(s.angle_deg, s.experiment, s.spans_deg, self.n_knots)

    def _design(self, along: Tensor, inv_d2: Tensor) -> Tensor:
        """Log K for a unit of each knot's B, (N, sum of n_knots), to single precision.

        Centred: otherwise every change of B needs all frame scales and all F to follow.
        """
        centre, centre_inv_d2 = self.centre.cpu(), self.centre_inv_d2.cpu()
        return ((along - centre) * (-0.5 * (inv_d2 - centre_inv_d2))[:, None]).float()


def b_design(
    angle: Tensor, experiment: Tensor, spans: tuple[float, ...], n_knots: tuple[int, ...]
) -> Tensor:
    """Interpolation of a rotation angle on the knots of every sweep, (N, sum of n_knots)."""
    blocks = []
    for k, (span, n) in enumerate(zip(spans, n_knots, strict=True)):
        knots = torch.linspace(0, span, n, dtype=torch.float64)
        blocks.append(torch.where((experiment == k)[:, None], hat_design(angle, knots), 0.0))
    return torch.cat(blocks, 1)
