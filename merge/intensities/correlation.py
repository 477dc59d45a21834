"""The correlation r of an amplitude with its parent, by resolution shell, from held-out data.

Each r of a grid gives amplitudes from the training observations alone, with the scales as they
are; the one that predicts the held-out observations best wins, shell by shell. Neither CC1/2 nor
the ELBO nor a map takes part: all of those go on rising while r runs to 1.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from merge.intensities.config import IntensityMergeConfig
from merge.intensities.held_out import log_likelihoods
from merge.intensities.merger import IntensityMerger
from merge.intensities.table import ObservationTable
from merge.intensities.training import fit, pool_trees

logger = logging.getLogger(__name__)

GRID = (0.9, 0.95, 0.98, 0.99, 0.995, 0.9975, 0.999, 0.9995, 0.9998)
EPOCHS = 40
#: Say of the neighbouring shells in the choice of a shell: r varies smoothly.
NEIGHBOUR = 0.5


def choose_correlation(
    merger: IntensityMerger,
    table: ObservationTable,
    held_out: Tensor,
    config: IntensityMergeConfig,
) -> list[dict[str, float]]:
    """Set r of every shell; returns the score of every r in every shell [nats].

    Parameters
    ----------
    merger : IntensityMerger
        Trained with ``table``; its q(F) is trained again for every r.
    table : ObservationTable
        With the training mask set.
    held_out : Tensor, (N,) bool
    config : IntensityMergeConfig
    """
    state = {k: v.clone() for k, v in merger.state_dict().items()}
    shell = _shell_of_cluster(merger, table)
    n_shells = len(merger.prior.one_minus_r2)
    scores = torch.zeros(len(GRID), n_shells, dtype=torch.float64, device=merger.device)
    for i, r in enumerate(GRID):
        merger.load_state_dict(state)
        merger.prior.one_minus_r2.fill_(1 - r**2)
        pool_trees(merger)
        fit(merger, table, config, epochs=EPOCHS, with_scales=False)
        density = log_likelihoods(merger, table, held_out)
        known = ~density.isnan()
        scores[i].index_add_(0, shell[known], density[known])
    merger.load_state_dict(state)
    return set_best(merger, scores)


def set_best(merger: IntensityMerger, scores: Tensor) -> list[dict[str, float]]:
    """Set r of every shell to the best of the grid; returns all ``scores``, (G, shells) [nats]."""
    smooth = scores.clone()
    smooth[:, 1:] += NEIGHBOUR * scores[:, :-1]
    smooth[:, :-1] += NEIGHBOUR * scores[:, 1:]
    best = smooth.argmax(0)
    chosen = torch.tensor(GRID, dtype=torch.float64)[best.cpu()]
    merger.prior.one_minus_r2.copy_(1 - chosen**2)
    logger.info(
        "r by shell, low to high resolution: %s", " ".join(f"{r:.4f}" for r in chosen.tolist())
    )
    return [
        {"shell": s, "r": r, "log_likelihood": float(scores[i, s])}
        for s in range(scores.shape[1])
        for i, r in enumerate(GRID)
    ]


def _shell_of_cluster(merger: IntensityMerger, table: ObservationTable) -> Tensor:
    terms, n = table.terms, len(table.observations)
    shell = torch.zeros(n, dtype=torch.int64, device=merger.device)
    shell[terms.observation] = merger.prior.shell[terms.row]
    if not table.has_clusters:
        return shell
    cluster = table.observations.cluster
    by_cluster = shell.new_zeros(int(cluster[-1]) + 1)
    by_cluster[cluster] = shell
    return by_cluster
