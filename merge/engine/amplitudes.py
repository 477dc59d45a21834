"""Amplitudes and intensities for other programs: each mate from its own observations.

Refinement and phasing programs take F(+) and F(-) as independent measurements and weigh the
difference themselves. What they get is therefore free of the coupling of the mates: the
inverse-variance mean of the scaled, prior-free intensities of each row, its sigma, and the
posterior mean of F under Wilson's prior alone (French & Wilson, Acta Cryst. 1978, A34, 517), here
by direct quadrature with the learned Sigma(d).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.merge.engine.merger import Merger
from braggflux.merge.engine.types import MergeBatch
from braggflux.merge.output.french_wilson import french_wilson

#: Least weight that the best observation of a reflection keeps: sigma grows thirtyfold at most.
LEAST_TRUST = 1e-3


@dataclass(frozen=True)
class Amplitudes:
    """One value per row of the reciprocal asymmetric unit, (R,); NaN where not observed.

    Units are those of the merge: intensities in photons at K = 1.
    """

    amplitude: Tensor
    sigma_amplitude: Tensor
    normalised: Tensor
    intensity: Tensor
    sigma_intensity: Tensor
    n_obs: Tensor


@torch.no_grad()
def merged_amplitudes(
    merger: Merger,
    batch: MergeBatch,
    chosen: Tensor | None = None,
    scaled: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Amplitudes:
    """Merge the observations (or the ``chosen`` ones, (B,) bool) with the merger's scales.

    On the scale of the crystal before the scan, see ``ScaleModel.fresh_crystal_factor``.
    ``scaled`` is what ``merger.scaled_observations(batch)`` gave, where it is known already.
    """
    value, variance, good = scaled or merger.scaled_observations(batch)
    n_rows = len(merger.n_obs)
    counted = torch.ones_like(good) if chosen is None else chosen.to(good.dtype)
    relative, best = relative_responsibility(good * counted, batch.refl_id, n_rows)
    weight = relative * counted * best.clamp_min(LEAST_TRUST) / variance
    total = weight.new_zeros(n_rows).index_add_(0, batch.refl_id, weight)
    mean = weight.new_zeros(n_rows).index_add_(0, batch.refl_id, weight * value) / total
    n_obs = weight.new_zeros(n_rows).index_add_(0, batch.refl_id, counted).long()
    seen = n_obs > 0
    mean = torch.where(seen, mean, torch.nan)
    sigma = torch.where(seen, total, torch.nan) ** -0.5
    prior = merger.prior.wilson.p_structure_factor()
    amplitude, sigma_amplitude = french_wilson(
        mean, sigma, prior.spread, merger.prior.wilson.is_centric
    )
    fresh = merger.scale.fresh_crystal_factor(merger.inv_d2)
    return Amplitudes(
        amplitude * fresh.sqrt(),
        sigma_amplitude * fresh.sqrt(),
        amplitude / prior.spread.sqrt(),
        mean * fresh,
        sigma * fresh,
        torch.where(seen, n_obs, 0),
    )


def relative_responsibility(good: Tensor, refl_id: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Probability to be no outlier over the best one of the same reflection, and that best, (B,).

    Only its mates can tell an outlier: where all observations of a reflection are doubted, the
    best of them still gives its value, with a sigma that says so (:data:`LEAST_TRUST`).
    """
    good = good.clamp_min(1e-30)
    best = good.new_zeros(n_rows).scatter_reduce_(0, refl_id, good, "amax")[refl_id]
    return good / best, best
