"""Steps on all observations at once: Newton's for amplitudes and frames, Adam's for the rest.

A run fits scales and amplitudes again after every pass of the integrator, from where they were:
some dozens of steps, each on all observations. What is known of the curvature is used: that of
log <F^2> spans five decades over a data set, and an error of one frame's scale hides in the
amplitudes of all its reflections. Amplitudes and frames move at the same time; an error that both
could heal would be healed twice, hence the damping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from braggflux.integrator.processes import ALONE, Processes
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.fit.newton import AmplitudeNewton
from braggflux.merge.fit.training import make_optimizer, set_rate
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.objective import elbo

DAMPING = 0.6
#: Observations whose graph is held at a time, of 1 kB each.
PART_ROWS = 1 << 18
#: Standard deviations from the expected intensity beyond which an observation is doubted.
DOUBTED = 4.0


class FullBatchFit:
    """Optimiser of a merger that is fitted again and again.

    Parameters
    ----------
    merger : Merger
    config : MergeConfig
    processes : Processes
        Each computes a part of the observations.
    """

    def __init__(self, merger: Merger, config: MergeConfig, processes: Processes = ALONE) -> None:
        self.merger, self.processes = merger, processes
        newton = merger.scale.newton_parameters
        self.optimizer = make_optimizer(merger, config, newton)

    def steps(self, table: ObservationTable, n: int, done: Callable[[int], float]) -> None:
        """Take ``n`` steps.

        Parameters
        ----------
        table : ObservationTable
        n : int
        done : callable
            Share of all steps of the whole fit that are done before step k, for the rates.
        """
        merger, together = self.merger, self.processes
        merger.count(table)
        batch, amplitudes = self._own(table), AmplitudeNewton(merger)
        parameters = [p for p in merger.parameters() if p.requires_grad]
        for k in range(n):
            set_rate(self.optimizer, done(k))
            merger.zero_grad(set_to_none=True)
            found = [self._add_gradients(part) for part in _parts(table, batch)]
            of_rows, weights, of_observations = zip(*found, strict=True)
            information, row_weight = torch.stack(of_rows).sum(0), torch.stack(weights).sum(0)
            together.add_up_gradients(parameters, [information, row_weight])
            merger.information = information
            merger.scale.newton_step(batch, torch.cat(of_observations), together.add_up)
            amplitudes.move(information, row_weight, DAMPING)
            self.optimizer.step()

    def _add_gradients(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradients of a part; its information, by rows and observations, and weights."""
        terms = self.merger.loss(batch, self.merger.inference())
        (-elbo(terms)).backward()
        return terms.information, terms.row_weight, terms.observation_information

    def _own(self, table: ObservationTable) -> Batch:
        """All observations, or those that this process computes."""
        if self.processes.is_alone:
            return table.everything()
        index = torch.arange(len(table.observations), device=self.merger.device)
        return table.rows(index[self.processes.share(len(index))])

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on beside the merger."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.optimizer.load_state_dict(state)


def _parts(table: ObservationTable, batch: Batch) -> Iterator[Batch]:
    """Cut a batch in parts; the ELBO is a sum over observations, and so are its gradients."""
    n = len(batch.observations)
    if n <= PART_ROWS or table.has_clusters or table.has_harmonics:
        yield batch
        return
    for rows in batch.rows.split(PART_ROWS):
        yield table.rows(rows)


@torch.no_grad()
def restart_doubted(merger: Merger, table: ObservationTable) -> int:
    """Start q(F) anew where most observations of a tree of rows are far from what they should be.

    Far from them q(F) may sit on a single wrong observation, which no step leaves. The median of
    all observations of the tree is on the side of the majority.

    Returns
    -------
    int
        Trees started anew.
    """
    batch = table.everything()
    o = batch.observations
    e = merger.generative(batch, merger.inference())
    variance = e.variance
    used = o.is_used
    group = merger.group[batch.first_rows]
    far = (o.intensity - e.mean) ** 2 > DOUBTED**2 * variance
    n_far, n_all = (
        torch.bincount(group[chosen], minlength=merger.n_groups) for chosen in (far & used, used)
    )
    doubted = 2 * n_far > n_all
    chosen = doubted[group] & used
    if not chosen.any():
        return 0
    value, sigma = (o.intensity / e.scale)[chosen], (variance.sqrt() / e.scale)[chosen]
    median, width = grouped_median(value, sigma, group[chosen])
    rows = torch.nonzero(doubted[merger.group])[:, 0]
    number = (doubted.cumsum(0) - 1)[merger.group[rows]]
    spread = torch.maximum(median[number], width[number])
    log_spread = merger.log_spread.clone()
    log_spread[rows] = spread.log()
    merger.set_log_spread(log_spread)
    merger.log_concentration[rows] = (spread / width[number]).square().clamp(0.6, 1e6).log()
    return int(doubted.sum())


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
