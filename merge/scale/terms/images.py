"""Scale and resolution falloff of each image, smooth along a scan, where no sweep is known.

Stills have neither: a new still needs no parameters of its own.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.scale.term import ScaleTerm, log_ratio, parts, start_unseen_groups

SCALE_SD = 1.0  # prior of a mean log-scale
STEP = 0.1  # start of its change from image to image
B_SD, B_STEP = 10.0, 1.0  # [A^2]


def _has_images(table: ObservationTable, config: MergeConfig) -> bool:
    return not config.stills and table.sweeps is None


class ImageScale(ScaleTerm):
    """Log-scale of each image, with a learned change from image to image.

    Parameters
    ----------
    images_of_dataset : tuple of int
        Images that follow each other on a scan.
    """

    def __init__(self, images_of_dataset: tuple[int, ...]) -> None:
        super().__init__()
        self.images_of_dataset = images_of_dataset
        n_images = sum(images_of_dataset)
        self.log_image_scale = nn.Parameter(torch.zeros(n_images, dtype=torch.float64))
        self.log_step = nn.Parameter(torch.tensor(math.log(STEP), dtype=torch.float64))

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For Laue data, and scans without a physical scale."""
        return cls(table.images_of_dataset) if _has_images(table, config) else None

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,)."""
        return self.log_image_scale[batch.observations.image[batch.terms.observation]]

    @torch.no_grad()
    def start(self, batch: Batch, observed: Tensor, expected: Tensor) -> bool:
        """Take the mean ratio of each image."""
        image, n = batch.observations.image, len(self.log_image_scale)
        self.log_image_scale.add_(log_ratio(observed, expected, image, n))
        self.log_image_scale.sub_(self.log_image_scale.mean())
        return True

    def start_unseen(
        self, batch: Batch, was_used: Tensor, observed: Tensor, expected: Tensor
    ) -> bool:
        """Take the mean ratio of each image that was held out."""
        image = batch.observations.image
        start_unseen_groups(self.log_image_scale, image, was_used, observed, expected)
        return True

    def penalty(self) -> Tensor:
        """Minus the log-prior, () [nats]."""
        step = self.log_step.clamp(-7.0, 1.0)
        total = 0.5 * (step - math.log(STEP)) ** 2
        for g in parts(self.log_image_scale, self.images_of_dataset):
            total = total + 0.5 * (g.diff() ** 2).sum() * (-2 * step).exp() + (len(g) - 1) * step
            total = total + 0.5 * (g.mean() / SCALE_SD) ** 2
        return total


class ImageBFactor(ScaleTerm):
    """Resolution falloff ``-B / (2 d^2)`` of each image.

    Parameters
    ----------
    images_of_dataset : tuple of int
        Images that follow each other on a scan.
    """

    def __init__(self, images_of_dataset: tuple[int, ...]) -> None:
        super().__init__()
        self.images_of_dataset = images_of_dataset
        self.b_factor = nn.Parameter(torch.zeros(sum(images_of_dataset), dtype=torch.float64))

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For Laue data, and scans without a physical scale."""
        return cls(table.images_of_dataset) if _has_images(table, config) else None

    def forward(self, batch: Batch) -> Tensor:
        """Part of log K, (T,)."""
        image = batch.observations.image[batch.terms.observation]
        return -0.5 * self.b_factor[image] * batch.terms.inv_d2

    def penalty(self) -> Tensor:
        """Minus the log-prior, () [nats]."""
        total = self.b_factor.new_zeros(())
        for b in parts(self.b_factor, self.images_of_dataset):
            total = total + 0.5 * (b.diff() ** 2).sum() / B_STEP**2 + 0.5 * (b.mean() / B_SD) ** 2
        return total
