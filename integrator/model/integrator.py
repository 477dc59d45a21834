"""Amortized variational integrator: raw shoeboxes to posteriors and photon-count likelihoods.

    n_p ~ Poisson(J rho_p(z) + b_p(theta))

``inference`` gives q(z | shoebox), q(theta) and the likelihood of J; ``generative`` the expected
counts; ``loss`` the terms of the ELBO, one value per observation. What is summed, and how often,
is decided in ``braggflux.pipelines.integration.joint_model`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Distribution,
    Gamma,
    Independent,
    Normal,
    TransformedDistribution,
    kl_divergence,
)

from braggflux.integrator.config import IntegratorConfig
from braggflux.integrator.distributions.shifted_poisson import (
    ShiftedPoisson,
    shifted_poisson_from_pixels,
)
from braggflux.integrator.model.background import (
    BackgroundFit,
    BackgroundModel,
    MeanBackground,
    all_spots,
)
from braggflux.integrator.model.encoder import (
    PositionFeatures,
    ProfileEncoder,
    ProfilePrior,
    score_moments,
)
from braggflux.integrator.model.local_shape import LocalShape, PlaceFeatures
from braggflux.integrator.model.neighbours import neighbour_profiles
from braggflux.integrator.model.profile import ProfileGrid, ProfileModel, SpotShape, VoxelWeights
from braggflux.integrator.types import Flag, IntensityTable, ReflectionMetadata, ShoeboxBatch


@dataclass(frozen=True)
class IntegrationPosterior:
    """What the integrator believes of a batch of shoeboxes.

    Parameters
    ----------
    p_profile, q_profile : Distribution, (B, K)
        Prior and posterior of the profile latents.
    profile : Tensor, (B, P)
        Profile of the latents that were used (a sample in training, the mean otherwise).
    background_fit : BackgroundFit
    reference : Tensor, (B,)
        Intensity J0 >= 0 at which the likelihood was matched [photons].
    likelihood : ShiftedPoisson
        Likelihood of J with profile and background given.
    information_fraction : Tensor, (B,)
        Share of its information that is left when profile and background are uncertain.
    """

    p_profile: Distribution
    q_profile: Distribution
    profile: Tensor
    background_fit: BackgroundFit
    reference: Tensor
    likelihood: ShiftedPoisson
    information_fraction: Tensor

    @property
    def marginal_likelihood(self) -> ShiftedPoisson:
        """Likelihood of J less the information spent on profile and background."""
        return self.likelihood.tempered(self.information_fraction)

    @property
    def q_intensity(self) -> Distribution:
        """Posterior of J under a flat prior: ``J + beta ~ Gamma(a + 1, t)``."""
        lik = self.marginal_likelihood
        gamma = Gamma(lik.effective_counts + 1.0, lik.exposure)
        shift = AffineTransform(-lik.effective_background, 1.0)
        return TransformedDistribution(gamma, [shift])


@dataclass(frozen=True)
class IntegratorLoss:
    """Terms of the ELBO, one value per observation, (B,) [nats].

    ``log_evidence`` is that of the pixels with a flat prior on J: the log-likelihood at its
    maximum over J plus Laplace's ``log sqrt(2 pi variance)``, without the constant
    ``-sum log n!``. The merge adds the density of the maximum given K F^2, which turns the flat
    prior into the hierarchical one.
    """

    log_evidence: Tensor
    kl_profile: Tensor
    kl_background: Tensor


class Integrator(nn.Module):
    """Profile, background and encoder together.

    Parameters
    ----------
    shape : SpotShape
    mean_background : MeanBackground
    features : PositionFeatures
    config : IntegratorConfig
    place : PlaceFeatures, optional
        What offset and width of the spots depend on; without it they are the same everywhere.
    """

    def __init__(
        self,
        shape: SpotShape,
        mean_background: MeanBackground,
        features: PositionFeatures,
        config: IntegratorConfig,
        place: PlaceFeatures | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.features = features
        self.mean_background = mean_background
        local_shape = None if place is None else LocalShape(place, torch.tensor(shape.sigma))
        self.profile = ProfileModel(
            ProfileGrid(shape, config.nodes_per_sigma, config.rotation_n_sigma, local_shape)
        )
        self.background = BackgroundModel(
            shape.box,
            config.background_level_sd,
            config.background_slope_sd,
            config.n_scoring_rounds,
        )
        n_latent = ProfileModel.n_latent
        self.profile_prior = ProfilePrior(n_latent, features.n_features, config.encoder_width)
        self.encoder = ProfileEncoder(n_latent, features.n_features, config.encoder_width)

    def inference(
        self,
        batch: ShoeboxBatch,
        expected: Tensor | None = None,
        *,
        sample: bool = False,
        noise: Tensor | None = None,
    ) -> IntegrationPosterior:
        """Posteriors of a batch.

        Parameters
        ----------
        batch : ShoeboxBatch
        expected : Tensor, (B,), optional
            Intensity expected from elsewhere [photons], NaN where unknown. It only chooses the
            weights of the pixels: the estimate stays free of it in the mean.
        sample : bool
            Draw the profile latents from their posterior (training) or take its mean. Steps of
            training leave the background a plane.
        noise : Tensor, (B, K), optional
            Standard normal numbers to draw with; by default new ones.
        """
        weights = self.profile.grid.voxel_weights(batch.metadata)
        features = self.features(batch.metadata)
        prior = self.profile_prior(features)
        mean_background = self.mean_background(batch.metadata).flatten(1)
        counts, is_valid = batch.counts.flatten(1), batch.is_valid.flatten(1)

        typical = self.profile.node_weights(prior.mean).detach()
        neighbours = neighbour_profiles(self.profile.grid, batch, typical)
        moments, information, start = self._encode_inputs(
            batch, weights, typical, mean_background, neighbours
        )
        posterior = self.encoder(moments, information, features, prior)
        latent = posterior.mean
        if sample and noise is None:
            latent = posterior.rsample()
        elif sample:
            latent = latent + noise * posterior.base_dist.scale
        node_weights = self.profile.node_weights(latent)
        profile = weights.project(node_weights).flatten(1).clamp_min(1e-12)
        fit = self.background.fit(
            counts,
            is_valid,
            profile.detach(),
            mean_background,
            start,
            neighbours,
            may_curve=self.config.curved_background and not sample,
        )
        reference = choose_reference(fit, expected)
        likelihood = shifted_poisson_from_pixels(
            counts + fit.deficit, profile, fit.beside, is_valid, reference
        )
        variance = self._profile_variance(weights, node_weights, batch, profile, fit, posterior)
        own = likelihood.variance(reference)
        fraction = fit.information_fraction * own / (own + reference**2 * variance)
        return IntegrationPosterior(
            prior, posterior, profile, fit, reference, likelihood, fraction.detach()
        )

    @torch.no_grad()
    def _profile_variance(
        self,
        weights: VoxelWeights,
        node_weights: Tensor,
        batch: ShoeboxBatch,
        profile: Tensor,
        fit: BackgroundFit,
        posterior: Independent[Normal],
    ) -> Tensor:
        """Relative variance of the estimate of J from the width of q(z), (B,).

        If the true profile is rho + delta, an estimate with weights w_p is off by the factor
        <delta, w> / <rho, w> over the recorded voxels: next to nothing for a strong, whole spot,
        and much where a gap or the edge of the box leaves the profile to extrapolate.
        """
        rate = fit.intensity.clamp_min(0.0)[:, None] * profile + fit.beside
        pixel = (batch.is_valid.flatten(1) * profile / rate).reshape(batch.counts.shape)
        slope = self.profile.sensitivity(weights, node_weights, pixel)
        overlap = (pixel.flatten(1) * profile).sum(1, keepdim=True).clamp_min(1e-12)
        return ((slope / overlap) ** 2 * posterior.variance).sum(1)

    @torch.no_grad()
    def _encode_inputs(
        self,
        batch: ShoeboxBatch,
        weights: VoxelWeights,
        node_weights: Tensor,
        mean_background: Tensor,
        neighbours: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score moments and information at the prior's profile, and a start for intensities."""
        profile = weights.project(node_weights)
        valid = batch.is_valid.to(profile.dtype)
        intensity = first_intensities(
            batch.counts.flatten(1),
            valid.flatten(1),
            profile.flatten(1),
            mean_background,
            neighbours,
        )
        signal = intensity[:, 0, None, None, None] * profile
        beside = mean_background
        if neighbours is not None:
            beside = beside + torch.einsum("bk,bkp->bp", intensity[:, 1:], neighbours)
        rate = signal + beside.reshape(profile.shape)
        share = valid * signal / rate
        shape = self.profile.grid.shape
        e3, y, x = (0.5 * (e[:, 1:] + e[:, :-1]) for e in weights.edges)
        step = weights.edges[0].diff(dim=1)
        width = (shape.sigma_m_deg**2 + step**2 / 12).sqrt()
        coordinates = [
            c.clamp(-4.0, 4.0) for c in (e3 / width, y / shape.sigma_y_px, x / shape.sigma_x_px)
        ]
        moments = score_moments((batch.counts - rate * valid) * share, coordinates)
        return moments, (signal * share).sum((1, 2, 3)), intensity

    def generative(self, posterior: IntegrationPosterior) -> Tensor:
        """Give the expected photons of each voxel at the reference intensity, (B, P)."""
        return posterior.reference[:, None] * posterior.profile + posterior.background_fit.beside

    def loss(self, batch: ShoeboxBatch, posterior: IntegrationPosterior) -> IntegratorLoss:
        """Terms of the ELBO of each observation."""
        rate = self.generative(posterior)
        counts = batch.counts.flatten(1)
        at_reference = torch.where(
            batch.is_valid.flatten(1), torch.xlogy(counts, rate) - rate, 0.0
        ).sum(-1)
        likelihood = posterior.marginal_likelihood
        rise = likelihood.log_maximum - likelihood.log_prob(posterior.reference)
        return IntegratorLoss(
            at_reference + rise + 0.5 * (2 * torch.pi * likelihood.observed_variance).log(),
            kl_divergence(posterior.q_profile, posterior.p_profile),
            self.background.kl(posterior.background_fit),
        )

    def intensity_table(
        self, metadata: ReflectionMetadata, posterior: IntegrationPosterior, flags: Tensor
    ) -> IntensityTable:
        """Write the stage contract for a batch, with its graph."""
        rejected = posterior.likelihood.exposure.detach() < self.config.min_exposure
        weight = posterior.profile.detach()
        background = (posterior.background_fit.background * weight).sum(-1) / weight.sum(-1)
        flags = flags | torch.where(rejected, Flag.REJECTED, 0)
        return IntensityTable(metadata, posterior.marginal_likelihood, background, flags)


