r"""Scale of rotation data whose observations know where they lie on their sweeps.

The terms are those of :mod:`merge.model.scale`: frames, B, absorption, detector. What the
integrator knows there and a file does not is the width of the rocking curves. It is learned: an
observation averages the frames' scales over a Gaussian of standard deviation ``m / |zeta|``, with
one mosaic spread m for all, which the flicker from frame to frame determines. Where frames do not
flicker it does not matter.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor, nn

from merge.config import MergeConfig
from merge.intensities.config import IntensityMergeConfig
from merge.intensities.sweep_table import SweepTable
from merge.model.scale import ScaleModel
from merge.model.scale_features import (
    MAX_FRAMES_EACH_SIDE,
    Centres,
    ScaleFeatures,
    scale_features,
)

START_MOSAICITY = 0.1  # [deg]


class SweepScale(ScaleModel):
    """Terms of :class:`~merge.model.scale.ScaleModel`, with the mosaic spread learned.

    Parameters
    ----------
    table : SweepTable
        Of all observations; batches refer to its rows.
    config : IntensityMergeConfig
    """

    mosaicity_sd = 1.0  # of its logarithm

    def __init__(self, table: SweepTable, config: IntensityMergeConfig) -> None:
        features = _features(table, config.absorption_order)
        super().__init__(features, MergeConfig(absorption_order=config.absorption_order))
        self.table, self.absorption_order = table, config.absorption_order
        for f in fields(Centres):  # saved with the parameters
            self.register_buffer(f"centre_{f.name}", getattr(features.centres, f.name))
        first = np.concatenate([[0], np.cumsum(table.n_frames)[:-1]])
        for name, value in (
            ("z", table.xyz_px[:, 2]),
            ("degrees", table.degrees),
            ("first_frame", torch.as_tensor(first)[table.experiment]),
            ("last_frame", torch.as_tensor(np.cumsum(table.n_frames) - 1)[table.experiment]),
        ):
            self.register_buffer(name, value, persistent=False)
        self.log_mosaicity = nn.Parameter(
            torch.tensor(math.log(START_MOSAICITY), dtype=torch.float64)
        )
        wide = 3 * START_MOSAICITY / float(table.degrees.median())
        self.each_side = min(max(math.ceil(wide) + 1, 2), MAX_FRAMES_EACH_SIDE)

    @torch.no_grad()
    def restore_centres(self) -> None:
        """Describe the observations by the centres that were loaded with the parameters."""
        centres = Centres(*(getattr(self, f"centre_{f.name}").cpu() for f in fields(Centres)))
        features = _features(self.table, self.absorption_order, centres)
        for name in ("b_design", "harmonics", "position"):
            getattr(self, name).copy_(getattr(features, name))
        self.b_mean.copy_(centres.b)

    def centre_frame(self) -> Tensor:
        """Frame of each centroid, counted through all sweeps, (N,)."""
        frame = self.z.floor().long() + self.first_frame
        return torch.minimum(torch.maximum(frame, self.first_frame), self.last_frame)

    def log_mean_frame_scale(self, index: Tensor) -> Tensor:
        """Log of the frames' scales, averaged over the rocking curve, (B,)."""
        z = self.z[index]
        offset = torch.arange(-self.each_side, self.each_side + 1, device=z.device)
        frame = z.floor().long()[:, None] + offset
        rocking = self.log_mosaicity.clamp(-6.0, 1.5).exp() / self.degrees[index]
        edges = torch.cat([frame, frame[:, -1:] + 1], 1) - z[:, None]
        weight = torch.special.ndtr(edges / rocking[:, None]).diff(dim=1)
        frame = frame + self.first_frame[index, None]
        first, last = self.first_frame[index, None], self.last_frame[index, None]
        weight = torch.where((frame >= first) & (frame <= last), weight, 0.0) + 1e-12
        values = self.log_frame_scale.exp()[torch.minimum(torch.maximum(frame, first), last)]
        return (weight * values).sum(1).log() - weight.sum(1).log()

    @torch.no_grad()
    def start_drift(self) -> None:
        """Set the slow drift to what the frames' scales say as they are."""
        frames = self.log_frame_scale.split(self.n_frames)
        for gamma, drift in zip(frames, self.drift.split(self.n_drift_knots), strict=True):
            parts = torch.linspace(0, len(gamma), len(drift) + 1).long()
            for k in range(len(drift)):
                part = gamma[parts[k] : max(int(parts[k + 1]), int(parts[k]) + 1)]
                drift[k] = part.median()

    def penalty(self) -> Tensor:
        """Minus the log-prior of all parameters, up to a constant, () [nats]."""
        about = self.log_mosaicity - math.log(START_MOSAICITY)
        return super().penalty() + 0.5 * (about / self.mosaicity_sd) ** 2


def _features(
    table: SweepTable, absorption_order: int, centres: Centres | None = None
) -> ScaleFeatures:
    """Terms that do not change, to single precision: there may be millions of observations."""
    config = MergeConfig(absorption_order=absorption_order)
    widths = list(table.frame_width_deg)
    found = scale_features(table.to("cpu"), list(table.n_frames), widths, config, centres)
    none = found.frame[:, :0]
    return replace(
        found,
        frame=none,
        frame_weight=none.double(),
        b_design=found.b_design.float(),
        harmonics=found.harmonics.float(),
        position=found.position.float(),
    )
