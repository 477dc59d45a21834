"""Data-driven start of the profile: maximum-likelihood mean profile of the strong spots.

Expectation maximisation for Poisson counts (Shepp & Vardi, IEEE Trans. Med. Imaging 1982, 1, 113):
each round divides the counts of every voxel among background and grid nodes in proportion to what
they are expected to give, and collects each node's share. It needs no step size and cannot make a
negative profile.
"""

from __future__ import annotations

import torch

from integrator.model.integrator import Integrator, first_intensity
from integrator.types import ShoeboxBatch

MIN_PHOTONS = 50.0  # a fainter spot is not strong: its background says more than its profile
MIN_SIGNIFICANCE = 6.0  # over a whole box the background's noise alone can pass MIN_PHOTONS


@torch.no_grad()
def spot_brightness(integrator: Integrator, batch: ShoeboxBatch) -> torch.Tensor:
    """Sum counts above the mean background, (B,) [photons]; 0 where that may be noise.

    A plain sum: good enough to choose the strong spots, and far cheaper than a profile.
    """
    background = (integrator.mean_background(batch.metadata) * batch.is_valid).sum((1, 2, 3))
    excess = batch.counts.sum((1, 2, 3)) - background
    return torch.where(excess > MIN_SIGNIFICANCE * background.sqrt(), excess, 0.0)


@torch.no_grad()
def start_profile(integrator: Integrator, strong: ShoeboxBatch, chunk: int = 512) -> None:
    """Set the integrator's mean profile from strong spots.

    Parameters
    ----------
    integrator : Integrator
        Its profile holds a Gaussian of the measured extent at first.
    strong : ShoeboxBatch
        Bright, whole spots; a few hundred are enough.
    chunk : int
        Shoeboxes treated at once.
    """
    grid = integrator.profile.grid
    node_weights = integrator.profile.node_weights()[0]
    chunks = [strong[slice(i, i + chunk)] for i in range(0, len(strong), chunk)]
    for _ in range(integrator.config.profile_em_rounds):
        collected = torch.zeros_like(node_weights)
        exposed = torch.zeros_like(node_weights)
        for batch in chunks:
            weights = grid.voxel_weights(batch.metadata)
            profile = weights.project(node_weights[None])
            background = integrator.mean_background(batch.metadata)
            valid = batch.is_valid.to(profile.dtype)
            intensity = first_intensity(batch.counts, valid, profile, background).clamp_min(1.0)
            scale = intensity[:, None, None, None]
            ratio = valid * batch.counts / (scale * profile + background)
            # equal say for every spot: a few very bright ones must not set the profile alone
            say = 1 / scale.clamp_min(1.0).sqrt()
            collected += weights.back_project(say * scale * ratio).sum(0)
            exposed += weights.back_project(say * scale * valid).sum(0)
        # a node that hardly any recorded voxel sees keeps its share
        seen = exposed > 1e-3 * exposed.max()
        update = torch.where(seen, collected / exposed.clamp_min(1e-12), torch.ones_like(exposed))
        node_weights = node_weights * update
        node_weights = node_weights / node_weights.sum()
    integrator.profile.set_mean(node_weights)
