"""Variational merging: photon-count likelihoods to posteriors of structure-factor amplitudes.

    J_i = K_i u_i F_h^2,    F_h ~ double-Wilson,    q(F_h) = Nakagami(k_h, Omega_h)

``inference`` gives q(F), ``generative`` the intensity it expects of each observation, ``loss`` the
terms of the ELBO. The divergence of each group of Bijvoet mates is a global term: it is weighted
with the share of the group's observations that the batch holds, so that any set of batches that
covers the data once adds up to the full batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.integrator.types import IntensityTable
from braggflux.merge.data.scale_features import ScaleFeatures
from braggflux.merge.engine.config import MergeConfig
from braggflux.merge.engine.likelihood import observation_likelihood
from braggflux.merge.engine.prior import DoubleWilsonPrior
from braggflux.merge.engine.types import MergeBatch, MergeLoss
from braggflux.merge.prior.anisotropy import anisotropic_design, invariant_tensors
from braggflux.merge.prior.mate_correlation import (
    estimate_one_minus_r2,
    mean_half_set_covariance,
    random_halves,
)
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.scale.rotation import ScaleModel


def merge_batch(table: IntensityTable, refl_id: Tensor) -> MergeBatch:
    """Bind a table to unique reflections, all rows; ``refl_id`` (N,) >= 0."""
    return MergeBatch(
        refl_id=refl_id,
        effective_counts=table.likelihood.effective_counts.double(),
        effective_background=table.likelihood.effective_background.double(),
        exposure=table.likelihood.exposure.double(),
        scale_index=table.metadata.refl_row,
    )


def usable(table: IntensityTable, refl_id: Tensor) -> Tensor:
    """Tell which observations enter the merge: of a known reflection and not rejected, (N,)."""
    return (refl_id >= 0) & table.is_integrated


class Merger(nn.Module):
    """Scale model, error model, prior and q(F).

    Parameters
    ----------
    asu : ReciprocalAsu
    features : ScaleFeatures
        Of every observation of the experiment.
    n_obs : Tensor, (R,) int64
        Observations of each unique reflection, for the weights of the global terms.
    config : MergeConfig
    """

    def __init__(
        self, asu: ReciprocalAsu, features: ScaleFeatures, n_obs: Tensor, config: MergeConfig
    ) -> None:
        super().__init__()
        self.config = config
        inv_d2 = torch.as_tensor(asu.d, dtype=torch.float64) ** -2
        self.register_buffer("inv_d2", inv_d2)
        tensors = invariant_tensors(asu.cell, asu.space_group)
        wilson = Wilson(
            inv_d2,
            torch.as_tensor(asu.epsilon),
            torch.as_tensor(asu.is_centric),
            config.n_wilson_knots,
            torch.as_tensor(anisotropic_design(asu, tensors)) if config.anisotropic else None,
        )
        plus = np.flatnonzero(asu.friedel_sign > 0)
        mate = asu.friedel_mate[plus]
        order = np.argsort(np.argsort(-asu.d[plus]))
        shell = order * config.n_friedel_shells // max(len(plus), 1)
        self.prior = DoubleWilsonPrior(
            wilson,
            torch.as_tensor(plus),
            torch.as_tensor(mate),
            torch.as_tensor(shell),
            config.n_friedel_shells,
            config.double_wilson,
        )
        group = np.zeros(len(asu), dtype=np.int64)
        group[plus], group[mate] = np.arange(len(plus)), np.arange(len(plus))
        self.register_buffer("group", torch.as_tensor(group))
        self.register_buffer("n_obs", n_obs)
        n_group = torch.zeros(len(plus), dtype=torch.int64).index_add_(0, self.group, n_obs)
        self.register_buffer("n_group", n_group)
        self.scale = ScaleModel(features, config)
        self.likelihood = observation_likelihood(
            config.handover, config.relative_error, config.outlier_fraction
        )
        self.log_spread = nn.Parameter(torch.zeros(len(asu), dtype=torch.float64))
        self.log_concentration = nn.Parameter(torch.zeros(len(asu), dtype=torch.float64))

    def inference(self) -> Nakagami:
        """q(F) of every unique reflection, (R,)."""
        # 0.3: below, the implicit cusp at F = 0 is narrower than anything the data can say
        return Nakagami(
            self.log_concentration.exp().clamp(0.3, 1e9),
            self.log_spread.exp(),
            validate_args=False,
        )

    def generative(self, batch: MergeBatch, q: Nakagami) -> tuple[Tensor, Tensor]:
        """Give K F^2 at the quadrature nodes of q(F), (Q, B) [photons], and weights (Q,)."""
        nodes, weights = q.intensity_nodes(self.config.n_nodes)
        return self.scale(batch.scale_index).exp() * nodes[:, batch.refl_id], weights

    def loss(self, batch: MergeBatch, q: Nakagami) -> MergeLoss:
        """Terms of the ELBO."""
        expected, weights = self.generative(batch, q)
        log_density = self.likelihood(batch.likelihood, expected)  # (Q, B)
        penalty = self.scale.penalty() + self.prior.wilson.penalty()
        return MergeLoss(weights @ log_density, self.prior.kl(q), penalty)

    def count_observations(self, refl_id: Tensor) -> None:
        """Count the observations anew, (N,): the integrator rejects some that the frames hold.

        Counted in, they would take part of the prior of their group with them.
        """
        self.n_obs.copy_(torch.bincount(refl_id, minlength=len(self.n_obs)))
        self.n_group.zero_().index_add_(0, self.group, self.n_obs)

    def group_weights(self, refl_id: Tensor) -> Tensor:
        """Share of each group's observations that a batch holds, (P,)."""
        counted = torch.bincount(self.group[refl_id], minlength=len(self.n_group))
        return counted.double() / self.n_group.clamp_min(1)

    @torch.no_grad()
    def expected_intensity(self, refl_id: Tensor, scale_index: Tensor) -> Tensor:
        """K <F^2> of observations, (B,) [photons]."""
        return self.scale(scale_index).exp() * self.log_spread.exp()[refl_id]

    @torch.no_grad()
    def scaled_observations(self, batch: MergeBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled intensity, its variance, and probability to be no outlier, each (B,).

        The intensity is the prior-free estimate divided by K; the variance is that expected at
        the merged intensity, with the relative error.
        """
        scale = self.scale(batch.scale_index).exp()
        expected = scale * self.log_spread.exp()[batch.refl_id]
        likelihood = batch.likelihood
        variance = self.likelihood.variance(likelihood, expected) / scale**2
        good = self.likelihood.responsibility(likelihood, expected)
        return likelihood.mode / scale, variance, good

    @torch.no_grad()
    def start(self, batch: MergeBatch) -> None:
        """Start from inverse-variance means of the observations, shrunk towards Wilson."""
        scale = self.scale(batch.scale_index).exp()
        likelihood = batch.likelihood
        value = likelihood.mode / scale
        variance = likelihood.observed_variance / scale**2 + (0.05 * value) ** 2
        total = torch.zeros_like(self.log_spread)
        weight = torch.zeros_like(self.log_spread)
        weight.index_add_(0, batch.refl_id, 1 / variance)
        total.index_add_(0, batch.refl_id, value / variance)
        seen = weight > 0
        mean = total / weight.clamp_min(1e-30)
        self.prior.wilson.start(mean, seen)
        sigma = self.prior.wilson.epsilon * self.prior.wilson.wilson_sigma()
        noise = weight.clamp_min(1e-30) ** -0.5
        floor = torch.minimum(noise, sigma) * 0.5
        spread = torch.where(seen, torch.maximum(mean, floor), sigma)
        k = torch.where(seen, (spread / noise) ** 2, 1.0).clamp(0.6, 1e6)
        mate = self._mate_row()
        lonely = ~seen & seen[mate]  # F(-) never seen: start at F(+)
        spread = torch.where(lonely, spread[mate], spread)
        self.log_spread.copy_(spread.log())
        self.log_concentration.copy_(k.log())

    @torch.no_grad()
    def restart_doubted(self, batch: MergeBatch) -> int:
        """Start q(F) anew where most observations of a group of mates pass for outliers.

        Far from them q(F) may sit on a single wrong observation, which no step leaves.
        The median of all observations of the group is on the side of the majority.

        Returns
        -------
        int
            Groups started anew.
        """
        value, variance, good = self.scaled_observations(batch)
        group = self.group[batch.refl_id]
        n_doubted = torch.bincount(group[good < 0.5], minlength=len(self.n_group))
        doubted = 2 * n_doubted > self.n_group
        chosen = doubted[group]
        if not chosen.any():
            return 0
        median, sigma = grouped_median(value[chosen], variance[chosen].sqrt(), group[chosen])
        rows = torch.nonzero(doubted[self.group])[:, 0]
        number = (doubted.cumsum(0) - 1)[self.group[rows]]
        spread = torch.maximum(median[number], sigma[number])
        self.log_spread[rows] = spread.log()
        self.log_concentration[rows] = (spread / sigma[number]).square().clamp(0.6, 1e6).log()
        return int(doubted.sum())

    def _mate_row(self) -> Tensor:
        mate = torch.arange(len(self.log_spread), device=self.log_spread.device)
        plus, minus = self.prior.plus_row, self.prior.minus_row
        mate[plus] = minus
        mate[minus] = plus
        return mate

    @torch.no_grad()
    def update_friedel_correlation(self, batch: MergeBatch, seed: int) -> None:
        """Set 1 - r^2 by shell from half-set Bijvoet differences."""
        prior = self.prior
        if not (prior.coupled and prior.has_mate.any()):
            return
        value, variance, good = self.scaled_observations(batch)
        sigma = (prior.wilson.epsilon * prior.wilson.wilson_sigma())[prior.plus_row]
        amplitude2 = 0.5 * (
            self.log_spread.exp()[prior.plus_row] + self.log_spread.exp()[prior.minus_row]
        )
        norm = 2 * (amplitude2 * sigma).sqrt()
        # near F = 0 a difference of intensities says nothing of a difference of amplitudes
        usable_group = prior.has_mate & (amplitude2 > 0.2 * sigma)
        own = torch.arange(len(value), device=value.device)
        product, known = mean_half_set_covariance(
            batch.refl_id,
            value,
            good / variance,
            prior.plus_row,
            prior.minus_row,
            norm,
            random_halves(own, torch.Generator().manual_seed(seed)),
        )
        keep = known & usable_group
        prior.one_minus_r2.copy_(
            estimate_one_minus_r2(
                product[keep], prior.shell[keep], len(prior.one_minus_r2), prior.one_minus_r2
            )
        )


def grouped_median(value: Tensor, sigma: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Middle value of each group (the lower of two), and its sigma, (G,) each.

    Each observation has one vote: a wrong one that claims to be precise must not win.

    Parameters
    ----------
    value, sigma : Tensor, (N,)
    group : Tensor, (N,) int64
        Numbers with gaps; the results are in their order.
    """
    _, group = torch.unique(group, return_inverse=True)
    order = value.argsort()
    order = order[group[order].argsort(stable=True)]
    size = torch.bincount(group)
    middle = order[size.cumsum(0) - size + (size - 1) // 2]
    return value[middle], sigma[middle]