def first_intensity(counts: Tensor, valid: Tensor, profile: Tensor, background: Tensor) -> Tensor:
    """Two rounds of Fisher scoring for J alone, from summation; (B,) >= 0 [photons]."""
    axes = tuple(range(1, counts.dim()))
    spot = (valid * profile).sum(axes).clamp_min(0.05)
    intensity = ((counts - background) * valid * (profile > 0.002)).sum(axes) / spot
    for _ in range(2):
        start = intensity.clamp_min(1.0).reshape(-1, *[1] * len(axes))
        weight = valid * profile / (start * profile + background)
        intensity = ((counts - background) * weight).sum(axes) / (profile * weight).sum(
            axes
        ).clamp_min(1e-12)
    return intensity.clamp_min(0.0)


def first_intensities(
    counts: Tensor,
    valid: Tensor,
    profile: Tensor,
    background: Tensor,
    neighbours: Tensor | None,
) -> Tensor:
    """Start for the photons of a spot and its neighbours, (B, 1 + K) >= 0; voxels are (B, P)."""
    own = first_intensity(counts, valid, profile, background)[:, None]
    if neighbours is None:
        return own
    spots = all_spots(profile, neighbours)
    net = (counts - background) * valid
    # least squares of each alone: too much where they overlap, but the right order
    seen = torch.einsum("bsp,bsp,bp->bs", spots, spots, valid)
    intensity = torch.einsum("bsp,bp->bs", spots, net) / seen.clamp_min(1e-9)
    for _ in range(2):
        rate = torch.einsum("bs,bsp->bp", intensity.clamp_min(1.0), spots) + background
        information = ((spots * (valid / rate)[:, None]) @ spots.transpose(1, 2)).double()
        information.diagonal(dim1=1, dim2=2).add_(1e-9)
        pull = torch.einsum("bsp,bp->bs", spots, net / rate).double()
        intensity = torch.linalg.solve(information, pull).to(counts.dtype)
    return intensity.clamp_min(0.0)


def choose_reference(fit: BackgroundFit, expected: Tensor | None) -> Tensor:
    """Intensity J0 at which the pixel likelihood is matched, (B,).

    The expectation from symmetry mates where there is one: weights that do not depend on the
    observation's own noise. The own estimate where there is none, or where the two disagree by
    more than a factor that noise can explain (then the expectation is what is wrong).
    """
    own = fit.intensity.clamp_min(0.0)
    if expected is None:
        return own
    expected = expected.to(own.dtype)
    spread = 5.0 * (expected.clamp_min(0.0) + 25.0).sqrt() + 0.2 * expected
    agrees = (own - expected).abs() < spread
    return torch.where(agrees, expected.clamp_min(0.0), own)
