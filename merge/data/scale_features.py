"""What the scale of an observation depends on: frames, B, directions of the beams, detector.

Computed once; the parameters are those of :mod:`braggflux.merge.scale.rotation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from braggflux.merge.engine.config import MergeConfig
from braggflux.merge.scale.terms.absorption import real_harmonics
from braggflux.merge.scale.terms.b_factor import b_design
from braggflux.merge.scale.terms.frames import MAX_FRAMES_EACH_SIDE


class OnSweeps(Protocol):
    """Where observations lie on their sweeps, (N,) or (N, 3) each.

    Terms are those of :class:`braggflux.integrator.types.ReflectionMetadata`.
    """

    @property
    def experiment(self) -> Tensor: ...  # noqa: D102
    @property
    def xyz_px(self) -> Tensor: ...  # noqa: D102
    @property
    def xyz_mm(self) -> Tensor: ...  # noqa: D102
    @property
    def frame_sigma(self) -> Tensor: ...  # noqa: D102
    @property
    def s0_crystal(self) -> Tensor: ...  # noqa: D102
    @property
    def s1_crystal(self) -> Tensor: ...  # noqa: D102
    @property
    def d(self) -> Tensor: ...  # noqa: D102
    @property
    def lp(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Centres:
    """What features are centred and scaled by: part of the meaning of every parameter.

    Parameters
    ----------
    inv_d2 : Tensor, ()
        Mean 1/d^2 [1/A^2].
    largest_inv_d2 : Tensor, ()
    b : Tensor, (n_knots,)
        Mean of the interpolation of B.
    harmonics : Tensor, (n_lm,)
    position, half_width : Tensor, (2,)
        Of the spots on the detector.
    """

    inv_d2: Tensor
    largest_inv_d2: Tensor
    b: Tensor
    harmonics: Tensor
    position: Tensor
    half_width: Tensor


@dataclass(frozen=True)
class ScaleFeatures:
    """What the scale depends on, computed once per observation (N rows).

    Parameters
    ----------
    log_lp : Tensor, (N,)
    frame : Tensor, (N, M) int64
        Rows of the per-frame scale, counted through all experiments.
    frame_weight : Tensor, (N, M)
        Share of the rocking curve in each frame; rows sum to 1.
    b_design : Tensor, (N, n_knots)
        Interpolation of B times ``-1 / (2 d^2)``, both centred.
    harmonics : Tensor, (N, n_lm)
    position : Tensor, (N, 5)
        Detector position (3), scan position and resolution, scaled to about [-1, 1].
    centres : Centres
    n_frames, n_knots, n_drift_knots : tuple of int
        Frames, knots of B and knots of the drift of each experiment.
    """

    log_lp: Tensor
    frame: Tensor
    frame_weight: Tensor
    b_design: Tensor
    harmonics: Tensor
    position: Tensor
    centres: Centres
    n_frames: tuple[int, ...]
    n_knots: tuple[int, ...]
    n_drift_knots: tuple[int, ...]

    def to(self, device: torch.device | str) -> ScaleFeatures:
        """Copy to a device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return ScaleFeatures(**moved)


def scale_features(
    table: OnSweeps,
    n_frames: list[int],
    frame_width_deg: list[float],
    config: MergeConfig,
    centres: Centres | None = None,
) -> ScaleFeatures:
    """Compute :class:`ScaleFeatures` of every observation of a table.

    With ``centres`` of other data the parameters fitted to those mean the same here.
    """
    experiment = table.experiment
    first = torch.as_tensor(np.concatenate([[0], np.cumsum(n_frames)[:-1]]))[experiment]
    count = torch.as_tensor(n_frames)[experiment]
    z = table.xyz_px[:, 2].double()
    # frame_sigma holds the frame's own width (1/12); the rocking curve itself is narrower
    rocking = (table.frame_sigma.double() ** 2 - 1 / 12).clamp_min(1e-4).sqrt()
    each_side = min(max(int(torch.ceil(5 * rocking.max())), 2), MAX_FRAMES_EACH_SIDE)
    offsets = torch.arange(-each_side, each_side + 1)
    frame = z.floor().long()[:, None] + offsets
    lower = (frame - z[:, None]) / rocking[:, None]
    upper = lower + 1 / rocking[:, None]
    weight = torch.erf(upper / 2**0.5) - torch.erf(lower / 2**0.5)
    inside = (frame >= 0) & (frame < count[:, None])
    weight = torch.where(inside, weight, 0.0)
    # a centroid just outside the scan: all weight on the nearest frame
    nearest = (frame - z[:, None]).abs().argmin(1, keepdim=True)
    weight.scatter_add_(1, nearest, torch.full_like(z, 1e-9)[:, None])
    frame = torch.minimum(frame.clamp_min(0), count[:, None] - 1)
    weight = weight / weight.sum(1, keepdim=True)

    widths = torch.as_tensor(frame_width_deg, dtype=torch.float64)[experiment]
    spans = [abs(n * width) for n, width in zip(n_frames, frame_width_deg, strict=True)]
    n_knots = tuple(max(2, round(s / config.b_factor_spacing_deg) + 1) for s in spans)
    n_drift_knots = tuple(max(2, round(s / config.drift_spacing_deg) + 1) for s in spans)
    design = b_design((z * widths).abs(), experiment, spans, n_knots)
    directions = [-table.s0_crystal.double(), table.s1_crystal.double()]
    harmonics = sum(real_harmonics(v, config.absorption_order) for v in directions) / 2
    inv_d2 = table.d.double() ** -2
    c = centres or _centres(table, inv_d2, design, harmonics)
    return ScaleFeatures(
        log_lp=table.lp.double().log(),
        frame=frame + first[:, None],
        frame_weight=weight,
        # Centred: otherwise every change of B needs all frame scales and all F to follow.
        b_design=(design - c.b) * (-0.5 * (inv_d2 - c.inv_d2))[:, None],
        harmonics=harmonics - c.harmonics,
        position=_scaled_position(table, count, inv_d2, c),
        centres=c,
        n_frames=tuple(n_frames),
        n_knots=n_knots,
        n_drift_knots=n_drift_knots,
    )


def _centres(table: OnSweeps, inv_d2: Tensor, design: Tensor, harmonics: Tensor) -> Centres:
    xy = table.xyz_mm[:, :2].double()
    low, high = xy.min(0).values, xy.max(0).values
    half = ((high - low) / 2).clamp_min(1e-6)
    means = design.mean(0), harmonics.mean(0)
    return Centres(inv_d2.mean(), inv_d2.max(), *means, (high + low) / 2, half)


def _scaled_position(
    table: OnSweeps, n_frames: Tensor, inv_d2: Tensor, centres: Centres
) -> Tensor:
    scan = 2 * table.xyz_px[:, 2].double() / n_frames - 1
    resolution = 2 * inv_d2 / centres.largest_inv_d2 - 1
    xy = (table.xyz_mm[:, :2].double() - centres.position) / centres.half_width
    x, y = xy.unbind(-1)
    return torch.stack([x, y, x**2 + y**2 - 1, scan, resolution], -1)
