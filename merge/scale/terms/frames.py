r"""Scale of the frames of a sweep, averaged over the frames that a reflection crosses.

    log K += log sum_f w_f exp(gamma_f)

``gamma_f`` is a slow drift (the crystal turns through the beam), piecewise linear over the scan,
plus flicker that is independent from frame to frame; how much of either is learned. Frames that no
flicker explains (a shutter's fault, an attenuator) are *odd*: free, not bound to the drift.

The weights ``w_f`` are those of the rocking curve, a Gaussian. Where its width is known (to our
own integrator) it is kept; where a file does not say it, the width is ``m / |zeta|`` with one
mosaic spread m for all, learned from the flicker. Where frames do not flicker it does not matter.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.sweeps import SweepTable
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.scale.term import (
    AddUp,
    ScaleTerm,
    keep_sums,
    log_ratio,
    parts,
    start_unseen_groups,
)

#: Start of the learned standard deviations of flicker and drift, in the log.
START_SD = 0.03
MEAN_SD = 0.1  # of the mean of all, which belongs to the amplitudes
SWEEP_SD = 2.0  # of a sweep's log-scale about that of all
#: Standard deviation about the drift of a frame that no flicker explains.
ODD_SD = 1.0
START_MOSAICITY, MOSAICITY_SD = 0.1, 1.0  # [deg]; of its logarithm
#: Frames on each side of the centroid whose scales are averaged, at most.
MAX_FRAMES_EACH_SIDE = 11
#: Log-scale about the drift that no flicker explains: at least this, and so many robust standard
#: deviations; on frames with so many observations.
LEAST_STEP, N_DEVIATIONS, MIN_OBSERVATIONS = math.log(1.6), 7.0, 10
#: Frames on each side that say what is usual.
N_NEIGHBOURS = 8
#: Share of a rocking curve within an odd frame, or without, that makes a scale doubtful.
LEAST_SHARE = 0.02
DAMPING = 0.6  # of Newton steps: amplitudes move at the same time
MAX_STEP = 0.7  # in the log: far from the optimum the information is not to be trusted


def interpolate(knots: Tensor, n: int) -> Tensor:
    """Values at the middles of ``n`` frames, (n,), of a curve with knots from end to end."""
    x = (torch.arange(n, dtype=knots.dtype, device=knots.device) + 0.5) / n * (len(knots) - 1)
    left = x.floor().long().clamp_max(len(knots) - 2)
    return knots[left] + (x - left) * (knots[left + 1] - knots[left])


class FrameScale(ScaleTerm):
    """Scale of each frame.

    Parameters
    ----------
    sweeps : SweepTable
        Of all observations.
    drift_spacing_deg : float
        Rotation between knots of the drift.
    has_flicker : bool
        False leaves the drift alone.
    """

    is_odd: Tensor
    has_flicker: Tensor
    z: Tensor
    degrees: Tensor
    rocking: Tensor
    first_frame: Tensor
    last_frame: Tensor
    log_mosaicity: nn.Parameter | None

    def __init__(
        self, sweeps: SweepTable, drift_spacing_deg: float = 2.0, has_flicker: bool = True
    ) -> None:
        super().__init__()
        self.n_frames = sweeps.n_frames
        self.n_drift_knots = sweeps.knots_along(drift_spacing_deg)

        def parameter(value: Tensor | float) -> nn.Parameter:
            return nn.Parameter(torch.as_tensor(value, dtype=torch.float64))

        self.log_frame_scale = parameter(torch.zeros(sum(self.n_frames)))
        self.drift = parameter(torch.zeros(sum(self.n_drift_knots)))
        # standard deviation of a frame's log-scale about the drift, and of the drift's change from
        # knot to knot
        self.log_flicker = parameter(np.log(START_SD))
        self.log_drift_step = parameter(np.log(START_SD))
        # saved with the parameters
        self.register_buffer("is_odd", torch.zeros(sum(self.n_frames), dtype=torch.bool))
        self.register_buffer("has_flicker", torch.tensor(has_flicker))
        self._flickers = has_flicker  # the same on the host: asked for in every step
        self.register_load_state_dict_post_hook(FrameScale._read_flicker)  # type: ignore[no-untyped-call]
        end = np.cumsum(sweeps.n_frames)
        for name, value in (
            ("z", sweeps.xyz_px[:, 2]),
            ("degrees", sweeps.degrees),
            ("rocking", sweeps.rocking),
            ("first_frame", torch.as_tensor(end - sweeps.n_frames)[sweeps.experiment]),
            ("last_frame", torch.as_tensor(end - 1)[sweeps.experiment]),
        ):
            self.register_buffer(name, value, persistent=False)
        self.log_mosaicity = None
        if sweeps.rocking is None:
            self.log_mosaicity = parameter(math.log(START_MOSAICITY))
            reach = math.ceil(3 * START_MOSAICITY / float(sweeps.degrees.median())) + 1
        else:
            reach = math.ceil(5 * float(sweeps.rocking.max()))
        self.each_side = min(max(reach, 2), MAX_FRAMES_EACH_SIDE)

    @classmethod
    def of(cls, table: ObservationTable, config: MergeConfig) -> Self | None:
        """For rotation data with a physical scale."""
        if table.sweeps is None:
            return None
        return cls(table.sweeps, config.drift_spacing_deg, config.flicker != "off")

    def forward(self, batch: Batch) -> Tensor:
        """Log of the frames' scales, averaged over the rocking curve, (T,)."""
        frame, weight = self._rocking_curve(batch.term_rows)
        return (weight * self.frame_scales().exp()[frame]).sum(1).log() - weight.sum(1).log()

    def centre_frame(self) -> Tensor:
        """Frame of each centroid, counted through all sweeps, (N,)."""
        frame = self.z.floor().long() + self.first_frame
        return torch.minimum(torch.maximum(frame, self.first_frame), self.last_frame)

    def frame_scales(self) -> Tensor:
        """Log-scale of every frame, (F,): the slow drift alone where frames do not flicker."""
        if self._flickers:
            return self.log_frame_scale
        return torch.where(self.is_odd, self.log_frame_scale, self.slow_drift())

    def stop_flicker(self) -> None:
        """Let frames have the slow drift alone."""
        self.has_flicker.fill_(False)
        self._flickers = False

    def _read_flicker(self, _keys: object) -> None:
        self._flickers = bool(self.has_flicker)

    def slow_drift(self) -> Tensor:
        """Log-scale of every frame without its flicker, (F,)."""
        drifts = zip(parts(self.drift, self.n_drift_knots), self.n_frames, strict=True)
        return torch.cat([interpolate(knots, n) for knots, n in drifts])

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
        if self.log_mosaicity is None:
            rocking = self.rocking[index]
        else:
            rocking = self.log_mosaicity.clamp(-6.0, 1.5).exp() / self.degrees[index]
        edges = torch.cat([frame, frame[:, -1:] + 1], 1) - z[:, None]
        weight = torch.special.ndtr(edges / rocking[:, None]).diff(dim=1)
        frame = frame + self.first_frame[index, None]
        first, last = self.first_frame[index, None], self.last_frame[index, None]
        weight = torch.where((frame >= first) & (frame <= last), weight, 0.0) + 1e-12
        return torch.minimum(torch.maximum(frame, first), last), weight

    @torch.no_grad()
    def start(self, batch: Batch, observed: Tensor, expected: Tensor) -> bool:
        """Take the mean ratio of each frame, and from these the drift."""
        frame, n = self.centre_frame()[batch.rows], len(self.log_frame_scale)
        self.log_frame_scale.add_(log_ratio(observed, expected, frame, n))
        self.log_frame_scale.sub_(self.log_frame_scale.mean())
        self.start_drift(torch.bincount(frame, batch.observations.is_used.double(), minlength=n))
        return True

    def start_unseen(
        self, batch: Batch, was_used: Tensor, observed: Tensor, expected: Tensor
    ) -> bool:
        """Take the mean ratio of each frame that was held out."""
        frame = self.centre_frame()[batch.rows]
        start_unseen_groups(self.log_frame_scale, frame, was_used, observed, expected)
        return True

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
            frames, known = (parts(v, self.n_frames) for v in (self.log_frame_scale, enough))
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
        frames = parts(self.log_frame_scale, self.n_frames)
        drifts, odds = (
            parts(self.drift, self.n_drift_knots),
            parts(self.is_odd, self.n_frames),
        )
        for gamma, drift, odd in zip(frames, drifts, odds, strict=True):
            ends = torch.linspace(0, len(gamma), len(drift) + 1, device=gamma.device)
            first = ends.long().tolist()
            lost = []
            for k in range(len(drift)):
                span = slice(first[k], max(first[k + 1], first[k] + 1))
                usual = gamma[span][~odd[span]]
                if len(usual):
                    drift[k] = usual.median()
                else:
                    lost.append(k)
            known = [k for k in range(len(drift)) if k not in lost]
            for k in lost if known else []:
                _, nearest = min((abs(other - k), other) for other in known)
                drift[k] = drift[nearest]

    def penalty(self) -> Tensor:
        """Minus the log-prior, () [nats]."""
        flicker, step = self.log_flicker.clamp(-7.0, 0.0), self.log_drift_step.clamp(-7.0, 0.0)
        drifts, scales = parts(self.drift, self.n_drift_knots), self.frame_scales()
        # the mean of all belongs to the amplitudes; sweeps may differ by any factor
        total = 0.5 * (scales.mean() / MEAN_SD) ** 2
        frames, odds = parts(scales, self.n_frames), parts(self.is_odd, self.n_frames)
        for gamma, drift, odd in zip(frames, drifts, odds, strict=True):
            about = gamma - interpolate(drift, len(gamma))
            usual, others = torch.where(odd, 0.0, about), torch.where(odd, about, 0.0)
            n_usual = (~odd).sum()
            total = total + 0.5 * (usual**2).sum() * torch.exp(-2 * flicker) + n_usual * flicker
            total = total + 0.5 * ((others / ODD_SD) ** 2).sum()
            change = drift.diff()
            total = total + 0.5 * (change**2).sum() * torch.exp(-2 * step) + len(change) * step
            total = total + 0.5 * ((gamma.mean() - scales.mean()) / SWEEP_SD) ** 2
        # weak priors of the two: without them few frames could run one to zero
        for log_sd in (flicker, step):
            total = total + 0.5 * ((log_sd - np.log(START_SD)) / 1.0) ** 2
        if self.log_mosaicity is None:
            return total
        about = self.log_mosaicity - math.log(START_MOSAICITY)
        return total + 0.5 * (about / MOSAICITY_SD) ** 2

    @property
    def newton_parameters(self) -> tuple[nn.Parameter, ...]:
        """The log-scales of the frames, unless they are held fixed."""
        return (self.log_frame_scale,) if self.log_frame_scale.requires_grad else ()

    @torch.no_grad()
    def newton_step(self, batch: Batch, information: Tensor, add_up: AddUp = keep_sums) -> None:
        """Move the frames' scales by their gradients over their information.

        That of a frame is ``sum_i w_i p_if``, with the share p of the frame in the scale of the
        observation: a bound of its row of the information matrix, so that steps of all frames at
        once converge (Jacobi's method on a diagonally dominant matrix). Amplitudes move at the
        same time; an error that both could heal would be healed twice, hence the damping.
        """
        if self.log_frame_scale.grad is None:
            return
        frame, weight = self._rocking_curve(batch.rows)
        share = weight * self.frame_scales().exp()[frame]
        share = share / share.sum(1, keepdim=True)
        bound = torch.zeros_like(self.log_frame_scale)
        bound.index_add_(0, frame.flatten(), (information[:, None] * share).flatten())
        bound = bound + batch.share * self._prior_bound()
        add_up([bound])
        change = self.log_frame_scale.grad / bound
        self.log_frame_scale.sub_(DAMPING * change.clamp(-MAX_STEP, MAX_STEP))

    def _prior_bound(self) -> Tensor:
        """Bound of the curvature of the prior of each frame's scale, ()."""
        return torch.exp(-2 * self.log_flicker.clamp(-7.0, 0.0)) + 1 / MEAN_SD**2


def _running_median(values: Tensor, known: Tensor) -> Tensor:
    """Median of the known values among the neighbours of each frame and itself, (n,)."""
    padded = torch.nn.functional.pad(
        torch.where(known, values, torch.nan), (N_NEIGHBOURS, N_NEIGHBOURS), value=torch.nan
    )
    return padded.unfold(0, 2 * N_NEIGHBOURS + 1, 1).nanmedian(1).values
