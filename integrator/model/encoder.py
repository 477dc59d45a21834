"""Shoebox to posterior of the profile latents.

The encoder does not look at raw pixels but at their *score moments*: with r = J rho + b and the
share of signal T = J rho / r at the mean profile,

    M_abc = sum_p (n_p - r_p) T_p x^a y^b w^c,     a + b + c <= 3,

(x, y, w: voxel centre in standard deviations of the spot). These are the derivatives of the
log-likelihood with respect to shift, width, correlation and skew of the profile: what a network
would have to learn first, given for free, aligned to the centroid, free of the spot's brightness.
The network then only learns how far to trust them and what the position on the detector and in the
scan says beforehand (the prior mean, which weak spots fall back to).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from braggflux.integrator.types import ReflectionMetadata

EXPONENTS = [e for e in itertools.product(range(4), repeat=3) if sum(e) <= 3]
N_MOMENTS = len(EXPONENTS)


def score_moments(residual: Tensor, coordinates: Sequence[Tensor]) -> Tensor:
    """Moments ``M_abc`` of ``residual`` (B, D, H, W); coordinates (B, D), (B, H), (B, W)."""
    powers = [torch.stack([c**k for k in range(4)], -1) for c in coordinates]  # (B, n, 4)
    m = torch.einsum("bdhw,bwk->bdhk", residual, powers[2])
    m = torch.einsum("bdhk,bhj->bdjk", m, powers[1])
    m = torch.einsum("bdjk,bdi->bijk", m, powers[0])
    return torch.stack([m[:, i, j, k] for i, j, k in EXPONENTS], -1)


def independent_normal(mean: Tensor, sd: Tensor) -> Independent[Normal]:
    """Return the Normal of independent latents, (B, K) each; no step waits to check values."""
    return Independent(Normal(mean, sd, validate_args=False), 1, validate_args=False)


class PositionFeatures(nn.Module):
    """Where on the detector, in the scan and in reciprocal space, scaled to about [-1, 1]."""

    n_features = 12

    centre: Tensor
    half_range: Tensor

    def __init__(self, centre: Tensor, half_range: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)  # (3,) of xyz_px
        self.register_buffer("half_range", half_range)  # (3,)

    @classmethod
    def from_metadata(cls, metadata: ReflectionMetadata) -> PositionFeatures:
        """Scale by the range of the data."""
        low, high = metadata.xyz_px.min(0).values, metadata.xyz_px.max(0).values
        return cls((low + high) / 2, ((high - low) / 2).clamp_min(1.0))

    def forward(self, metadata: ReflectionMetadata) -> Tensor:
        """Features (B, n_features)."""
        p = (metadata.xyz_px - self.centre) / self.half_range
        x, y, z = p.unbind(-1)
        subpixel = metadata.xyz_px[:, :2] - metadata.xyz_px[:, :2].floor() - 0.5
        rest = torch.stack(
            [x * y, x**2 + y**2, metadata.zeta, 2 / metadata.d, metadata.frame_sigma.log()], -1
        )
        return torch.cat(
            [p, rest, subpixel, torch.sin(3 * z)[:, None], torch.cos(3 * z)[:, None]], -1
        )


class ProfilePrior(nn.Module):
    """Normal prior of the profile latents: mean a smooth function of the position."""

    def __init__(self, n_latent: int, n_features: int, width: int) -> None:
        super().__init__()
        first, last = nn.Linear(n_features, width), nn.Linear(width, n_latent)
        self.network = nn.Sequential(first, nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.log_sd = nn.Parameter(torch.full((n_latent,), -1.5))

    def forward(self, features: Tensor) -> Independent[Normal]:
        """p(z | position), (B, K)."""
        mean = self.network(features)
        return independent_normal(mean, self.log_sd.exp().expand_as(mean))


class ProfileEncoder(nn.Module):
    """q(z | shoebox): a correction to the prior, gated by the information in the spot.

    The posterior mean is ``prior mean + gain * network(moments)`` with gain = info / (info + c),
    and the network's say in the width is gated likewise: an empty box gets the prior, exactly.
    """

    def __init__(self, n_latent: int, n_features: int, width: int) -> None:
        super().__init__()
        self.n_latent = n_latent
        first, second = nn.Linear(N_MOMENTS + n_features + 2, width), nn.Linear(width, width)
        last = nn.Linear(width, 2 * n_latent)
        self.network = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        nn.init.normal_(last.weight, std=1e-3)
        nn.init.zeros_(last.bias)
        self.linear = nn.Linear(N_MOMENTS, n_latent, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.log_half_information = nn.Parameter(torch.full((n_latent,), 4.0))

    def forward(
        self, moments: Tensor, information: Tensor, features: Tensor, prior: Independent[Normal]
    ) -> Independent[Normal]:
        """Posterior of z, (B, K).

        Parameters
        ----------
        moments : Tensor, (B, N_MOMENTS)
            Score moments [photons].
        information : Tensor, (B,)
            Sum of J rho T [photons]: the signal photons that tell of the profile.
        features : Tensor, (B, F)
        prior : Independent Normal, (B, K)
        """
        relative = moments / (information[:, None] + 10.0)
        log_information = torch.log1p(information)[:, None]
        inputs = torch.cat(
            [10 * torch.tanh(relative), features, log_information / 5, relative[:, :1]], -1
        )
        shift, log_ratio = self.network(inputs).chunk(2, -1)
        gain = information[:, None] / (information[:, None] + self.log_half_information.exp())
        base = prior.base_dist
        mean = base.loc + gain * (shift + self.linear(torch.tanh(relative)))
        # data shrink the posterior from the prior's width as 1 / sqrt(1 + info / c)
        sd = base.scale * (1 - gain).sqrt() * torch.exp(gain * log_ratio.clamp(-3.0, 3.0))
        return independent_normal(mean, sd.clamp_min(1e-4))
