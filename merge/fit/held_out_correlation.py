"""The correlation r of an amplitude with its parent, against resolution, from held-out data.

Each r of a grid gives amplitudes from the training observations alone, with the scales as they
are, and shell by shell a log-likelihood of the held-out observations. Neither CC1/2 nor the ELBO
nor a map takes part: all of those go on rising while r runs to 1.

1 - r^2 is the mean square of the difference (as complex numbers) over that of the amplitude. Both
fall with 1/d^2 as Debye and Waller's factors do, so its log is a straight line in 1/d^2: the one
that predicts best is taken. A shell for itself has some nats of noise, which is a factor of ten in
1 - r^2; steps between shells would weigh them against each other at random.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.fit.held_out import log_likelihoods
from braggflux.merge.fit.training import fit, pool_trees
from braggflux.merge.model.merger import Merger
from braggflux.merge.prior.double_wilson import DoubleWilson

logger = logging.getLogger(__name__)

GRID = (0.9, 0.95, 0.98, 0.99, 0.995, 0.9975, 0.999, 0.9995, 0.9998, 0.9999)
EPOCHS = 40
#: What one observation may say for or against an r [nats]: outliers say more than all the others.
LOUDEST = 1.0
#: Values of log(1 - r^2) that are tried at either end of the line.
N_ENDS = 61


def choose_correlation(
    merger: Merger,
    table: ObservationTable,
    held_out: Tensor,
    config: MergeConfig,
) -> list[dict[str, float]]:
    """Set r of every shell; returns the score of every r in every shell [nats].

    Parameters
    ----------
    merger : Merger
        Trained with ``table``; its q(F) is trained again for every r.
    table : ObservationTable
        With the training mask set.
    held_out : Tensor, (N,) bool
    config : MergeConfig
    """
    state = {k: v.clone() for k, v in merger.state_dict().items()}
    prior, density = merger.prior.part(DoubleWilson), []
    for r in GRID:
        merger.load_state_dict(state)
        prior.one_minus_r2.fill_(1 - r**2)
        pool_trees(merger)
        fit(merger, table, config, epochs=EPOCHS, with_scales=False)
        density.append(log_likelihoods(merger, table, held_out))
    merger.load_state_dict(state)
    known = ~density[0].isnan()
    shell = _shell_of_cluster(prior, table)[known]
    return set_best(prior, torch.stack([d[known] for d in density]), shell)


def set_best(prior: DoubleWilson, density: Tensor, shell: Tensor) -> list[dict[str, float]]:
    """Set r of every shell to the best line.

    Parameters
    ----------
    prior : DoubleWilson
    density : Tensor, (G, C)
        Log-density of each held-out cluster at every r of the grid.
    shell : Tensor, (C,)

    Returns
    -------
    list of dict
        Score of every r in every shell, over that of the middle of the grid [nats].
    """
    n_shells = len(prior.one_minus_r2)
    scores = bounded_scores(density, shell, n_shells).cpu()
    log_share = best_line(scores, prior.shell_inv_d2.cpu())
    prior.one_minus_r2.copy_(log_share.exp())
    chosen = prior.correlation.tolist()
    logger.info("r by shell, low to high resolution: %s", " ".join(f"{r:.4f}" for r in chosen))
    return [
        {"shell": s, "r": r, "log_likelihood": float(scores[i, s]), "chosen_r": chosen[s]}
        for s in range(n_shells)
        for i, r in enumerate(GRID)
    ]


def bounded_scores(density: Tensor, shell: Tensor, n_shells: int) -> Tensor:
    """Sum each shell's log-densities over those of the middle of the grid, (G, shells) [nats].

    What a cluster adds is bounded by :data:`LOUDEST`; ``density`` and ``shell`` as of
    :func:`set_best`.
    """
    gain = (density - density[len(density) // 2]).clamp(-LOUDEST, LOUDEST)
    return gain.new_zeros(len(gain), n_shells).index_add_(1, shell, gain)


def best_line(scores: Tensor, inv_d2: Tensor) -> Tensor:
    """Find the line log(1 - r^2) = a + b / d^2 of the largest sum of scores.

    Returns its values, (shells,).

    Parameters
    ----------
    scores : Tensor, (G, shells)
        Log-likelihood at each r of the grid [nats]; linear in log(1 - r^2) between.
    inv_d2 : Tensor, (shells,)
        Mean 1/d^2 [1/A^2].
    """
    grid = (1 - torch.tensor(GRID[::-1], dtype=torch.float64) ** 2).log()
    scores = scores.flip(0)
    ends = torch.linspace(float(grid[0]), float(grid[-1]), N_ENDS, dtype=torch.float64)
    low, high = inv_d2.min(), inv_d2.max()
    share = (inv_d2 - low) / (high - low).clamp_min(1e-12)
    lines = ends[:, None, None] * (1 - share) + ends[None, :, None] * share
    above = torch.searchsorted(grid, lines).clamp(1, len(grid) - 1)
    part = (lines - grid[above - 1]) / (grid[above] - grid[above - 1])
    shell = torch.arange(len(inv_d2)).expand_as(above)
    total = torch.lerp(scores[above - 1, shell], scores[above, shell], part).sum(-1)
    return lines.flatten(0, 1)[total.argmax()]


def _shell_of_cluster(prior: DoubleWilson, table: ObservationTable) -> Tensor:
    terms, n = table.terms, len(table.observations)
    shell = prior.shell.new_zeros(n)
    shell[terms.observation] = prior.shell[terms.row]
    if not table.has_clusters:
        return shell
    cluster = table.observations.cluster
    by_cluster = shell.new_zeros(int(cluster[-1]) + 1)
    by_cluster[cluster] = shell
    return by_cluster
