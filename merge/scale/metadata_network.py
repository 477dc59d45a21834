"""Residual blocks that see the metadata of an observation and a description of its image.

Images are described by numbers of their own (scans, Laue) or by the image encoder from their
reflections (stills), from which an image departs by parameters of its own once it was trained on.
In training some images do without, and the network is told: it must know how good its word is for
a new image.

Beside its part of log K the network says, for stills and Laue, the relative error that remains,
which no mean can hold; for Laue the log-odds that there is no spot at all (shadow of the beam
stop's arm, dead modules), and where datasets share orientations the log of the error in common at
a place, relative to its mean.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.metadata import EWALD_OFFSETS
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.scale.base import Scale
from braggflux.merge.scale.networks import ImageEncoder, ResidualNetwork

WEIGHT_SD = 1.0
DEVIATION_SD = 0.5  # of an image from the others of its exposure group
IMAGES_WITHOUT = 0.2  # share of the images that do without parameters of their own in a step
BLANK_LOG_ODDS = -6.0  # of a missing spot, before anything is learned


class MetadataNetwork(nn.Module):
    """Network of metadata and images.

    Parameters
    ----------
    table : ObservationTable
    config : MergeConfig
    """

    def __init__(self, table: ObservationTable, config: MergeConfig) -> None:
        super().__init__()
        n_features, n_images = table.terms.features.shape[1], sum(table.images_of_dataset)
        size, width, depth = config.embedding_size, config.network_width, config.network_depth
        self.encoder = self.embedding = self.deviation = None
        if config.stills:
            n_signal = table.observations.signal.shape[1]
            self.encoder = ImageEncoder(n_features + n_signal, width, depth, size)
            if config.image_parameters:
                self.deviation = nn.Parameter(torch.zeros(n_images, size))
                size += 1
        elif table.sweeps is not None:  # images have scales of their own already
            size = 0
        else:
            self.embedding = nn.Parameter(0.1 * torch.randn(table.n_units, size))
            self.deviation = nn.Parameter(torch.zeros(n_images, size))
        # A still's partiality, and at low angle a Laue spot's wavelength, are uncertain: the error
        # depends on where the reflection lies. A sweep has no such error.
        self.has_relative = config.stills or config.laue
        self.has_blanks = config.has_alternatives
        self.has_common = self.has_relative and table.has_clusters and config.error_model
        n_out = 1 + self.has_relative + self.has_blanks + self.has_common
        self.network = ResidualNetwork(n_features + size, width, depth, n_out)
        names = table.feature_names
        offsets = [names.index(n) for n in EWALD_OFFSETS if n in names]
        # of the distances and, last of all features, their sizes
        self.offset_columns = [*offsets, *range(-len(offsets), 0)]

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For all data; beside a physical scale only where metadata are named."""
        is_idle = table.sweeps is not None and config.metadata is None
        return None if is_idle or not config.network_width else cls(table, config)

    def forward(self, batch: Batch, described_by: Batch | None = None) -> Scale:
        """Part of log K of each term, and what depends on the place of each observation.

        ``described_by`` is the batch whose reflections describe the images, if not ``batch``.
        """
        seen = batch.terms.features
        if self.encoder is not None or self.embedding is not None:
            described = self.describe(described_by or batch)
            seen = torch.cat([seen, described[batch.terms.observation]], -1)
        out = self.network(seen).double()
        relative = blank_log_odds = log_common = None
        rest = list(batch.of_first_terms(out[:, 1:]).unbind(1))
        if self.has_relative:
            relative = (rest.pop(0) - 3.0).clamp_max(1.0).exp()
        if self.has_blanks:
            blank_log_odds = (rest.pop(0) + BLANK_LOG_ODDS).clamp(-12.0, 12.0)
        if self.has_common:
            log_common = rest.pop(0).clamp(-5.0, 5.0)
        return Scale(out[:, 0].clamp(-10.0, 10.0), relative, blank_log_odds, log_common)

    def on_the_sphere(self, features: Tensor) -> Tensor:
        """Features of lattice points on the Ewald sphere, (T, m)."""
        features = features.clone()
        features[:, self.offset_columns] = 0.0
        return features

    def describe(self, batch: Batch) -> Tensor:
        """Describe the image of each observation, (N, size)."""
        if self.embedding is not None and self.deviation is not None:
            o = batch.observations
            return self.embedding[o.exposure_group] + self.deviation[o.image]
        features = batch.terms.features
        if self.encoder is None or batch.observation_of_term is not None:
            raise ValueError("reflections describe the images of stills, which have no harmonics")
        signal = torch.cat([features, batch.observations.signal], -1)
        seen = batch.observations.is_seen
        described = self.encoder(signal, batch.image, seen, batch.n_images)[batch.image]
        if self.deviation is None:
            return described
        if not len(self.deviation):
            return torch.cat([described, torch.zeros_like(described[:, :1])], -1)
        own = self.deviation[batch.observations.image]
        if self.training:
            drawn = torch.rand(batch.n_together or batch.n_images, device=own.device)
            if batch.place is not None:
                drawn = drawn[batch.place]
            with_own = drawn >= IMAGES_WITHOUT
            has_own = with_own[batch.image, None].to(own.dtype)
        else:
            has_own = (own != 0).any(-1, keepdim=True).to(own.dtype)
        return torch.cat([described + has_own * own, has_own], -1)

    def forget_images(self) -> None:
        """Do without parameters of single images: of stills that are too many for them."""
        if self.encoder is not None and self.deviation is not None:
            self.deviation = nn.Parameter(self.deviation.detach()[:0])

    @torch.no_grad()
    def describe_unseen(self, exposure_group: Tensor, is_used: Tensor) -> None:
        """Describe exposure groups without any used observation by the mean of the others.

        Parameters
        ----------
        exposure_group, is_used : Tensor, (N,)
        """
        if self.embedding is None:
            return
        seen = torch.zeros(len(self.embedding), dtype=torch.bool, device=exposure_group.device)
        seen[exposure_group[is_used]] = True
        if seen.any():
            self.embedding[~seen] = self.embedding[seen].mean(0)

    def penalty(self) -> Tensor:
        """Minus the log-prior, up to a constant, () [nats]."""
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for module in (self.network, self.encoder):
            for p in module.parameters() if module is not None else ():
                total = total + 0.5 * (p**2).sum() / WEIGHT_SD**2
        if self.embedding is not None:
            total = total + 0.5 * (self.embedding**2).sum()
        if self.deviation is not None:
            total = total + 0.5 * (self.deviation**2).sum() / DEVIATION_SD**2
        return total
