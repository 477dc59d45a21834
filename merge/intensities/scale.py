r"""Scale of an observation: I = K F^2.

    log K = base + g_image - B_image / (2 d^2) + spectrum(wavelength) - e^2 / (2 w^2) + network

* ``base``: -log(L/P) where it was not applied, and for stills the mean level of the image;
* ``g``, ``B``: scale and resolution falloff of each image of a scan, smooth along it; stills have
  neither, a new still needs no parameters of its own;
* ``spectrum``: log of the intensity of a polychromatic beam, piecewise linear and smooth;
* ``e``: distance from the Ewald sphere (partiality of stills), with a learned width ``w``;
* ``network``: residual blocks that see the metadata of the observation and a description of its
  image, learned (scans) or computed from its reflections by the image encoder (stills). Further
  outputs: for stills and Laue the relative error that remains, which no mean can hold; for Laue
  the log-odds that there is no spot at all (shadow of the beam stop's arm, dead modules), and
  where datasets share orientations the log of the error in common at a place, relative to its
  mean.

All have Gaussian priors; K is positive by construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merge.intensities.config import IntensityMergeConfig
from merge.intensities.table import Batch, ObservationTable
from merge.model.prior import hat_design

SCALE_SD = 1.0  # prior of a mean log-scale
STEP = 0.1  # start of its change from image to image
B_SD, B_STEP = 10.0, 1.0  # [A^2]
SPECTRUM_BEND = 0.5  # second difference of the log-spectrum
WEIGHT_SD = 1.0
DEVIATION_SD = 0.5  # of an image from the others of its unit
BLANK_LOG_ODDS = -6.0  # of a missing spot, before anything is learned
BLOCK = 8192  # observations that pass the networks together where nothing is learned


@dataclass(frozen=True)
class ErrorsByPlace:
    """Errors that depend on where an observation lies, (N,) each or None.

    Parameters
    ----------
    relative : Tensor or None
        In units of the expected intensity.
    blank_log_odds : Tensor or None
    log_common : Tensor or None
        Of the error of a cluster, relative to its mean.
    """

    relative: Tensor | None = None
    blank_log_odds: Tensor | None = None
    log_common: Tensor | None = None


def blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Split rows, (N, ...), where nothing is learned: each part fits the cache."""
    return (x,) if torch.is_grad_enabled() else x.split(BLOCK)


