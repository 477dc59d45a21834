r"""Transmission of the incident and the diffracted beam as one smooth surface.

    log K += sum_lm a_lm (Y_lm(-s0) + Y_lm(s1)) / 2

in the frame of the crystal. The sum over the two directions is the same for a reflection and for
the Friedel mate measured along the reversed path, whatever the order l, and a surface of a few
dozen coefficients has no room for the thousands of Bijvoet differences.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.sweeps import SweepTable
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.scale.term import ScaleTerm

HARMONIC_SD = 0.3
#: Sweeps that may have a response of their own that moves with the scan.
MAX_MOVING = 8


class Absorption(ScaleTerm):
    """Surface of absorption.

    Parameters
    ----------
    sweeps : SweepTable
        Of all observations.
    order : int
        Highest order of the harmonics.
    """

    position: Tensor
    half_width: Tensor
    centre: Tensor
    harmonics: Tensor

    def __init__(self, sweeps: SweepTable, order: int = 4) -> None:
        super().__init__()
        self.sweeps, self.order = sweeps, order
        # what the term is centred by is part of its meaning: saved with the parameters
        if not sweeps.has_beams:
            centre, half_width = sweeps.detector_centre()
            self.register_buffer("position", centre)
            self.register_buffer("half_width", half_width)
        harmonics = self._harmonics()
        self.absorption = nn.Parameter(torch.zeros(harmonics.shape[1], dtype=torch.float64))
        self.register_buffer("centre", harmonics.mean(0))
        design = (harmonics - self.centre).float()
        self.register_buffer("harmonics", design, persistent=False)

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For rotation data with a physical scale, and beams or places on the detector."""
        if table.sweeps is None or not config.absorption_order:
            return None
        term = cls(table.sweeps, config.absorption_order)
        return term if len(term.absorption) else None

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,)."""
        return self.harmonics[batch.term_rows].double() @ self.absorption

    def penalty(self) -> Tensor:
        """Minus the log-prior, () [nats]."""
        return 0.5 * (self.absorption**2).sum() / HARMONIC_SD**2

    @torch.no_grad()
    def restore(self) -> None:
        """Centre the observations by what was loaded."""
        self.harmonics.copy_((self._harmonics() - self.centre.cpu()).float())

    def _harmonics(self) -> Tensor:
        """Sum over the two directions, (N, n_lm); something like it where they are not known."""
        s = self.sweeps
        if not s.has_beams:
            xy = s.scaled_position(self.position.cpu(), self.half_width.cpu())
            return _moving_response(s, xy, self.order)
        of_s0, of_s1 = -s.s0_crystal.double(), s.s1_crystal.double()
        return (real_harmonics(of_s0, self.order) + real_harmonics(of_s1, self.order)) / 2


def _moving_response(sweeps: SweepTable, position: Tensor, order: int) -> Tensor:
    """Place of absorption where directions are not known, (N, m).

    A surface in the frame of the crystal that the beams wander over is, seen from the detector, a
    smooth function of the place whose terms come and go with the rotation: products of powers of
    x and y and of cosines along the scan, as fast as the harmonics of that order turn.
    """
    x, y = position.unbind(-1)
    powers = torch.stack([x, y, x**2, x * y, y**2], -1)
    if len(sweeps.n_frames) > MAX_MOVING or not sweeps.has_positions:
        return powers[:, :0]
    scan = 2 * sweeps.xyz_px[:, 2].double() / sweeps.n_frames_each - 1
    columns = []
    for k, span in enumerate(sweeps.spans_deg):
        n_waves = min(math.ceil(2 * order * span / 360.0), 2 * order)
        angle = torch.arange(1, n_waves + 1) * (math.pi / 2) * (scan[:, None] + 1)
        waves = torch.where((sweeps.experiment == k)[:, None], angle.cos(), 0.0)
        columns.append((waves[:, :, None] * powers[:, None]).flatten(1))
    return torch.cat(columns, 1)


def real_harmonics(directions: Tensor, order: int) -> Tensor:
    """Real spherical harmonics of orders 1 to ``order`` of unit vectors (N, 3): (N, n_lm)."""
    if not order:
        return torch.zeros(len(directions), 0, dtype=torch.float64)
    # not at the top: sweeps whose directions are not known do without scipy
    from scipy.special import factorial, lpmv

    v = directions.detach().cpu().numpy()
    azimuth = np.arctan2(v[:, 1], v[:, 0])
    columns = []
    for l in range(1, order + 1):
        for m in range(-l, l + 1):
            k = abs(m)
            norm = np.sqrt((2 * l + 1) / (4 * np.pi) * factorial(l - k) / factorial(l + k))
            legendre = norm * lpmv(k, l, np.clip(v[:, 2], -1, 1))
            turn = np.cos(k * azimuth) if m >= 0 else np.sin(k * azimuth)
            columns.append(legendre * turn * (np.sqrt(2) if m else 1.0))
    return torch.as_tensor(np.stack(columns, 1))
