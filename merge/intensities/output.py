"""Amplitudes, prior-free intensities and half sets for files and statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from integrator.distributions.nakagami import Nakagami
from merge.intensities.merger import IntensityMerger
from merge.intensities.table import ObservationTable
from merge.model.amplitudes import french_wilson


@dataclass(frozen=True)
class ScaledObservations:
    """Observations on the common scale, (N,); units of the files.

    ``is_spot``: more likely a spot than blank.
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
    if merger.likelihood.has_common_error:
        variance = variance + (2 * merger.likelihood.log_common).exp() * e.mean**2
    weight = merger.likelihood.weight(residual, variance)
    share = merger.likelihood.share_of_spots(
        residual, e.mean, e.spread, e.variance, batch.cluster, e.blank
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
    q = merger.inference()
    n_rows = len(merger.group)
    mean, sigma = weighted_mean(scaled, n_rows)
    n_obs = torch.bincount(scaled.row[scaled.is_spot], minlength=n_rows)
    unit = table.unit_intensity**0.5
    wilson = merger.prior.wilson
    normalised = q.mean / (wilson.epsilon * wilson.wilson_sigma()).sqrt()
    return MergedRows(
        q.mean * unit,
        (marginal_sigma(merger, q) if is_marginal else q.variance.sqrt()) * unit,
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
    prior = merger.prior.wilson.p_structure_factor()
    return french_wilson(
        mean, sigma, prior.spread * table.unit_intensity, merger.prior.wilson.is_centric
    )


@torch.no_grad()
def marginal_sigma(merger: IntensityMerger, q: Nakagami) -> Tensor:
    """Give the standard deviation of each amplitude, its relatives being uncertain too, (R,).

    q is a product, whose width is that of F with its parent known exactly. The precision matrix
    of a tree is the data's (q's precision less the prior's) plus the prior's links; its inverse
    along a tree is one pass from the children up and one back. Here each row takes up the
    uncertainty of its parent: Var = Var_q + (d mean / d parent)^2 Var(parent), with the slope
    r (2 / S) / precision of the conditional.
    """
    variance = q.variance.clone()
    if not merger.prior.is_coupled:
        return variance.sqrt()
    r, spread = merger.prior.conditional()
    child, parent = merger.prior.child, merger.prior.parent
    stiffness = torch.where(merger.prior.wilson.is_centric[child], 1.0, 2.0) / spread
    slope = torch.zeros_like(variance)
    slope[child] = (r * stiffness * variance[child]).clamp_max(1.0)
    # a parent knows of its child only what the child's own data say
    own = (1 / variance[child] - stiffness).clamp_min(0.0)
    link = stiffness * own / (stiffness + own)
    precision = 1 / variance
    precision.index_add_(0, parent, link - r**2 * stiffness)
    least = 1 / (merger.prior.wilson.epsilon * merger.prior.wilson.wilson_sigma())
    total = torch.where(slope > 0, variance, 1 / torch.maximum(precision, least))
    for rows, above in merger.levels:
        total = total.index_copy(0, rows, variance[rows] + slope[rows] ** 2 * total[above])
    return total.sqrt()
