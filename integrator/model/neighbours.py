r"""Photons of neighbouring spots among the voxels of a box.

    n_p ~ Poisson(J rho_p + sum_n J_n rho_np + b_p)

A neighbour is close by on the detector, so its profile is that of the box's own place, moved by
the distance of the predicted centroids and with the neighbour's own length of the rocking curve.
Its intensity is solved together with the box's own and the background (``background``): what the
box tells of it is all in the box, no other pass is needed, and its uncertainty widens that of J.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from braggflux.integrator.model.profile import ProfileGrid
from braggflux.integrator.types import ShoeboxBatch


@torch.no_grad()
def neighbour_profiles(
    grid: ProfileGrid, batch: ShoeboxBatch, node_weights: Tensor
) -> Tensor | None:
    """Share of each neighbour's photons in each voxel, (B, K, P); None without neighbours.

    Empty places are 0.

    Parameters
    ----------
    grid : ProfileGrid
    batch : ShoeboxBatch
    node_weights : Tensor, (B or 1, G3, Gy, Gx)
        Of a spot at the place of each box.
    """
    neighbours = batch.neighbours
    if neighbours is None:
        return None
    box, place = _places(neighbours.is_present)
    own = batch.metadata[box]
    moved = replace(
        own,
        xyz_px=own.xyz_px + neighbours.offset[box, place],
        zeta=neighbours.zeta[box, place],
        experiment=neighbours.experiment[box, place],
    )
    weights = node_weights if len(node_weights) == 1 else node_weights[box]
    voxels = grid.voxel_weights(moved).project(weights).flatten(1)
    is_present = neighbours.is_present[box, place]
    profile = voxels.new_zeros(*neighbours.is_present.shape, voxels.shape[1])
    profile[box, place] = torch.where(is_present[:, None], voxels, 0.0)
    return profile


def _places(is_present: Tensor) -> tuple[Tensor, Tensor]:
    """Box and place of the neighbours, (M,) each; on a GPU of all places, (B K,).

    How many neighbours there are is known on the device alone, and a GPU would be waited for.
    """
    if is_present.device.type == "cpu":
        box, place = torch.nonzero(is_present, as_tuple=True)
        return box, place
    number = torch.arange(is_present.numel(), device=is_present.device)
    return number // is_present.shape[1], number % is_present.shape[1]
