r"""Spot profile: a density over (rotation, slow, fast), integrated over voxels.

The density is a sum of hat functions on a regular grid around the predicted centroid. Its axes are
pixels along slow and fast, and ``e3 = zeta (phi - phi_c)`` [deg] along the rotation: in e3 the
rocking curve has one width for all reflections (Kabsch, Acta Cryst. 2010, D66, 133), but for what
domains of finite size add (``RockingWidth``), of which it is scaled free, so one grid serves
reflections near to and far from the rotation axis. ``local_shape`` moves and stretches the
axes as spots do at their place. Node weights are

    w_g = softmax_g( log_mean_g + sum_k z_k basis_kg ),   z ~ Normal(prior),

and the profile is the *integral* over a voxel, which for hat functions is exact and separates into
three small matrices. Spots narrower than a pixel or a frame therefore need no special care, and
the profile sums to 1 over the whole spot, masked voxels included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from braggflux.integrator.model.local_shape import LocalShape
from braggflux.integrator.prediction.rocking import RockingWidth
from braggflux.integrator.types import ReflectionMetadata

#: Standard deviations from the centre beyond which nodes lie ever wider apart, and by how much:
#: a spot's tails are smooth, and a node costs the same everywhere.
CORE_SIGMA = 3.0
TAIL_GROWTH = 1.5
AXES = ("rotation", "slow", "fast")


@dataclass(frozen=True)
class SpotShape:
    """Measured extent of the spots, the box that holds them and the frame width of each sweep.

    ``rocking`` tells how the rocking width ``sigma_m_deg`` depends on the resolution; by default
    it does not.
    """

    sigma_x_px: float
    sigma_y_px: float
    sigma_m_deg: float
    box: tuple[int, int, int]  # (D, H, W)
    frame_width_deg: tuple[float, ...]
    rocking: RockingWidth | None = None

    @property
    def sigma(self) -> tuple[float, float, float]:
        """Standard deviations along (e3, slow, fast) [deg, px, px]."""
        return self.sigma_m_deg, self.sigma_y_px, self.sigma_x_px


@dataclass(frozen=True)
class VoxelWeights:
    """Integrals of the hat functions over the voxels of a batch, one matrix per axis.

    ``edges`` are the voxels' edges on the grid, see :meth:`ProfileGrid.voxel_edges`.
    """

    rotation: Tensor  # (B, D, G3)
    slow: Tensor  # (B, H, Gy)
    fast: Tensor  # (B, W, Gx)
    edges: tuple[Tensor, Tensor, Tensor]

    def project(self, node_weights: Tensor) -> Tensor:
        """Voxel profile (B, D, H, W) of node weights (B or 1, G3, Gy, Gx)."""
        n, height, width = len(self.fast), self.slow.shape[1], self.fast.shape[1]
        n_rotation, n_slow, n_fast = node_weights.shape[1:]
        nodes = node_weights.reshape(-1, n_rotation * n_slow, n_fast)
        # each product leaves its own axis in front, so that the next needs no copy
        if len(nodes) == 1:
            w = self.fast.reshape(-1, n_fast) @ nodes[0].T
        else:
            w = torch.bmm(self.fast, nodes.transpose(1, 2))
        w = w.reshape(n, width * n_rotation, n_slow)
        w = torch.bmm(self.slow, w.transpose(1, 2))
        w = w.reshape(n, height * width, n_rotation)
        w = torch.bmm(self.rotation, w.transpose(1, 2))
        return w.reshape(n, -1, height, width)

    def back_project(self, voxels: Tensor) -> Tensor:
        """Adjoint of :meth:`project`: (B, G3, Gy, Gx) of voxel values (B, D, H, W)."""
        n, depth, height, width = voxels.shape
        w = torch.bmm(self.rotation.transpose(1, 2), voxels.reshape(n, depth, -1))
        w = w.reshape(n, -1, height, width)
        w = torch.matmul(self.slow[:, None].transpose(-1, -2), w)
        return torch.matmul(w, self.fast[:, None])


def hat_integral(u: Tensor, left: Tensor | float = 1.0, right: Tensor | float = 1.0) -> Tensor:
    """Integral from minus infinity to ``u`` of a hat function of unit area at 0.

    ``left`` and ``right`` are the distances to where it falls to zero.
    """
    below = (left + u.clamp_max(0.0)).clamp_min(0.0) ** 2 / left
    above = (right - u.clamp_min(0.0)).clamp_min(0.0) ** 2 / right
    return torch.where(u < 0, below / (left + right), 1 - above / (left + right))


def _axis_weights(edges: Tensor, nodes: Tensor) -> Tensor:
    """Share of each node's hat function inside each interval: (B, n_edges - 1, n_nodes)."""
    step = nodes.diff()
    left, right = torch.cat([step[:1], step]), torch.cat([step, step[-1:]])
    cumulative = hat_integral(edges[..., None] - nodes, left, right)  # (B, E, G)
    return cumulative[:, 1:] - cumulative[:, :-1]


