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
from braggflux.merge.hat_functions import hat_places
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
    knot: Tensor
    next_share: Tensor
    falloff: Tensor

    def __init__(self, sweeps: SweepTable, spacing_deg: float = 10.0) -> None:
        super().__init__()
        self.sweeps, self.n_knots = sweeps, sweeps.knots_along(spacing_deg)
        self.b_factor = nn.Parameter(torch.zeros(sum(self.n_knots), dtype=torch.float64))
        self.log_b_bend = nn.Parameter(torch.tensor(np.log(START_BEND), dtype=torch.float64))
        knot, share = self._places()
        inv_d2 = sweeps.d.double() ** -2
        sums = torch.zeros_like(self.b_factor.detach())
        sums.index_add_(0, knot, 1 - share).index_add_(0, knot + 1, share)
        # what the term is centred by is part of the meaning of B: saved with it
        self.register_buffer("centre", sums / len(knot))
        self.register_buffer("centre_inv_d2", inv_d2.mean())
        # few numbers an observation: there are millions of them, and dozens of knots
        self.register_buffer("knot", knot.int(), persistent=False)
        self.register_buffer("next_share", share.float(), persistent=False)
        self.register_buffer("falloff", self._falloff(), persistent=False)

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For rotation data with a physical scale."""
        return None if table.sweeps is None else cls(table.sweeps, config.b_factor_spacing_deg)

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,).

        Centred: otherwise every change of B needs all frame scales and all F to follow.
        """
        rows = batch.term_rows
        knot, share = self.knot[rows].long(), self.next_share[rows].double()
        along = torch.lerp(self.b_factor[knot], self.b_factor[knot + 1], share)
        return (along - self.centre @ self.b_factor) * self.falloff[rows].double()

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
        self.falloff.copy_(self._falloff())

    def _places(self) -> tuple[Tensor, Tensor]:
        """Knot before each observation, counted over all sweeps, and the weight of the next."""
        s, angle, first = self.sweeps, self.sweeps.angle_deg, 0
        knot, share = torch.zeros_like(angle, dtype=torch.int64), torch.zeros_like(angle)
        for k, (span, n) in enumerate(zip(s.spans_deg, self.n_knots, strict=True)):
            rows = s.experiment == k
            knots = torch.linspace(0, span, n, dtype=torch.float64)
            left, share[rows] = hat_places(angle[rows], knots)
            knot[rows], first = first + left, first + n
        return knot, share

    def _falloff(self) -> Tensor:
        """Log K for a unit of B, (N,), to single precision."""
        inv_d2 = self.sweeps.d.double() ** -2
        return (-0.5 * (inv_d2 - self.centre_inv_d2.cpu())).float()
