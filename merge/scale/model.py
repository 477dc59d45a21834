r"""Scale of an observation: I = K F^2.

    log K = base + g_image - B_image / (2 d^2) + spectrum(wavelength) - e^2 / (2 w^2) + network
            + falloff(1 / d^2)

* ``base``: -log(L/P) where it was not applied, and for stills the mean level of the image;
* ``g``, ``B``: scale and resolution falloff of each image of a scan, smooth along it; stills have
  neither, a new still needs no parameters of its own. Where a sweep knows how its observations lie
  on it, the terms of :mod:`braggflux.merge.scale.sweep` take their place and the network's;
* ``spectrum``: log of the intensity of a polychromatic beam, piecewise linear and smooth;
* ``e``: distance from the Ewald sphere (partiality of stills), with a learned width ``w``;
* ``network``: residual blocks that see the metadata of the observation and a description of its
  image, learned (scans) or computed from its reflections by the image encoder (stills), from
  which an image departs by parameters of its own once it was trained on. In training some images
  do without, and the network is told: it must know how good its word is for a new image. Further
  outputs: for stills and Laue the relative error that remains, which no mean can hold; for Laue
  the log-odds that there is no spot at all (shadow of the beam stop's arm, dead modules), and
  where datasets share orientations the log of the error in common at a place, relative to its
  mean.

All have Gaussian priors; K is positive by construction.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from braggflux.merge.config import IntensityMergeConfig
from braggflux.merge.data.metadata import EWALD_OFFSETS
from braggflux.merge.data.sweeps import SweepTable
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.prior.wilson import hat_design
from braggflux.merge.scale.base import Scale
from braggflux.merge.scale.networks import ImageEncoder, ResidualNetwork, blocks

if TYPE_CHECKING:
    from braggflux.merge.scale.sweep import SweepScale

SCALE_SD = 1.0  # prior of a mean log-scale
STEP = 0.1  # start of its change from image to image
B_SD, B_STEP = 10.0, 1.0  # [A^2]
SPECTRUM_BEND = 0.5  # second difference of the log-spectrum
WEIGHT_SD = 1.0
DEVIATION_SD = 0.5  # of an image from the others of its unit
IMAGES_WITHOUT = 0.2  # share of the images that do without parameters of their own in a step
BLANK_LOG_ODDS = -6.0  # of a missing spot, before anything is learned


def interpolated(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Interpolate between knots, (N,); where nothing is learned, no matrix of all rows is made."""
    return torch.cat([hat_design(part, knots) @ values for part in blocks(x)])


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
        self.sweep = _sweep_scale(table.sweeps, config)
        has_images = not config.stills and self.sweep is None
        n_images = sum(table.images_of_dataset) if has_images else 0

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
        self.register_buffer("falloff_knots", torch.zeros(config.n_wilson_knots).double())
        self.register_buffer("falloff", torch.zeros(config.n_wilson_knots).double())
        names = table.feature_names
        offsets = [names.index(n) for n in EWALD_OFFSETS if n in names]
        # of the distances and, last of all features, their sizes
        self.offset_columns = [*offsets, *range(-len(offsets), 0)]
        self.log_width = None
        if bool((table.terms.ewald_offset != 0).any()):
            self.log_width = nn.Parameter(torch.tensor(math.log(2.0), dtype=torch.float64))
        self._build_networks(table, config)

    def _build_networks(self, table: ObservationTable, config: IntensityMergeConfig) -> None:
        self.network = self.encoder = self.embedding = self.deviation = None
        if not config.network_width or (self.sweep is not None and config.metadata is None):
            return
        n_features = table.terms.features.shape[1]
        size, width, depth = config.embedding_size, config.network_width, config.network_depth
        if config.stills:
            n_signal = table.observations.signal.shape[1]
            self.encoder = ImageEncoder(n_features + n_signal, width, depth, size)
            if config.image_parameters:
                self.deviation = nn.Parameter(torch.zeros(sum(table.images_of_dataset), size))
                size += 1
        elif self.sweep is not None:  # images have scales of their own already
            size = 0
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

    def forward(self, batch: Batch, described: Tensor | None = None) -> Scale:
        """Log K of each term, and what the network says of the errors.

        ``described``, (N, size), describes the images in place of what the batch says of them.
        """
        terms, observations = batch.terms, batch.observations
        log_scale = terms.base_log_scale
        image = observations.image[terms.observation]
        if self.sweep is not None:
            log_scale = log_scale + self.sweep(batch.rows[terms.observation])
        if len(self.log_image_scale):
            log_scale = log_scale + self.log_image_scale[image]
            log_scale = log_scale - 0.5 * self.b_factor[image] * terms.inv_d2
        if self.spectrum is not None:
            spectrum = interpolated(terms.wavelength, self.spectrum_knots, self.spectrum)
            log_scale = log_scale + spectrum
        if bool(self.falloff_knots.any()):
            log_scale = log_scale + interpolated(terms.inv_d2, self.falloff_knots, self.falloff)
        if self.log_width is not None:
            log_scale = log_scale - 0.5 * terms.ewald_offset**2 * (-2 * self.log_width).exp()
        if self.network is None:
            return Scale(log_scale)
        out = self.network(self._seen_by_network(batch, described)).double()
        log_scale = log_scale + out[:, 0].clamp(-10.0, 10.0)
        relative = blank_log_odds = log_common = None
        rest = list(batch.of_first_terms(out[:, 1:]).unbind(1))
        if self.has_relative:
            relative = (rest.pop(0) - 3.0).clamp_max(1.0).exp()
        if self.has_blanks:
            blank_log_odds = (rest.pop(0) + BLANK_LOG_ODDS).clamp(-12.0, 12.0)
        if self.has_common:
            log_common = rest.pop(0).clamp(-5.0, 5.0)
        return Scale(log_scale, relative, blank_log_odds, log_common)

    def on_the_sphere(self, batch: Batch) -> Tensor:
        """Log K of each term if its lattice point lay on the Ewald sphere, (T,)."""
        terms = batch.terms
        features = terms.features.clone()
        features[:, self.offset_columns] = 0.0
        moved = replace(
            terms, features=features, ewald_offset=torch.zeros_like(terms.ewald_offset)
        )
        described = self.describe(batch) if self.encoder is not None else None
        return self(replace(batch, terms=moved), described).log_k

    def _seen_by_network(self, batch: Batch, described: Tensor | None) -> Tensor:
        """Features of each term and the description of its image, (T, n_in)."""
        features = batch.terms.features
        if self.encoder is None and self.embedding is None:
            return features
        if described is None:
            described = self.describe(batch)
        return torch.cat([features, described[batch.terms.observation]], -1)

    def image_scales(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-scales of single images (none for stills), and that of each observation, (N,)."""
        if self.sweep is not None:
            return self.sweep.log_frame_scale, self.sweep.centre_frame()[batch.rows]
        return self.log_image_scale, batch.observations.image

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
        described = self.encoder(signal, batch.image, seen, batch.n_images)[batch.image]
        if self.deviation is None:
            return described
        if not len(self.deviation):
            return torch.cat([described, torch.zeros_like(described[:, :1])], -1)
        own = self.deviation[batch.observations.image]
        if self.training:
            with_own = torch.rand(batch.n_images, device=own.device) >= IMAGES_WITHOUT
            has_own = with_own[batch.image, None].to(own.dtype)
        else:
            has_own = (own != 0).any(-1, keepdim=True).to(own.dtype)
        return torch.cat([described + has_own * own, has_own], -1)

    def forget_images(self) -> None:
        """Do without parameters of single images: of stills that are too many for them."""
        if self.encoder is not None and self.deviation is not None:
            self.deviation = nn.Parameter(self.deviation.detach()[:0])

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
        if self.sweep is not None:
            total = total + self.sweep.penalty()
        if self.spectrum is not None:
            bend = self.spectrum.diff().diff() if len(self.spectrum) > 2 else self.spectrum
            total = total + 0.5 * (bend**2).sum() / SPECTRUM_BEND**2
            total = total + 0.5 * self.spectrum.mean() ** 2
        for module in (self.network, self.encoder):
            for p in module.parameters() if module is not None else ():
                total = total + 0.5 * (p**2).sum() / WEIGHT_SD**2
        if self.embedding is not None:
            total = total + 0.5 * (self.embedding**2).sum()
        if self.deviation is not None:
            total = total + 0.5 * (self.deviation**2).sum() / DEVIATION_SD**2
        return total


def _sweep_scale(table: SweepTable | None, config: IntensityMergeConfig) -> SweepScale | None:
    if table is None:
        return None
    # not at the top: its harmonics need scipy, which stills and Laue do without
    from braggflux.merge.scale.sweep import SweepScale

    return SweepScale(table, config)
