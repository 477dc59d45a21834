r"""Scale of rotation data whose observations know where they lie on their sweeps.

The terms are those of :mod:`braggflux.merge.scale.rotation`: frames, B, absorption, detector. What
the integrator knows there and a file does not is the width of the rocking curves. It is learned:
an observation averages the frames' scales over a Gaussian of standard deviation ``m / |zeta|``,
with one mosaic spread m for all, which the flicker from frame to frame determines. Where frames do
not flicker it does not matter.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor, nn

from braggflux.merge.config import IntensityMergeConfig
from braggflux.merge.data.scale_features import (
    MAX_FRAMES_EACH_SIDE,
    Centres,
    ScaleFeatures,
    scale_features,
)
from braggflux.merge.data.sweeps import SweepTable
from braggflux.merge.engine.config import MergeConfig
from braggflux.merge.scale.rotation import ScaleModel, interpolate

START_MOSAICITY = 0.1  # [deg]
#: Log-scale about the drift that no flicker explains: at least this, and so many robust standard
#: deviations; on frames with so many observations.
LEAST_STEP, N_DEVIATIONS, MIN_OBSERVATIONS = math.log(1.6), 7.0, 10
#: Frames on each side that say what is usual.
N_NEIGHBOURS = 8
#: Share of a rocking curve within such a frame, or without, that makes a scale doubtful.
LEAST_SHARE = 0.02
#: Sweeps that may have a response of their own that moves with the scan.
MAX_MOVING = 8


class SweepScale(ScaleModel):
    """Terms of :mod:`braggflux.merge.scale.rotation`, with the mosaic spread learned.

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
        self.register_buffer("is_odd", self.is_odd)  # saved with the parameters
        self.register_buffer("has_flicker", torch.tensor(config.flicker != "off"))
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

    def frame_scales(self) -> Tensor:
        """Log-scale of every frame, (F,): the slow drift alone where frames do not flicker."""
        if bool(self.has_flicker):
            return self.log_frame_scale
        return torch.where(self.is_odd, self.log_frame_scale, self.slow_drift())

    def slow_drift(self) -> Tensor:
        """Log-scale of every frame without its flicker, (F,)."""
        drifts = zip(self.drift.split(self.n_drift_knots), self.n_frames, strict=True)
        return torch.cat([interpolate(knots, n) for knots, n in drifts])

    def log_mean_frame_scale(self, index: Tensor) -> Tensor:
        """Log of the frames' scales, averaged over the rocking curve, (B,)."""
        frame, weight = self._rocking_curve(index)
        return (weight * self.frame_scales().exp()[frame]).sum(1).log() - weight.sum(1).log()

    @torch.no_grad()
    def crosses_steps(self) -> Tensor:
        """Observations whose rocking curves cross into an odd frame or out of it, (N,) bool.

        How much of them such a frame has is known no better than the rocking curves.
        """
        crosses = torch.zeros_like(self.z, dtype=torch.bool)
        if bool(self.is_odd.any()):
            frame, weight = self._rocking_curve(torch.arange(len(crosses), device=crosses.device))
            share = (weight * self.is_odd[frame]).sum(1) / weight.sum(1)
            crosses = torch.minimum(share, 1.0 - share) > LEAST_SHARE
        return crosses

    def _rocking_curve(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Frames that each observation crosses, and their weights, (B, m) each."""
        z = self.z[index]
        offset = torch.arange(-self.each_side, self.each_side + 1, device=z.device)
        frame = z.floor().long()[:, None] + offset
        rocking = self.log_mosaicity.clamp(-6.0, 1.5).exp() / self.degrees[index]
        edges = torch.cat([frame, frame[:, -1:] + 1], 1) - z[:, None]
        weight = torch.special.ndtr(edges / rocking[:, None]).diff(dim=1)
        frame = frame + self.first_frame[index, None]
        first, last = self.first_frame[index, None], self.last_frame[index, None]
        weight = torch.where((frame >= first) & (frame <= last), weight, 0.0) + 1e-12
        return torch.minimum(torch.maximum(frame, first), last), weight

    @torch.no_grad()
    def start_drift(self, count: Tensor) -> None:
        """Set the slow drift to what the frames' scales say as they are, and find odd frames.

        Parameters
        ----------
        count : Tensor, (F,)
            Observations that the scale of each frame was taken from.
        """
        self.is_odd.fill_(False)
        enough = count >= MIN_OBSERVATIONS
        if bool(enough.any()):
            # the fewer observations, the less the first scale of a frame says
            fewer = (count[enough].double().median() / count.clamp_min(1)).clamp_min(1.0).sqrt()
            frames, known = (v.split(self.n_frames) for v in (self.log_frame_scale, enough))
            near = torch.cat([_running_median(*part) for part in zip(frames, known, strict=True)])
            self._find_odd(near, enough, fewer)
            self._set_drift()
            self._find_odd(self.slow_drift(), enough, fewer)
        self._set_drift()

    def _find_odd(self, usual: Tensor, enough: Tensor, fewer: Tensor) -> None:
        """Add frames that are far from what is usual near them, (F,) each."""
        about = (self.log_frame_scale - usual).abs()
        spread = 1.4826 * float(about[enough & ~self.is_odd].median())
        limit = (N_DEVIATIONS * spread * fewer).clamp_min(LEAST_STEP)
        self.is_odd.logical_or_(enough & (about > limit))

    def _set_drift(self) -> None:
        """Medians of the frames near each knot that are not odd."""
        frames = self.log_frame_scale.split(self.n_frames)
        drifts, odds = self.drift.split(self.n_drift_knots), self.is_odd.split(self.n_frames)
        for gamma, drift, odd in zip(frames, drifts, odds, strict=True):
            ends = torch.linspace(0, len(gamma), len(drift) + 1, device=gamma.device)
            parts = ends.long().tolist()
            lost = []
            for k in range(len(drift)):
                span = slice(parts[k], max(parts[k + 1], parts[k] + 1))
                usual = gamma[span][~odd[span]]
                if len(usual):
                    drift[k] = usual.median()
                else:
                    lost.append(k)
            known = [k for k in range(len(drift)) if k not in lost]
            for k in lost if known else []:
                drift[k] = drift[min(known, key=lambda other, k=k: abs(other - k))]

    def penalty(self) -> Tensor:
        """Minus the log-prior of all parameters, up to a constant, () [nats]."""
        about = self.log_mosaicity - math.log(START_MOSAICITY)
        return super().penalty() + 0.5 * (about / self.mosaicity_sd) ** 2


def _running_median(values: Tensor, known: Tensor) -> Tensor:
    """Median of the known values among the neighbours of each frame and itself, (n,)."""
    padded = torch.nn.functional.pad(
        torch.where(known, values, torch.nan), (N_NEIGHBOURS, N_NEIGHBOURS), value=torch.nan
    )
    return padded.unfold(0, 2 * N_NEIGHBOURS + 1, 1).nanmedian(1).values


def _features(
    table: SweepTable, absorption_order: int, centres: Centres | None = None
) -> ScaleFeatures:
    """Terms that do not change, to single precision: there may be millions of observations."""
    order = absorption_order if table.has_beams else 0
    config = MergeConfig(absorption_order=order)
    widths = list(table.frame_width_deg)
    known = centres
    if centres is not None and not table.has_beams:
        known = replace(centres, harmonics=centres.harmonics[:0])
    found = scale_features(table.to("cpu"), list(table.n_frames), widths, config, known)
    harmonics = found.harmonics
    if not table.has_beams:
        harmonics = _moving_response(table, found.position, absorption_order)
        mean = harmonics.mean(0) if centres is None else centres.harmonics
        harmonics = harmonics - mean
        found = replace(found, centres=replace(found.centres, harmonics=mean))
    none = found.frame[:, :0]
    return replace(
        found,
        frame=none,
        frame_weight=none.double(),
        b_design=found.b_design.float(),
        harmonics=harmonics.float(),
        position=found.position.float(),
    )


def _moving_response(table: SweepTable, position: Tensor, order: int) -> Tensor:
    """Place of absorption where directions are not known, (N, m).

    A surface in the frame of the crystal that the beams wander over is, seen from the detector, a
    smooth function of the place whose terms come and go with the rotation: products of powers of
    x and y and of cosines along the scan, as fast as the harmonics of that order turn.
    """
    x, y, _, scan, _ = position.double().unbind(-1)
    powers = torch.stack([x, y, x**2, x * y, y**2], -1)
    columns = []
    spans = zip(table.n_frames, table.frame_width_deg, strict=True)
    if len(table.n_frames) > MAX_MOVING or not table.has_positions:
        return powers[:, :0]
    for k, (n, width) in enumerate(spans):
        n_waves = min(math.ceil(2 * order * abs(n * width) / 360.0), 2 * order)
        angle = torch.arange(1, n_waves + 1) * (math.pi / 2) * (scan[:, None] + 1)
        waves = torch.where((table.experiment == k)[:, None], angle.cos(), 0.0)
        columns.append((waves[:, :, None] * powers[:, None]).flatten(1))
    return torch.cat(columns, 1)
