"""Measures of each spot from its box alone: sums, centroid, agreement with the profile.

One pass over the shoeboxes after training, for the columns of integrated.refl that are neither
predicted nor fitted. A spot's *core* are the voxels that hold more than :data:`CORE` of its
profile each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.shoebox.mask import MaskBit
from braggflux.integrator.types import ReflectionMetadata
from braggflux.pipelines.integration.trainer import Trainer

Array = NDArray[np.float64]

CORE = 1e-3
#: Share of the profile that must be recorded before a sum is divided by it.
MIN_SHARE = 0.05
#: Variance of a position that may be anywhere in a voxel [voxels^2].
WITHIN_VOXEL = 1 / 12


@dataclass(frozen=True)
class SpotMeasures:
    """Measurements of spots, rows as in the store; all 0 where a spot was not integrated.

    Parameters
    ----------
    total, variance : ndarray, (N,)
        Counts less background on the exposed frames [photons]: as if no pixel of the spot's
        plane were lost, while what the ends of the scan cut off is missing.
    partiality : ndarray, (N,)
        Share of the profile on layers that were exposed whole.
    correlation : ndarray, (N,)
        Of counts less background with the profile, over the recorded voxels of the core.
    centroid, centroid_variance : ndarray, (N, 3)
        (fast, slow, frame) of counts above background in the core [pixels, pixels, frames from
        the start of the scan]; of a core without any, the middle of the box.
    background : ndarray, (N,)
        Counts of the background in the recorded core.
    n_core, n_valid, n_background : ndarray, (N,)
        Pixels, each on its frame: recorded in the core, recorded in the box, background.
    """

    total: Array
    variance: Array
    partiality: Array
    correlation: Array
    centroid: Array
    centroid_variance: Array
    background: Array
    n_core: Array
    n_valid: Array
    n_background: Array


@torch.no_grad()
def measure_spots(trainer: Trainer) -> SpotMeasures:
    """Measure every spot that was integrated, with the profile and background of now."""
    store = trainer.problem.store
    columns = {
        f.name: np.zeros((len(store), 3) if f.name.startswith("centroid") else len(store))
        for f in fields(SpotMeasures)
    }
    for batch in trainer.dataset.batches(trainer.config.training.batch_size):
        rows = batch.metadata.refl_row
        bits = store.read_raw(rows)[1].flatten(1)
        batch = batch.to(trainer.device)
        posterior = trainer.model.integrator.inference(batch)
        found = _measure(
            batch.counts.flatten(1).double(),
            batch.is_valid.flatten(1),
            posterior.profile.double(),
            posterior.background_fit.beside.double().expand_as(posterior.profile),
            (batch.metadata, _is_exposed(batch.metadata, store).to(trainer.device)),
            store.box,
        )
        per_layer = batch.metadata.frames_per_layer.double()
        valid, background = (
            ((bits & bit) > 0).sum(1) for bit in (MaskBit.VALID, MaskBit.BACKGROUND)
        )
        found["n_valid"], found["n_background"] = (
            n.to(per_layer) * per_layer for n in (valid, background)
        )
        for name, values in found.items():
            columns[name][rows.numpy()] = values.numpy(force=True)
    return SpotMeasures(**columns)


def _is_exposed(metadata: ReflectionMetadata, store: ShoeboxStore) -> Tensor:
    """Whether the scan recorded all frames of each layer of a box, (B, D)."""
    n_images = torch.tensor([int(e["n_images"]) for e in store.experiments])
    per_layer = metadata.frames_per_layer.cpu()[:, None]
    first = metadata.corner[:, :1].cpu() + torch.arange(store.box[0]) * per_layer
    last = n_images[metadata.experiment.cpu()][:, None]
    return (first >= 0) & (first + per_layer <= last)


def _measure(
    counts: Tensor,
    is_valid: Tensor,
    profile: Tensor,
    background: Tensor,
    place: tuple[ReflectionMetadata, Tensor],
    box: tuple[int, int, int],
) -> dict[str, Tensor]:
    """Measures of a batch, (B,) or (B, 3) each; ``place`` is metadata and exposed layers."""
    metadata, exposed = place
    core = is_valid & (profile > CORE)
    net = (counts - background) * core
    share = (profile * core).sum(1).clamp_min(MIN_SHARE)
    partiality = (profile.unflatten(1, box).sum((2, 3)) * exposed).sum(1).clamp(0, 1)
    whole_plane = partiality / share
    boxes = (x.unflatten(1, box) for x in (net, counts, profile))
    centroid, variance = _centroid(*boxes, metadata)
    return {
        "total": net.sum(1) * whole_plane,
        # an observed count of 0 is not known without error
        "variance": ((counts * core).sum(1) + 1.0) * whole_plane**2,
        "partiality": partiality,
        "correlation": _correlation(net, profile, core),
        "centroid": centroid,
        "centroid_variance": variance,
        "background": (background * core).sum(1),
        "n_core": core.sum(1) * metadata.frames_per_layer,
    }


def _centroid(
    net: Tensor, counts: Tensor, profile: Tensor, metadata: ReflectionMetadata
) -> tuple[Tensor, Tensor]:
    """Mean position of the photons above background and its variance, (B, 3).

    ``net``, ``counts`` and ``profile`` are (B, D, H, W). Photons of a voxel are known with
    their Poisson error, and where in it they fell is not known; nor is the place of a spot that
    is narrower than a voxel. Without a photon it may be anywhere in the box.
    """
    weight = net.clamp_min(0)
    total = weight.sum((1, 2, 3))
    values, variances = [], []
    for axis in (2, 1, 0):  # fast, slow, frame
        others = tuple(k + 1 for k in range(3) if k != axis)
        size = weight.shape[axis + 1]
        index = torch.arange(size, device=total.device) + 0.5
        mean = (weight.sum(others) * index).sum(1) / total
        spread = (index - mean[:, None]) ** 2 + WITHIN_VOXEL
        error = ((counts * (weight > 0)).sum(others) * spread).sum(1) / total**2
        error = error + _pixelation(profile.sum(others), index)
        middle, nowhere = (torch.full_like(total, x) for x in (size / 2, size**2 * WITHIN_VOXEL))
        # a layer is several frames deep where rocking curves are wide
        step = metadata.frames_per_layer.double() if axis == 0 else torch.ones_like(total)
        values.append(torch.where(total > 0, mean, middle) * step + metadata.corner[:, axis])
        variances.append(torch.where(total > 0, error, nowhere) * step**2)
    return torch.stack(values, 1), torch.stack(variances, 1)


def _pixelation(marginal: Tensor, index: Tensor) -> Tensor:
    """Variance of the error that voxels make in the centroid of a noiseless spot, (B,).

    A Gaussian of standard deviation s at x has the binned centroid
    ``x + sum_k (-1)^k exp(-2 pi^2 k^2 s^2) sin(2 pi k x) / (pi k)``: 1/12 for a point.
    """
    total = marginal.sum(1, keepdim=True)
    mean = (marginal * index).sum(1, keepdim=True) / total
    binned = (marginal * (index - mean) ** 2).sum(1) / total[:, 0]
    sigma2 = (binned - WITHIN_VOXEL).clamp_min(0)[:, None]
    k2 = torch.arange(1, 50, device=index.device) ** 2
    return (torch.exp(-4 * math.pi**2 * k2 * sigma2) / (2 * math.pi**2 * k2)).sum(1)


def _correlation(net: Tensor, profile: Tensor, core: Tensor) -> Tensor:
    """Pearson's, over the core, (B,); 0 where one side does not vary."""
    n = core.sum(1, keepdim=True).clamp_min(1)
    x, y = ((v * core - (v * core).sum(1, keepdim=True) / n) * core for v in (net, profile))
    norm = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(norm > 0, (x * y).sum(1) / norm.clamp_min(1e-300), 0.0)
