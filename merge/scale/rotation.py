r"""Scale of an observation: expected photons = K F^2.

    log K = -log(lp) + log sum_f w_f exp(gamma_f) - B(phi) / (2 d^2)
            + sum_lm a_lm (Y_lm(-s0) + Y_lm(s1)) / 2 + network

* ``gamma_f``: one scale per frame (beam flicker, illuminated volume), averaged over the frames
  that the reflection crosses with the weights ``w_f`` of its rocking curve;
  ``gamma`` is a slow drift (the crystal turns through the beam), piecewise linear over the scan,
  plus flicker that is independent from frame to frame; how much of either is learned;
* ``B(phi)``: radiation damage, piecewise linear over the scan. Only its change over the scan can
  be known beside F: its mean is 0, and ``gamma_f`` is the scale at the mean 1/d^2;
* ``a_lm``: transmission of the incident and the diffracted beam as one smooth surface in the frame
  of the crystal. The sum over the two directions is the same for a reflection and for the Friedel
  mate measured along the reversed path, whatever the order l, and a surface of a few dozen
  coefficients has no room for the thousands of Bijvoet differences;
* the network beside these terms sees only where on the detector a spot lies: response and profile
  errors that vary there. Given the scan too it would compete with B, and could tell Bijvoet mates
  apart. Without physical terms it is all there is, and gets scan and resolution as well.

Terms other than lp have Gaussian priors; ``penalty`` is minus their log.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from braggflux.merge.data.scale_features import ScaleFeatures
from braggflux.merge.engine.config import MergeConfig
from braggflux.merge.scale.terms.frames import ODD_SD, START_SD, SWEEP_SD, interpolate

N_DETECTOR_FEATURES = 3


class ScaleModel(nn.Module):
    """Physical terms and a small network.

    Parameters
    ----------
    features : ScaleFeatures
        Of all observations; batches refer to its rows.
    config : MergeConfig
    """

    b_sd = 3.0  # prior standard deviation of B [A^2]
    harmonic_sd = 0.3
    network_sd = 0.3

    def __init__(self, features: ScaleFeatures, config: MergeConfig) -> None:
        super().__init__()
        for name in ("log_lp", "frame", "frame_weight", "b_design", "harmonics", "position"):
            self.register_buffer(name, getattr(features, name), persistent=False)
        self.register_buffer("b_mean", features.centres.b, persistent=False)
        self.n_frames, self.n_knots = features.n_frames, features.n_knots
        self.physical = config.physical_scale
        zeros = lambda n: nn.Parameter(torch.zeros(n, dtype=torch.float64))  # noqa: E731
        self.log_frame_scale = zeros(sum(features.n_frames))
        # frames that no flicker explains: a shutter's fault, an attenuator
        odd = torch.zeros(sum(features.n_frames), dtype=torch.bool)
        self.register_buffer("is_odd", odd, persistent=False)
        self.n_drift_knots = features.n_drift_knots
        self.drift = zeros(sum(features.n_drift_knots))
        # standard deviation of a frame's log-scale about the drift, and of the drift's change from
        # knot to knot; learned
        self.log_flicker = nn.Parameter(torch.tensor(np.log(START_SD), dtype=torch.float64))
        self.log_drift_step = nn.Parameter(torch.tensor(np.log(START_SD), dtype=torch.float64))
        self.b_factor = zeros(features.b_design.shape[1])
        # bend of B from knot to knot [A^2]; learned. Damage is smooth, one knot is noisy.
        self.log_b_bend = nn.Parameter(torch.tensor(np.log(0.1), dtype=torch.float64))
        self.absorption = zeros(features.harmonics.shape[1])
        n_features = features.position.shape[1]
        self.n_inputs = N_DETECTOR_FEATURES if config.physical_scale else n_features
        self.network = None
        if config.scale_network_width:
            width = config.scale_network_width
            self.network = nn.Sequential(
                nn.Linear(self.n_inputs, width), nn.Tanh(), nn.Linear(width, 1)
            ).double()
            nn.init.zeros_(self.network[-1].weight)
            nn.init.zeros_(self.network[-1].bias)

    def forward(self, index: Tensor) -> Tensor:
        """Log K of the observations in rows ``index``, (B,)."""
        log_scale = -self.log_lp[index]
        if self.physical:
            log_scale = (
                log_scale
                + self.log_mean_frame_scale(index)
                + self.b_design[index].double() @ self.b_factor
                + self.harmonics[index].double() @ self.absorption
            )
        if self.network is not None:
            position = self.position[index, : self.n_inputs].double()
            log_scale = log_scale + self.network(position)[:, 0]
        return log_scale

    def frame_scales(self) -> Tensor:
        """Log-scale of every frame, (F,)."""
        return self.log_frame_scale

    def log_mean_frame_scale(self, index: Tensor) -> Tensor:
        """Log of the frames' scales, averaged over the rocking curve, (B,)."""
        frames = self.frame_scales().exp()[self.frame[index]]
        return (self.frame_weight[index] * frames).sum(-1).log()

    @torch.no_grad()
    def fresh_crystal_factor(self, inv_d2: Tensor) -> Tensor:
        """Turn intensities at the mean dose into those at the start of the first scan.

        B is centred in training; what the crystal scattered before any damage is larger by
        ``exp((B_mean - B_start) / (2 d^2))``.
        """
        if not self.physical:
            return torch.ones_like(inv_d2)
        change = self.b_mean @ self.b_factor - self.b_factor[0]
        return torch.exp(0.5 * change * inv_d2)

    @torch.no_grad()
    def frame_prior_bound(self) -> Tensor:
        """Bound of the curvature of the prior of each frame's scale, ()."""
        return torch.exp(-2 * self.log_flicker.clamp(-7.0, 0.0)) + 1 / 0.1**2

    def penalty(self) -> Tensor:
        """Minus the log-prior of all scale parameters, up to a constant, () [nats]."""
        total = self.log_frame_scale.new_zeros(())
        if self.physical:
            total = total + self._physical_penalty()
        if self.network is not None:
            for p in self.network.parameters():
                total = total + 0.5 * (p**2).sum() / self.network_sd**2
        return total

    def _physical_penalty(self) -> Tensor:
        total = self.log_frame_scale.new_zeros(())
        flicker, step = self.log_flicker.clamp(-7.0, 0.0), self.log_drift_step.clamp(-7.0, 0.0)
        drifts, scales = self.drift.split(self.n_drift_knots), self.frame_scales()
        # the mean of all belongs to the structure factors; sweeps may differ by any factor
        total = total + 0.5 * (scales.mean() / 0.1) ** 2
        frames, odds = scales.split(self.n_frames), self.is_odd.split(self.n_frames)
        for gamma, drift, odd in zip(frames, drifts, odds, strict=True):
            about = gamma - interpolate(drift, len(gamma))
            usual = about[~odd]
            total = total + 0.5 * (usual**2).sum() * torch.exp(-2 * flicker) + len(usual) * flicker
            total = total + 0.5 * ((about[odd] / ODD_SD) ** 2).sum()
            change = drift.diff()
            total = total + 0.5 * (change**2).sum() * torch.exp(-2 * step) + len(change) * step
            total = total + 0.5 * ((gamma.mean() - scales.mean()) / SWEEP_SD) ** 2
        # weak priors of the two: without them few frames could run one to zero
        for log_sd in (flicker, step):
            total = total + 0.5 * ((log_sd - np.log(START_SD)) / 1.0) ** 2
        total = total + 0.5 * (self.b_factor**2).sum() / self.b_sd**2
        bend = self.log_b_bend.clamp(-7.0, 2.0)
        for knots in self.b_factor.split(self.n_knots):
            change = knots.diff(n=2)
            total = total + 0.5 * (change**2).sum() * torch.exp(-2 * bend) + len(change) * bend
        total = total + 0.5 * ((bend - np.log(0.1)) / 1.0) ** 2
        return total + 0.5 * (self.absorption**2).sum() / self.harmonic_sd**2
