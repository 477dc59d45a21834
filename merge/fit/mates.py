r"""Bijvoet differences that scales may know: those that independent halves of the data confirm.

While scales are fitted the mates share one amplitude (:meth:`Merger.tied`). Large
differences would then be errors of the scales. They are taken out as far as they are known,

    F(+) - F(-)  ->  V / (V + v) * (F(+) - F(-)),

v: its variance, V: mean square of the true differences, from the product of the differences of
two halves of the observations (:mod:`braggflux.merge.prior.mate_correlation`), which noise does
not enter. Scales that have not seen the differences cannot have made the halves agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.amplitudes import scaled_observations
from braggflux.merge.prior.mate_correlation import (
    estimate_one_minus_r2,
    mean_half_set_covariance,
    random_halves,
)

#: Share of signal in the typical difference below which scales are better left without.
MIN_SHARE = 0.5
#: Mean squares below this, in F^2, say nothing of an amplitude difference.
WEAK = 0.2
MAX_HALF = 0.3  # of the relative difference of amplitudes, halved


@torch.no_grad()
def confirmed_log_ratio(merger: Merger, table: ObservationTable, config: MergeConfig) -> Tensor:
    """Log of each mate's F^2 over that of both, (R,); 0 where nothing is confirmed.

    Parameters
    ----------
    merger : Merger
        With the amplitudes of the mates apart and scales that have not seen them.
    table : ObservationTable
    config : MergeConfig
        Its seed draws the halves.
    """
    minus = (merger.joined != torch.arange(len(merger.joined), device=merger.device)).nonzero()
    minus = minus[:, 0]
    plus = merger.joined[minus]
    scaled = scaled_observations(merger, table)
    used = scaled.is_spot & table.observations.is_used
    unit = table.unit_intensity
    row, value = scaled.row[used], scaled.intensity[used] / unit
    weight = unit**2 / scaled.variance[used]
    spread = merger.log_spread.exp()
    square = 0.5 * (spread[plus] + spread[minus])
    usual = merger.prior.spread()[plus]
    is_strong = square > WEAK * usual
    own = torch.arange(len(row), device=row.device)
    halves = random_halves(own, torch.Generator().manual_seed(config.seed))
    norm = 2 * (square * usual).sqrt()
    product, known = mean_half_set_covariance(row, value, weight, plus, minus, norm, halves)
    keep = known & is_strong
    n_shells = config.n_correlation_shells
    shell = torch.as_tensor(merger.unique.shells(n_shells), device=merger.device)[plus]
    share = estimate_one_minus_r2(product[keep], shell[keep], n_shells, norm.new_zeros(n_shells))
    true_variance = 0.5 * usual * share[shell]  # of F(+) - F(-)
    total = spread.new_zeros(len(spread)).index_add_(0, row, weight)
    mean = torch.zeros_like(total).index_add_(0, row, weight * value) / total.clamp_min(1e-30)
    noise = (1 / total[plus] + 1 / total[minus]) / (4 * square)
    signal = torch.where(is_strong, true_variance / (true_variance + noise), 0.0)
    result = torch.zeros_like(spread)
    both = (total[plus] > 0) & (total[minus] > 0)
    if not bool((both & is_strong).any()) or signal[both & is_strong].median() < MIN_SHARE:
        return result
    half = signal * (mean[plus] - mean[minus]) / (4 * square)  # of F, relative
    half = torch.where(both, half, 0.0).clamp(-MAX_HALF, MAX_HALF)
    result[plus], result[minus] = 2 * torch.log1p(half), 2 * torch.log1p(-half)
    return result
