"""Log of the intensity of a polychromatic beam, piecewise linear and smooth."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.hat_functions import hat_design
from braggflux.merge.scale.networks import BLOCK, blocks
from braggflux.merge.scale.term import ScaleTerm, log_ratio

BEND = 0.5  # second difference of the log-spectrum


def interpolated(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Interpolate between knots, (N,); where nothing is learned, no matrix of all rows is made."""
    return torch.cat([hat_design(part, knots) @ values for part in blocks(x)])


class Spectrum(ScaleTerm):
    """Wavelength spectrum.

    Parameters
    ----------
    wavelength : Tensor, (T,)
        Of the data [A]: the knots cover it.
    n_knots : int
    """

    knots: Tensor

    def __init__(self, wavelength: Tensor, n_knots: int) -> None:
        super().__init__()
        knots = torch.linspace(float(wavelength.min()), float(wavelength.max()), n_knots)
        self.register_buffer("knots", knots.double())
        self.log_intensity = nn.Parameter(torch.zeros(n_knots, dtype=torch.float64))

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For Laue data."""
        return cls(table.terms.wavelength, config.n_spectrum_knots) if config.laue else None

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,)."""
        return interpolated(batch.terms.wavelength, self.knots, self.log_intensity)

    @torch.no_grad()
    def start(self, batch: Batch, observed: Tensor, expected: Tensor) -> bool:
        """Take the mean ratio near each knot."""
        wavelength = batch.of_first_terms(batch.terms.wavelength)
        nearest = torch.cat(
            [(w[:, None] - self.knots).abs().argmin(1) for w in torch.split(wavelength, BLOCK)]
        )
        self.log_intensity.add_(log_ratio(observed, expected, nearest, len(self.knots)))
        return True

    def penalty(self) -> Tensor:
        """Minus the log-prior, () [nats]."""
        values = self.log_intensity
        bend = values.diff().diff() if len(values) > 2 else values
        return 0.5 * (bend**2).sum() / BEND**2 + 0.5 * values.mean() ** 2