class ResidualNetwork(nn.Module):
    """Feed-forward blocks with skip connections; the output starts at zero.

    Parameters
    ----------
    n_in, width, depth, n_out : int
    """

    def __init__(self, n_in: int, width: int, depth: int, n_out: int) -> None:
        super().__init__()
        self.first = nn.Linear(n_in, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        for block in self.blocks:
            nn.init.zeros_(block[-1].weight)
            nn.init.zeros_(block[-1].bias)
        self.last = nn.Linear(width, n_out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, n_in) to (N, n_out)."""
        return torch.cat([self.last(nn.functional.silu(self.hidden(part))) for part in blocks(x)])

    def hidden(self, x: Tensor) -> Tensor:
        """Activations before the last layer, (..., width)."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class ImageEncoder(nn.Module):
    """Description of an image from the set of its reflections, whatever their order.

    Every reflection passes the same residual blocks; the mean over the image passes a linear map.
    """

    def __init__(self, n_in: int, width: int, depth: int, n_out: int) -> None:
        super().__init__()
        self.blocks = ResidualNetwork(n_in, width, depth, 1)
        del self.blocks.last
        self.head = nn.Linear(width, n_out)

    def forward(self, x: Tensor, image: Tensor, is_seen: Tensor, n_images: int) -> Tensor:
        """Pool (N, n_in) over the seen reflections of each image: (n_images, n_out)."""
        total = x.new_zeros(n_images, self.head.in_features)
        for part, into, seen in zip(blocks(x), blocks(image), blocks(is_seen), strict=True):
            hidden = nn.functional.silu(self.blocks.hidden(part)) * seen[:, None]
            total = total.index_add(0, into, hidden)
        count = x.new_zeros(n_images).index_add_(0, image, is_seen.to(x.dtype))
        return self.head(total / count.clamp_min(1.0)[:, None])


class ObservationScale(nn.Module):
    """Scale model of all datasets.

    Parameters
    ----------
    table : ObservationTable
    config : IntensityMergeConfig
    """

    def __init__(self, table: ObservationTable, config: IntensityMergeConfig) -> None:
        super().__init__()
        self.images_of_dataset = table.images_of_dataset
        n_images = 0 if config.stills else sum(table.images_of_dataset)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=torch.float64))

        self.log_image_scale, self.b_factor = zeros(n_images), zeros(n_images)
        self.log_step = nn.Parameter(torch.tensor(math.log(STEP), dtype=torch.float64))
        wavelength = table.terms.wavelength
        self.spectrum = None
        if config.laue:
            knots = torch.linspace(
                float(wavelength.min()), float(wavelength.max()), config.n_spectrum_knots
            )
            self.register_buffer("spectrum_knots", knots.double())
            self.spectrum = zeros(config.n_spectrum_knots)
        self.log_width = None
        if bool((table.terms.ewald_offset != 0).any()):
            self.log_width = nn.Parameter(torch.tensor(math.log(2.0), dtype=torch.float64))
        self._build_networks(table, config)

    def _build_networks(self, table: ObservationTable, config: IntensityMergeConfig) -> None:
        self.network = self.encoder = self.embedding = self.deviation = None
        if not config.network_width:
            return
        n_features = table.terms.features.shape[1]
        size, width, depth = config.embedding_size, config.network_width, config.network_depth
        if config.stills:
            n_signal = table.observations.signal.shape[1]
            self.encoder = ImageEncoder(n_features + n_signal, width, depth, size)
        else:
            n_images = sum(table.images_of_dataset)
            self.embedding = nn.Parameter(0.1 * torch.randn(table.n_units, size))
            self.deviation = nn.Parameter(torch.zeros(n_images, size))
        # A still's partiality, and at low angle a Laue spot's wavelength, are uncertain: the error
        # depends on where the reflection lies. A sweep has no such error.
        has_errors = config.stills or config.laue
        self.has_blanks = config.alternatives == "on" or (
            config.alternatives == "auto" and config.laue
        )
        self.has_common = has_errors and table.has_clusters and config.error_model
        n_out = 1 + has_errors + self.has_blanks + self.has_common
        self.has_relative = has_errors
        self.network = ResidualNetwork(n_features + size, width, depth, n_out)

    def forward(self, batch: Batch) -> tuple[Tensor, ErrorsByPlace]:
        """Log K of each term, (T,), and what the network says of the errors."""
        terms, observations = batch.terms, batch.observations
        log_scale = terms.base_log_scale
        image = observations.image[terms.observation]
        if len(self.log_image_scale):
            log_scale = log_scale + self.log_image_scale[image]
            log_scale = log_scale - 0.5 * self.b_factor[image] * terms.inv_d2
        if self.spectrum is not None:
            knots = self.spectrum_knots
            parts = [hat_design(w, knots) @ self.spectrum for w in blocks(terms.wavelength)]
            log_scale = log_scale + torch.cat(parts)
        if self.log_width is not None:
            log_scale = log_scale - 0.5 * terms.ewald_offset**2 * (-2 * self.log_width).exp()
        if self.network is None:
            return log_scale, ErrorsByPlace()
        described = self.describe(batch)[terms.observation]
        out = self.network(torch.cat([terms.features, described], -1)).double()
        log_scale = log_scale + out[:, 0].clamp(-10.0, 10.0)
        relative = blank_log_odds = log_common = None
        rest = list(batch.of_first_terms(out[:, 1:]).unbind(1))
        if self.has_relative:
            relative = (rest.pop(0) - 3.0).clamp_max(1.0).exp()
        if self.has_blanks:
            blank_log_odds = (rest.pop(0) + BLANK_LOG_ODDS).clamp(-12.0, 12.0)
        if self.has_common:
            log_common = rest.pop(0).clamp(-5.0, 5.0)
        return log_scale, ErrorsByPlace(relative, blank_log_odds, log_common)

    def describe(self, batch: Batch) -> Tensor:
        """Describe the image of each observation, (N, size)."""
        if self.encoder is None:
            o = batch.observations
            return self.embedding[o.unit] + self.deviation[o.image]
        features = batch.terms.features
        if batch.observation_of_term is not None:
            raise ValueError("stills have no harmonics")
        signal = torch.cat([features, batch.observations.signal], -1)
        seen = batch.observations.is_seen
        return self.encoder(signal, batch.image, seen, batch.n_images)[batch.image]

    @torch.no_grad()
    def describe_unseen(self, unit: Tensor, is_used: Tensor) -> None:
        """Describe units without any used observation by the mean of the others.

        Parameters
        ----------
        unit, is_used : Tensor, (N,)
        """
        if self.embedding is None:
            return
        seen = torch.zeros(len(self.embedding), dtype=torch.bool, device=unit.device)
        seen[unit[is_used]] = True
        if seen.any():
            self.embedding[~seen] = self.embedding[seen].mean(0)

    def penalty(self) -> Tensor:
        """Minus the log-prior of all parameters, up to a constant, () [nats]."""
        total = self.log_step.new_zeros(())
        step = self.log_step.clamp(-7.0, 1.0)
        first = 0
        for n in self.images_of_dataset if len(self.log_image_scale) else ():
            g, b = self.log_image_scale[first : first + n], self.b_factor[first : first + n]
            first += n
            total = total + 0.5 * (g.diff() ** 2).sum() * (-2 * step).exp() + (n - 1) * step
            total = total + 0.5 * (g.mean() / SCALE_SD) ** 2
            total = total + 0.5 * (b.diff() ** 2).sum() / B_STEP**2 + 0.5 * (b.mean() / B_SD) ** 2
        total = total + 0.5 * (step - math.log(STEP)) ** 2
        if self.spectrum is not None:
            bend = self.spectrum.diff().diff() if len(self.spectrum) > 2 else self.spectrum
            total = total + 0.5 * (bend**2).sum() / SPECTRUM_BEND**2
            total = total + 0.5 * self.spectrum.mean() ** 2
        for module in (self.network, self.encoder):
            for p in module.parameters() if module is not None else ():
                total = total + 0.5 * (p**2).sum() / WEIGHT_SD**2
        if self.embedding is not None:
            total = total + 0.5 * (self.embedding**2).sum()
            total = total + 0.5 * (self.deviation**2).sum() / DEVIATION_SD**2
        return total
