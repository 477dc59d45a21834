"""Data-driven start of the profile: its mean, and its offset and width by place.

Expectation maximisation for Poisson counts (Shepp & Vardi, IEEE Trans. Med. Imaging 1982, 1, 113):
each round divides the counts of every voxel among background and grid nodes in proportion to what
they are expected to give, and collects each node's share. It needs no step size and cannot make a
negative profile. In between, offsets and widths follow by Fisher scoring (``local_shape``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.integrator.model.integrator import Integrator, first_intensities
from braggflux.integrator.model.local_shape import LocalShape
from braggflux.integrator.model.neighbours import neighbour_profiles
from braggflux.integrator.model.profile import ProfileGrid, VoxelWeights
from braggflux.integrator.types import ShoeboxBatch

MIN_PHOTONS = 50.0  # a fainter spot is not strong: its background says more than its profile
SHAPE_ROUNDS = range(3, 12, 2)  # rounds before which offsets and widths are fitted
DIFFERENCE = 0.05  # step of the central differences, in sigmas and in the logarithm of the width
FOREIGN_SHARE = 0.25  # of a spot's photons beside it, above what the spots of the sweep have
BESIDE = 1e-3  # of the profile's peak: voxels below it are beside the spot
MIN_SIGNIFICANCE = 6.0  # over a whole box the background's noise alone can pass MIN_PHOTONS


@torch.no_grad()
def spot_brightness(integrator: Integrator, batch: ShoeboxBatch) -> Tensor:
    """Sum counts above the mean background, (B,) [photons]; 0 where that may be noise.

    A plain sum: good enough to choose the strong spots, and far cheaper than a profile.
    """
    background = (integrator.mean_background(batch.metadata) * batch.is_valid).sum((1, 2, 3))
    excess = batch.counts.sum((1, 2, 3)) - background
    return torch.where(excess > MIN_SIGNIFICANCE * background.sqrt(), excess, 0.0)


@torch.no_grad()
def stands_alone(integrator: Integrator, strong: ShoeboxBatch, chunk: int = 512) -> Tensor:
    """Say which strong spots, (B,) bool, have no photons in their boxes that nobody predicted.

    Spots of an unknown lattice, salt or ice would widen the profile of all spots. How much lies
    beside sound spots, in their tails, is what the lower quarter of them has.
    """
    share, is_significant = [], []
    for i in range(0, len(strong), chunk):
        batch = strong[slice(i, i + chunk)]
        spots = _expected_spots(integrator, batch, integrator.profile.node_weights())
        peak = spots.profile.amax((1, 2, 3), keepdim=True)
        beside = spots.valid * (spots.profile < BESIDE * peak)
        expected = (beside * (spots.rate - spots.scale * spots.profile)).sum((1, 2, 3))
        excess = (beside * batch.counts).sum((1, 2, 3)) - expected
        share.append(excess / spots.scale[:, 0, 0, 0])
        is_significant.append(excess > MIN_SIGNIFICANCE * expected.clamp_min(1.0).sqrt())
    found = torch.cat(share)
    usual = found.quantile(0.25).clamp_min(0.0)
    return ~((found > usual + FOREIGN_SHARE) & torch.cat(is_significant))


@torch.no_grad()
def start_profile(integrator: Integrator, strong: ShoeboxBatch, chunk: int = 512) -> None:
    """Set the integrator's mean profile, and how spots shift and widen, from strong spots.

    Parameters
    ----------
    integrator : Integrator
        Its profile holds a Gaussian of the measured extent at first.
    strong : ShoeboxBatch
        Bright, whole spots; a few hundred are enough.
    chunk : int
        Shoeboxes treated at once.
    """
    node_weights = integrator.profile.node_weights()
    chunks = [strong[slice(i, i + chunk)] for i in range(0, len(strong), chunk)]
    local = integrator.profile.grid.local_shape
    for k in range(integrator.config.profile_em_rounds):
        if k in SHAPE_ROUNDS and local is not None:
            _score_local_shape(integrator, local, [node_weights] * len(chunks), chunks)
        node_weights = _maximise(integrator, node_weights, chunks)
    integrator.profile.set_mean(node_weights[0])


@torch.no_grad()
def start_local_shape(integrator: Integrator, strong: ShoeboxBatch, chunk: int = 512) -> None:
    """Set how spots shift and widen of an integrator whose profile is known already.

    Parameters are those of :func:`start_profile`.
    """
    local = integrator.profile.grid.local_shape
    if local is None:
        return
    chunks = [strong[slice(i, i + chunk)] for i in range(0, len(strong), chunk)]
    typical = [
        integrator.profile.node_weights(
            integrator.profile_prior(integrator.features(batch.metadata)).mean
        )
        for batch in chunks
    ]
    for _ in SHAPE_ROUNDS:
        _score_local_shape(integrator, local, typical, chunks)


def _maximise(
    integrator: Integrator, node_weights: Tensor, chunks: Sequence[ShoeboxBatch]
) -> Tensor:
    """One round of expectation maximisation for the node weights, (1, G3, Gy, Gx)."""
    collected, exposed = torch.zeros_like(node_weights[0]), torch.zeros_like(node_weights[0])
    for batch in chunks:
        spots = _expected_spots(integrator, batch, node_weights)
        ratio = spots.valid * batch.counts / spots.rate
        # equal say for every spot: a few very bright ones must not set the profile alone
        share = spots.scale / spots.scale.clamp_min(1.0).sqrt()
        collected += spots.weights.back_project(share * ratio).sum(0)
        exposed += spots.weights.back_project(share * spots.valid).sum(0)
    # a node that hardly any recorded voxel sees keeps its share
    seen = exposed > 1e-3 * exposed.max()
    update = torch.where(seen, collected / exposed.clamp_min(1e-12), torch.ones_like(exposed))
    node_weights = node_weights * update
    return node_weights / node_weights.sum()


def _score_local_shape(
    integrator: Integrator,
    local: LocalShape,
    node_weights: Sequence[Tensor],
    chunks: Sequence[ShoeboxBatch],
) -> None:
    """One Fisher-scoring step for the coefficients of the spots' offset and width.

    ``node_weights``, (B or 1, G3, Gy, Gx), are those of each chunk.

    Each spot has its own intensity and background level, which are eliminated (Schur complement
    of its information); what is left tells of its six offsets and widths, and the features of its
    place spread that over the coefficients.
    """
    grid = integrator.profile.grid
    n = local.coefficients.numel()
    information = torch.eye(n, dtype=torch.float64) / local.prior_sd**2
    score = -local.coefficients.double().flatten().cpu() / local.prior_sd**2
    for batch, own_weights in zip(chunks, node_weights, strict=True):
        spots = _expected_spots(integrator, batch, own_weights)
        slopes = [spots.scale * s for s in slopes_of_profile(grid, spots.weights, own_weights)]
        design = torch.stack([spots.profile, spots.background, *slopes], -1).flatten(1, 3)
        weight = (spots.valid / spots.rate).flatten(1)
        normal = (design * weight[..., None]).transpose(1, 2) @ design
        normal[:, 1, 1] += integrator.config.background_level_sd**-2
        pull = ((weight * (batch.counts - spots.rate).flatten(1))[:, None] @ design)[:, 0]
        normal, pull = normal.double().cpu(), pull.double().cpu()
        removed = torch.linalg.solve(normal[:, :2, :2], normal[:, :2, 2:])  # (B, 2, 6)
        own = normal[:, 2:, 2:] - normal[:, 2:, :2] @ removed
        pull = pull[:, 2:] - (pull[:, None, :2] @ removed)[:, 0]
        say = spots.scale.flatten().clamp_min(1.0).rsqrt().double().cpu()
        features = local.features(batch.metadata).double().cpu()
        information += torch.einsum("b,bf,bg,bij->figj", say, features, features, own).reshape(
            n, n
        )
        score += torch.einsum("b,bf,bi->fi", say, features, pull).flatten()
    step = torch.linalg.solve(information, score).reshape(local.coefficients.shape)
    local.coefficients.add_(step.clamp(-0.5, 0.5).to(local.coefficients))


@dataclass(frozen=True)
class _Spots:
    """Strong spots as the starting profile expects them; (B, D, H, W) but for ``scale``."""

    weights: VoxelWeights
    profile: Tensor
    background: Tensor
    valid: Tensor
    beside: Tensor  # photons of neighbours
    scale: Tensor  # (B, 1, 1, 1), photons

    @property
    def rate(self) -> Tensor:
        return self.scale * self.profile + self.background + self.beside


def _expected_spots(integrator: Integrator, batch: ShoeboxBatch, node_weights: Tensor) -> _Spots:
    grid = integrator.profile.grid
    weights = grid.voxel_weights(batch.metadata)
    profile = weights.project(node_weights)
    background = integrator.mean_background(batch.metadata)
    valid = batch.is_valid.to(profile.dtype)
    neighbours = neighbour_profiles(grid, batch, node_weights)
    counts, seen, own, level = (v.flatten(1) for v in (batch.counts, valid, profile, background))
    intensity = first_intensities(counts, seen, own, level, neighbours)
    beside = torch.zeros_like(profile)
    if neighbours is not None:
        beside += torch.einsum("bk,bkp->bp", intensity[:, 1:], neighbours).view_as(beside)
    scale = intensity[:, 0, None, None, None].clamp_min(1.0)
    return _Spots(weights, profile, background, valid, beside, scale)


def slopes_of_profile(
    grid: ProfileGrid, weights: VoxelWeights, node_weights: Tensor
) -> list[Tensor]:
    """Differentiate the voxel profile by three offsets [sigma] and three log widths.

    The profile is linear in the integrals along each axis: these are what is differentiated.
    """
    slopes = []
    for k in range(6):
        axis, (low, high) = k % 3, (-DIFFERENCE, DIFFERENCE)
        edges, sigma = weights.edges[axis], grid.shape.sigma[axis]
        if k < 3:
            moved = [edges - step * sigma for step in (low, high)]
        else:
            moved = [edges * math.exp(-step) for step in (low, high)]
        before, after = (grid.axis_weights(axis, e) for e in moved)
        along = [weights.rotation, weights.slow, weights.fast]
        along[axis] = (after - before) / (high - low)
        rotation, slow, fast = along
        slopes.append(VoxelWeights(rotation, slow, fast, weights.edges).project(node_weights))
    return slopes