class ProfileGrid(nn.Module):
    """Grid of nodes and the starting density.

    Parameters
    ----------
    shape : SpotShape
    nodes_per_sigma : float
    rotation_n_sigma : float
        Half width of the grid along e3, in rocking-curve standard deviations.
    local_shape : LocalShape, optional
        Offset and width of the spots by place; without it they are the same everywhere.
    """

    frame_width_deg: Tensor
    nodes_fast: Tensor
    nodes_slow: Tensor
    nodes_rotation: Tensor

    def __init__(
        self,
        shape: SpotShape,
        nodes_per_sigma: float,
        rotation_n_sigma: float,
        local_shape: LocalShape | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.local_shape = local_shape
        _, height, width = shape.box
        self.register_buffer("frame_width_deg", torch.tensor(shape.frame_width_deg))
        for name, half_width, sigma in (
            ("nodes_fast", width / 2, shape.sigma_x_px),
            ("nodes_slow", height / 2, shape.sigma_y_px),
            ("nodes_rotation", rotation_n_sigma * shape.sigma_m_deg, shape.sigma_m_deg),
        ):
            self.register_buffer(name, _nodes(half_width, sigma, nodes_per_sigma))

    @property
    def size(self) -> tuple[int, int, int]:
        """(G3, Gy, Gx)."""
        return len(self.nodes_rotation), len(self.nodes_slow), len(self.nodes_fast)

    def scaled_coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Node coordinates in standard deviations of the spot, each (G3, Gy, Gx)."""
        s = self.shape
        rotation, slow, fast = torch.meshgrid(
            self.nodes_rotation / s.sigma_m_deg,
            self.nodes_slow / s.sigma_y_px,
            self.nodes_fast / s.sigma_x_px,
            indexing="ij",
        )
        return rotation, slow, fast

    def voxel_weights(self, metadata: ReflectionMetadata) -> VoxelWeights:
        """Integrate the hat functions over the voxels of each reflection's box."""
        return self.weights_between(self.voxel_edges(metadata))

    def weights_between(self, edges: tuple[Tensor, Tensor, Tensor]) -> VoxelWeights:
        """Integrate the hat functions between given voxel edges (:meth:`voxel_edges`)."""
        rotation, slow, fast = (self.axis_weights(k, e) for k, e in enumerate(edges))
        return VoxelWeights(rotation, slow, fast, edges)

    def axis_weights(self, axis: int, edges: Tensor) -> Tensor:
        """Integrate the hat functions along one of :data:`AXES`, (B, n_edges - 1, n_nodes)."""
        return _axis_weights(edges, getattr(self, f"nodes_{AXES[axis]}"))

    def voxel_edges(self, metadata: ReflectionMetadata) -> tuple[Tensor, Tensor, Tensor]:
        """Voxel edges on the grid: e3 [deg] (B, D+1), slow and fast [px].

        Distances from the centroid, counted in the width that spots have at their place.
        """
        edges = []
        layer = metadata.frames_per_layer.to(self.nodes_fast.dtype)
        # xyz is (fast, slow, frame), corner and box are (frame, slow, fast)
        for axis, (n, column) in enumerate(zip(self.shape.box, (2, 1, 0), strict=True)):
            offset = (
                metadata.corner[:, axis].to(self.nodes_fast.dtype) - metadata.xyz_px[:, column]
            )
            steps = torch.arange(n + 1, device=offset.device)
            edges.append(offset[:, None] + (steps * layer[:, None] if axis == 0 else steps))
        edges[0] = edges[0] * self._frame_step(metadata)[:, None]
        if self.local_shape is not None:
            offset, width = self.local_shape(metadata)
            edges = [(e - offset[:, k, None]) / width[:, k, None] for k, e in enumerate(edges)]
        rotation, slow, fast = edges
        return rotation, slow, fast

    def _frame_step(self, metadata: ReflectionMetadata) -> Tensor:
        """Frame width along e3, as if rocking curves were ``sigma_m_deg`` wide, (B,) [deg]."""
        step = metadata.zeta * self.frame_width_deg[metadata.experiment]
        rocking = self.shape.rocking
        return step if rocking is None else step * self.shape.sigma_m_deg / rocking.at(metadata.d)


def _nodes(half_width: float, sigma: float, per_sigma: float) -> Tensor:
    """Node coordinates: even in the core, ever wider apart in the tails, past ``half_width``."""
    side = [0.0]
    step = sigma / per_sigma
    while side[-1] < half_width or len(side) < 4:
        if side[-1] > CORE_SIGMA * sigma:
            step *= TAIL_GROWTH
        side.append(side[-1] + step)
    return torch.tensor([-c for c in side[:0:-1]] + side)


class ProfileModel(nn.Module):
    """Mean profile, and the ``K`` directions in which a profile may differ from it.

    The directions start as the Hermite-like polynomials of a Gaussian's log-density: three
    shifts, six widths and correlations, three skews; training turns them.
    """

    n_latent = 12

    def __init__(self, grid: ProfileGrid) -> None:
        super().__init__()
        self.grid = grid
        e3, y, x = (c.clamp(-CORE_SIGMA, CORE_SIGMA) for c in grid.scaled_coordinates())
        # a Gaussian with exponential tails: the start can raise a tail, and hardly lower one
        radii = torch.stack(grid.scaled_coordinates()).abs()
        inside = radii.clamp_max(CORE_SIGMA)
        self.log_mean = nn.Parameter((0.5 * inside**2 - inside * radii).sum(0))
        second = [x**2 - 1, y**2 - 1, e3**2 - 1, x * y, x * e3, y * e3]
        third = [c**3 - 3 * c for c in (x, y, e3)]
        basis = torch.stack([x, y, e3, *(0.5 * s for s in second), *(t / 6 for t in third)])
        self.basis = nn.Parameter(basis)

    def node_weights(self, latent: Tensor | None = None) -> Tensor:
        """Node weights that sum to 1, (B or 1, G3, Gy, Gx), for latents z (B, K)."""
        log_density = self.log_mean.flatten()[None]
        if latent is not None:
            log_density = log_density + latent @ self.basis.flatten(1)
        return torch.softmax(log_density, -1).reshape(-1, *self.grid.size)

    def forward(self, weights: VoxelWeights, latent: Tensor | None = None) -> Tensor:
        """Voxel profile, (B, D, H, W)."""
        return weights.project(self.node_weights(latent))

    @torch.no_grad()
    def sensitivity(self, weights: VoxelWeights, node_weights: Tensor, pixel: Tensor) -> Tensor:
        """Differentiate ``sum_p pixel_p rho_p`` with respect to each latent, (B, K).

        Parameters
        ----------
        weights : VoxelWeights
        node_weights : Tensor, (B, G3, Gy, Gx)
        pixel : Tensor, (B, D, H, W)
        """
        value = (weights.back_project(pixel) * node_weights).flatten(1)  # (B, G)
        basis = self.basis.flatten(1)
        mean = node_weights.flatten(1) @ basis.T  # softmax: only what differs from the mean moves
        return value @ basis.T - value.sum(1, keepdim=True) * mean

    @torch.no_grad()
    def set_mean(self, node_weights: Tensor) -> None:
        """Start from given node weights (G3, Gy, Gx), smoothed by a floor far below the peak."""
        floor = 1e-7 * node_weights.max()
        self.log_mean.copy_(torch.log(node_weights + floor))
