r"""Photons of neighbouring spots among the voxels of a box.

    n_p ~ Poisson(J rho_p + sum_n J_n rho_np + b_p)

A neighbour is close by on the detector, so its profile is that of the box's own place, moved by
the distance of the predicted centroids and with the neighbour's own length of the rocking curve.
Its intensity is solved together with the box's own and the background (``background``): what the
box tells of it is all in the box, no other pass is needed, and its uncertainty widens that of J.
What is expected of it from its symmetry mates can be added as a Gaussian prior.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from braggflux.integrator.model.profile import ProfileGrid
from braggflux.integrator.records import TensorRecord
from braggflux.integrator.types import ShoeboxBatch


@dataclass(frozen=True)
class NeighbourProfiles(TensorRecord):
    """Neighbours of a batch as its voxels see them.

    Parameters
    ----------
    profile : Tensor, (B, K, P)
        Share of each neighbour's photons in each voxel; 0 in empty places.
    mean, precision : Tensor, (B, K)
        What is expected of their intensity beforehand [photons], and the inverse of its variance;
        0 and 0 where nothing is. Empty places have a precision of 1.
    """

    profile: Tensor
    mean: Tensor
    precision: Tensor


@torch.no_grad()
def neighbour_profiles(
    grid: ProfileGrid,
    batch: ShoeboxBatch,
    node_weights: Tensor,
    expected: tuple[Tensor, Tensor] | None = None,
) -> NeighbourProfiles | None:
    """Profiles of the neighbours of a batch of boxes; None without any.

    Parameters
    ----------
    grid : ProfileGrid
    batch : ShoeboxBatch
    node_weights : Tensor, (B or 1, G3, Gy, Gx)
        Of a spot at the place of each box.
    expected : (Tensor, Tensor), (B, K), optional
        Mean and precision of the intensities beforehand, precision 0 where unknown.
    """
    neighbours = batch.neighbours
    if neighbours is None:
        return None
    box, place = torch.nonzero(neighbours.is_present, as_tuple=True)
    own = batch.metadata[box]
    moved = replace(
        own,
        xyz_px=own.xyz_px + neighbours.offset[box, place],
        zeta=neighbours.zeta[box, place],
        experiment=neighbours.experiment[box, place],
    )
    weights = node_weights if len(node_weights) == 1 else node_weights[box]
    voxels = grid.voxel_weights(moved).project(weights).flatten(1)
    shape = neighbours.is_present.shape
    profile = voxels.new_zeros(*shape, voxels.shape[1])
    profile[box, place] = voxels
    if expected is None:
        expected = voxels.new_zeros(shape), voxels.new_zeros(shape)
    mean, precision = (e.to(voxels.dtype) for e in expected)
    empty = (~neighbours.is_present).to(voxels.dtype)
    return NeighbourProfiles(profile, mean, precision + empty)
