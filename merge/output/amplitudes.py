r"""Amplitudes, differences and prior-free intensities of every row, for files and statistics.

What a row's amplitude is:

* each from its own observations, with Wilson's prior or that of a model: the posterior mean of
  q(F) where no prior ties rows, and where one ties Bijvoet mates the posterior mean given the
  row's mean intensity alone (French & Wilson 1978). Programs that phase or refine take F(+) and
  F(-) as independent and weigh their difference themselves;
* the coupled posterior mean where datasets have parents: there it is the product.

The coupled posterior of the mates gives their difference in a column of its own, see
:mod:`braggflux.merge.output.coupled_difference`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from braggflux.merge.data.table import ObservationTable
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.coupled_difference import coupled_difference, ties_mates_only
from braggflux.merge.output.french_wilson import french_wilson
from braggflux.merge.prior.reference import model_prior
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

    def times(self, factor: Tensor) -> ScaledObservations:
        """Multiply the observations of each row by its ``factor``, (R,)."""
        own = factor[self.row]
        return replace(self, intensity=self.intensity * own, variance=self.variance * own**2)


@dataclass(frozen=True)
class MergedRows:
    """Values of each unique row, (R,); NaN where there is none. Units of the files.

    ``difference``, its sigma and its figure of merit are at the rows of F(+).
    """

    amplitude: Tensor
    sigma_amplitude: Tensor
    normalised: Tensor
    intensity: Tensor
    sigma_intensity: Tensor
    n_obs: Tensor
    difference: Tensor
    sigma_difference: Tensor
    merit: Tensor

    def times(self, factor: Tensor) -> MergedRows:
        """Multiply the intensities of each row by its ``factor``, (R,), and F by its root."""
        root = factor.sqrt()
        return MergedRows(
            self.amplitude * root,
            self.sigma_amplitude * root,
            self.normalised,
            self.intensity * factor,
            self.sigma_intensity * factor,
            self.n_obs,
            self.difference * root,
            self.sigma_difference * root,
            self.merit,
        )


@torch.no_grad()
def scaled_observations(merger: Merger, table: ObservationTable) -> ScaledObservations:
    """Divide by K; the variance is the error model's, larger for outliers.

    Of a harmonic overlap, the reflection of the file's index takes its expected share.
    """
    batch = table.everything()
    e = merger.generative(batch, merger.inference())
    share = merger.likelihood.share_of_spots(batch, e)
    weight = merger.likelihood.weight(batch, e.alone) * share.clamp_min(1e-9)
    unit = table.unit_intensity
    return ScaledObservations(
        batch.first_rows,
        batch.observations.intensity / e.scale * unit,
        e.alone.variance / weight / e.scale**2 * unit**2,
        share > 0.5,
    )


def used_observations(merger: Merger, table: ObservationTable) -> ScaledObservations:
    """Scale a table of which some observations are not to be used: these are no spots."""
    scaled = scaled_observations(merger, table)
    return replace(scaled, is_spot=scaled.is_spot & table.observations.is_used)


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
def merged_rows(
    merger: Merger,
    table: ObservationTable,
    scaled: ScaledObservations,
    *,
    is_marginal: bool = True,
) -> MergedRows:
    """Amplitudes, and inverse-variance means of the scaled intensities of ``table``.

    See :func:`with_amplitudes`.
    """
    n_rows = len(merger.group)
    n_obs = torch.bincount(scaled.row[scaled.is_spot], minlength=n_rows)
    means = weighted_mean(scaled, n_rows)
    return with_amplitudes(merger, table.unit_intensity, *means, n_obs, is_marginal=is_marginal)


@torch.no_grad()
def with_amplitudes(
    merger: Merger,
    unit_intensity: float,
    mean: Tensor,
    sigma: Tensor,
    n_obs: Tensor,
    *,
    is_marginal: bool = True,
) -> MergedRows:
    """Set amplitudes beside mean intensities.

    Parameters
    ----------
    merger : Merger
        Fitted.
    unit_intensity : float
        Of the merger, in units of the files.
    mean, sigma : Tensor, (R,)
        Inverse-variance mean of each row and its standard deviation, in units of the files.
    n_obs : Tensor, (R,)
    is_marginal : bool
        Without it the sigma of an amplitude that is coupled to another dataset's is its width
        given its relatives.
    """
    q, unit = merger.inference(), unit_intensity**0.5
    intensity = mean / unit_intensity, sigma / unit_intensity
    if ties_mates_only(merger):
        amplitude, sigma_amplitude = own_amplitudes(merger, *intensity)
    else:
        amplitude = q.mean
        width = merger.prior.width(q, merger.information)
        sigma_amplitude = width.sigma if is_marginal else q.variance.sqrt()
    found = coupled_difference(merger, *intensity)
    return MergedRows(
        amplitude * unit,
        sigma_amplitude * unit,
        amplitude / merger.prior.spread().sqrt(),
        mean,
        sigma,
        n_obs,
        found.value * unit,
        found.sigma * unit,
        found.merit,
    )


@torch.no_grad()
def fresh_crystal_factor(merger: Merger) -> Tensor:
    """Intensities of a crystal before any damage over those at the mean dose of the scans, (R,).

    The scale has B along a scan about its mean, and with it q(F) is of the mean dose; files are
    on the scale of the crystal at the start of the first scan.
    """
    return merger.scale.fresh_crystal_factor(merger.prior.part(Wilson).inv_d2)


@torch.no_grad()
def own_amplitudes(merger: Merger, mean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """<F> and its sigma from mean intensities with the prior of each row for itself, (R,) each.

    Wilson's, or that about a model's amplitude; all in units of the merger.
    """
    wilson = merger.prior.part(Wilson)
    return french_wilson(
        mean, sigma, wilson.spread(), wilson.is_centric, model_prior(merger.prior)
    )


@torch.no_grad()
def amplitudes_of_means(
    merger: Merger, unit_intensity: float, mean: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """<F> and its sigma from mean intensities with Wilson's prior alone, (R,) each."""
    wilson = merger.prior.part(Wilson)
    return french_wilson(mean, sigma, wilson.spread() * unit_intensity, wilson.is_centric)
