"""Held-out observations: how well the model predicts what it has not seen.

Two kinds, each a share of the data: whole images (their scales come from their neighbours in the
scan, or from the image encoder, which sees one half of such an image to predict the other) and
single observations of the other images (their scales are known, their reflections are determined
by what is left). A cluster is held out as a whole: its members have an error in common, and
predicting one from the other would reward memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.model.merger import Merger


@dataclass(frozen=True)
class Split:
    """Masks of the held-out observations, and of those the encoder may see, (N,) bool each."""

    by_image: Tensor
    by_observation: Tensor
    is_seen: Tensor

    @property
    def is_used(self) -> Tensor:
        """Observations to train on."""
        return ~(self.by_image | self.by_observation)


@dataclass(frozen=True)
class Prediction:
    """Quality of a prediction; None where nothing was held out or it does not vary."""

    n_obs: int
    log_likelihood: float | None
    cc_pred: float | None

    @classmethod
    def of(
        cls, measured: NDArray[Any], expected: NDArray[Any], density: NDArray[Any]
    ) -> Prediction:
        """From intensities, (N,) each, and log-densities of observations or clusters."""
        n_obs = len(measured)
        if n_obs < 10:
            return cls(n_obs, None, None)
        total = float(density.sum()) / n_obs
        if measured.std() == 0 or expected.std() == 0:
            return cls(n_obs, total, None)
        return cls(n_obs, total, float(np.corrcoef(measured, expected)[0, 1]))


def split(
    table: ObservationTable, share: float, is_still: bool, seed: int | Sequence[int]
) -> Split:
    """Hold out ``share`` of the exposure groups and ``share`` of the clusters of the others."""
    rng = np.random.default_rng(seed)
    o = table.observations
    n_units = round(share * table.n_units)
    if share and table.n_units > 5:
        n_units = max(n_units, 1)
    chosen = rng.permutation(table.n_units)[:n_units]
    by_image = torch.as_tensor(np.isin(o.exposure_group.numpy(), chosen))
    drawn = rng.random(int(o.cluster.max()) + 1) < share
    by_observation = torch.as_tensor(drawn)[o.cluster] & ~by_image
    seen = ~by_observation
    if is_still:
        half = torch.as_tensor(rng.random(len(seen)) < 0.5)
        seen &= ~by_image | half
    return Split(by_image, by_observation, seen)


@torch.no_grad()
def log_likelihoods(merger: Merger, table: ObservationTable, chosen: Tensor) -> Tensor:
    """Predictive log-density of each cluster that is wholly chosen, (C,); NaN for the others."""
    batch = table.everything()
    density = predictive_density(merger, batch)
    if batch.cluster is not None:
        left = torch.zeros(len(density), dtype=torch.int64, device=density.device)
        left.index_add_(0, batch.cluster, (~chosen).long())
        chosen = left == 0
    return torch.where(chosen, density, torch.nan)


@torch.no_grad()
def predictive_density(merger: Merger, batch: Batch) -> Tensor:
    """Log-density of each cluster given what q(F) has learned from other observations, (C,).

    With the whole width of the amplitudes, in the variance and in <F^2>: from the width given the
    relatives, which is too small where they are alike, held-out data would choose too small an r.
    """
    q = merger.inference()
    e = merger.generative(batch, q)
    width = merger.prior.width(q, merger.information)
    row = batch.first_rows
    slope = 2 * e.scale * q.spread[row] / q.mean[row]  # of K F^2 against F
    # the spread of all harmonics, less what q(F) of the first one says
    others = (e.spread - e.mean**2 / q.concentration[row]).clamp_min(0.0)
    if batch.observation_of_term is None:
        others = torch.zeros_like(e.spread)
    mean = e.mean + e.scale * (width.sigma**2 - q.variance).clamp_min(0.0)[row]
    variance = e.variance + others + slope**2 * width.own_variance[row]
    shared = slope * width.shared[row]
    if batch.cluster is None:  # nobody shares it
        variance, shared = variance + shared**2, None
    nothing = torch.zeros_like(e.spread)
    e = replace(e, mean=mean, spread=nothing, variance=variance, shared=shared)
    return merger.likelihood(batch, e)


@torch.no_grad()
def predict(merger: Merger, table: ObservationTable, chosen: Tensor) -> Prediction:
    """Predict the chosen observations, (N,) bool.

    ``cc_pred`` is the correlation of measured and expected intensities.
    """
    values = observed_and_expected(merger, table.everything())
    measured, expected, density = values[:, chosen.cpu().numpy()]
    if table.has_clusters:
        by_cluster = log_likelihoods(merger, table, chosen.to(merger.device)).cpu().numpy()
        density = by_cluster[~np.isnan(by_cluster)]
    return Prediction.of(measured, expected, density)


@torch.no_grad()
def observed_and_expected(merger: Merger, batch: Batch) -> NDArray[Any]:
    """Measured and expected intensities and, without clusters, log-densities, (3, N)."""
    e = merger.generative(batch, merger.inference())
    expected = e.mean
    if e.alternatives is not None:
        expected = torch.sigmoid(-e.alternatives.blank_log_odds) * expected
    density = torch.full_like(expected, torch.nan)
    if batch.cluster is None:
        density = predictive_density(merger, batch)
    return torch.stack([batch.observations.intensity, expected, density]).cpu().numpy()
