"""Amplitudes, prior-free intensities and half sets for files and statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.merge.data.table import ObservationTable
from braggflux.merge.model.merger import IntensityMerger
from braggflux.merge.output.french_wilson import french_wilson
from braggflux.merge.prior.wilson import Wilson


@dataclass(frozen=True)
class ScaledObservations:
    """Observations on the common scale, (N,); units of the files.

    ``is_spot``: more likely the spot than anything else.
    """

    row: Tensor
    intensity: Tensor
    variance: Tensor
    is_spot: Tensor


@dataclass(frozen=True)
class MergedRows:
    """Values of each unique row, (R,); NaN where there is none. Units of the files."""

    amplitude: Tensor
    sigma_amplitude: Tensor
    normalised: Tensor
    intensity: Tensor
    sigma_intensity: Tensor
    n_obs: Tensor


@torch.no_grad()
def scaled_observations(merger: IntensityMerger, table: ObservationTable) -> ScaledObservations:
    """Divide by K; the variance is the error model's, larger for outliers.

    Of a harmonic overlap, the reflection of the file's index takes its expected share.
    """
    batch = table.everything()
    e = merger.generative(batch, merger.inference())
    residual = batch.observations.intensity - e.mean
    variance = e.variance
    variance = variance + e.common**2
    weight = merger.likelihood.weight(residual, variance)
    share = merger.likelihood.share_of_spots(
        residual, e.common, e.spread, e.variance, batch.cluster, e.other
    )
    weight = weight * share.clamp_min(1e-9)
    unit = table.unit_intensity
    return ScaledObservations(
        batch.first_rows,
        batch.observations.intensity / e.scale * unit,
        variance / weight / e.scale**2 * unit**2,
        share > 0.5,
    )


@torch.no_grad()
def merged_rows(
    merger: IntensityMerger,
    table: ObservationTable,
    scaled: ScaledObservations,
    *,
    is_marginal: bool = True,
) -> MergedRows:
    """Posterior amplitudes, and inverse-variance means of the scaled intensities.

    Without ``is_marginal`` the sigma of a coupled amplitude is its width given its relatives.
    """
    n_rows = len(merger.group)
    mean, sigma = weighted_mean(scaled, n_rows)
    n_obs = torch.bincount(scaled.row[scaled.is_spot], minlength=n_rows)
    return with_amplitudes(merger, table.unit_intensity, mean, sigma, n_obs, is_marginal)


@torch.no_grad()
def with_amplitudes(
    merger: IntensityMerger,
    unit_intensity: float,
    mean: Tensor,
    sigma: Tensor,
    n_obs: Tensor,
    is_marginal: bool,
) -> MergedRows:
    """Set amplitudes of q beside mean intensities in units of the files, (R,) each."""
    q = merger.inference()
    unit = unit_intensity**0.5
    normalised = q.mean / merger.prior.spread().sqrt()
    width = merger.prior.width(q, merger.information).sigma if is_marginal else q.variance.sqrt()
    return MergedRows(
        q.mean * unit,
        width * unit,
        normalised,
        mean,
        sigma,
        n_obs,
    )


def weighted_mean(
    scaled: ScaledObservations, n_rows: int, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Inverse-variance mean of each row's spots and its sigma, NaN where none is ``chosen``."""
    weight = scaled.is_spot / scaled.variance
    if chosen is not None:
        weight = weight * chosen
    total = weight.new_zeros(n_rows).index_add_(0, scaled.row, weight)
    value = weight.new_zeros(n_rows).index_add_(0, scaled.row, weight * scaled.intensity)
    total = torch.where(total > 0, total, torch.nan)
    return value / total, total**-0.5


@torch.no_grad()
def half_set_amplitudes(
    merger: IntensityMerger, table: ObservationTable, scaled: ScaledObservations, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Amplitudes from the chosen observations with Wilson's prior alone, (R,) each."""
    mean, sigma = weighted_mean(scaled, len(merger.group), chosen)
    return amplitudes_of_means(merger, table.unit_intensity, mean, sigma)


@torch.no_grad()
def amplitudes_of_means(
    merger: IntensityMerger, unit_intensity: float, mean: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """<F> and its sigma from mean intensities with Wilson's prior alone, (R,) each."""
    wilson = merger.prior.part(Wilson)
    return french_wilson(mean, sigma, wilson.spread() * unit_intensity, wilson.is_centric)
