"""Variational merging of measured intensities: scales, error model, prior and q(F).

    I_i = K_i F_h^2 + error,    F_h ~ Wilson or double-Wilson,    q(F_h) = Nakagami(k_h, Omega_h)

Every tree of rows (an amplitude and those that are expected to resemble it) has one divergence. A
batch weighs it with the share of the tree's observations that it holds, and the prior of the scale
parameters with its share of all observations, so that any batches that cover the data once add up
to the full batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.integrator.processes import ALONE
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.likelihood.expectation import Expectation
from braggflux.merge.likelihood.registry import build_likelihood
from braggflux.merge.model.objective import MergeTerms
from braggflux.merge.prior.registry import build_prior
from braggflux.merge.rows import UniqueRows
from braggflux.merge.scale.base import Scale
from braggflux.merge.scale.registry import build_scale


class Merger(nn.Module):
    """The whole model.

    Parameters
    ----------
    unique : UniqueRows
    table : ObservationTable
    config : MergeConfig
    f_calc : Tensor, (R,), optional
        Amplitudes of a model that may become the prior; NaN where there is none.
    """

    group: Tensor
    joined: Tensor
    log_ratio: Tensor
    n_obs: Tensor
    n_group: Tensor
    information: Tensor

    def __init__(
        self,
        unique: UniqueRows,
        table: ObservationTable,
        config: MergeConfig,
        f_calc: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.unique = unique
        self.prior = build_prior(unique, config, f_calc)
        self.scale = build_scale(table, config)
        self.likelihood = build_likelihood(table, config)
        self.register_buffer("group", torch.as_tensor(unique.group))
        self.register_buffer("joined", torch.as_tensor(unique.joined), persistent=False)
        self.has_mates = bool((unique.joined != np.arange(len(unique))).any())
        self.is_tied = False
        # of a mate's F^2 to that of both, as far as it is known while they share one
        ratio = torch.zeros(len(unique), dtype=torch.float64)
        self.register_buffer("log_ratio", ratio, persistent=False)
        self.n_groups = unique.n_groups
        for name in ("n_obs", "n_group"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)
        # of a row with a parent: relative to the parent's, so that a common change is one step
        self.log_spread_step = nn.Parameter(torch.zeros(len(unique), dtype=torch.float64))
        self.log_concentration = nn.Parameter(torch.zeros(len(unique), dtype=torch.float64))
        # the data's, of log <F^2> of each row in the last pass of a fit, (R,)
        information = torch.zeros(len(unique), dtype=torch.float64)
        self.register_buffer("information", information, persistent=False)
        #: Each takes some of the images of a batch.
        self.processes = ALONE
        # of all observations, where q(F) alone is fitted
        self.fixed_scale: Scale | None = None
        self.count(table)
        self.eval()

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Train: some images do without parameters of their own, another draw each step."""
        self.train()
        try:
            yield
        finally:
            self.eval()

    @contextmanager
    def with_fixed_scale(self, everything: Batch) -> Iterator[None]:
        """Compute the scales of the whole table once; only that batch may be used within."""
        with torch.no_grad():
            self.fixed_scale = self.scale(everything)
        try:
            yield
        finally:
            self.fixed_scale = None

    @contextmanager
    def tied(self, table: ObservationTable) -> Iterator[ObservationTable]:
        """Let Bijvoet mates share the amplitude of F(+); yields the table to fit meanwhile."""
        self._share_amplitudes()
        self.is_tied = True
        row = table.terms.row
        try:
            yield table.with_rows(self.joined[row], self.log_ratio[row])
        finally:
            self.is_tied = False
            self._part_amplitudes()

    @torch.no_grad()
    def _share_amplitudes(self) -> None:
        """Set F(+) to the mean of the mates, weighted with what the data say of each."""
        weight = (self.n_obs > 0) * self.log_concentration.exp()
        value = weight * (self.log_spread - self.log_ratio)
        total = torch.zeros_like(weight).index_add_(0, self.joined, weight)
        mean = torch.zeros_like(weight).index_add_(0, self.joined, value)
        seen = total > 0
        mean = torch.where(seen, mean / total.clamp_min(1e-30), self.log_spread)
        self.set_log_spread(mean[self.joined])
        log_total = torch.where(seen, total.clamp_min(1e-30).log(), self.log_concentration)
        self.log_concentration.copy_(log_total[self.joined])

    @torch.no_grad()
    def _part_amplitudes(self) -> None:
        """Set the amplitude of each mate to the one that both shared."""
        self.set_log_spread(self.log_spread[self.joined] + self.log_ratio)
        self.log_concentration.copy_(self.log_concentration[self.joined])

    def count(self, table: ObservationTable) -> None:
        """Count the used observations of each row and tree, for the weights of the KL."""
        used = table.observations.is_used[table.terms.observation]
        self.set_counts(torch.bincount(table.terms.row[used], minlength=len(self.group)))

    def set_counts(self, n_obs: Tensor) -> None:
        """Set the number of used observations of each row, (R,)."""
        self.n_obs = n_obs.to(self.device)
        n_group = torch.zeros(self.n_groups, dtype=torch.int64, device=self.device)
        self.n_group = n_group.index_add_(0, self.group, self.n_obs)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.group.device

    @property
    def log_spread(self) -> Tensor:
        """Log of <F^2> of each row, (R,)."""
        total: Tensor = self.log_spread_step
        for rows, parent in self.prior.levels:
            total = total.index_add(0, rows, total[parent])
        return total

    @torch.no_grad()
    def set_log_spread(self, value: Tensor) -> None:
        """Set <F^2> of each row from its log, (R,)."""
        step = value.clone()
        for rows, parent in self.prior.levels:
            step[rows] = value[rows] - value[parent]
        self.log_spread_step.copy_(step)

    def inference(self) -> Nakagami:
        """q(F) of every row, (R,)."""
        return Nakagami(
            self.log_concentration.clamp(-1.2, 20.0).exp(),
            self.log_spread.exp(),
            validate_args=False,
        )

    def generative(self, batch: Batch, q: Nakagami) -> Expectation:
        """Mean and variance of every observation."""
        known = self.fixed_scale or self.scale(batch)
        row = batch.terms.row
        mean = known.log_k.exp() * q.spread[row]
        spread = mean**2 / q.concentration[row]
        if batch.observation_of_term is not None:
            into = batch.observation_of_term
            n = len(batch.observations)
            mean = mean.new_zeros(n).index_add(0, into, mean)
            spread = spread.new_zeros(n).index_add(0, into, spread)
            row = batch.first_rows
        k = mean / q.spread[row]
        usual = k.detach() * self.prior.spread().detach()[row]
        measured = batch.observations.measured
        return self.likelihood.expectation(measured, mean, spread, k, known, usual)

    def loss(self, batch: Batch, q: Nakagami, with_prior: bool = True) -> MergeTerms:
        """Terms of the ELBO that this batch contributes.

        Without ``with_prior`` the divergence is left for later, to be counted with the sum of the
        ``row_weight`` of several batches.
        """
        used = batch.observations.is_used
        e = self.generative(batch, q)
        log_density = self.likelihood(batch, e)
        if batch.cluster is not None:  # a cluster is used or held out as a whole
            used = used.new_zeros(len(log_density)).index_put((batch.cluster,), used)
        held = batch.observations.is_used[batch.terms.observation].double()
        held = held.new_zeros(self.n_groups).index_add_(0, self.group[batch.terms.row], held)
        weight = (held / self.n_group.clamp_min(1))[self.group]
        if self.is_tied:  # F(-) is not there
            weight = weight * (self.joined == torch.arange(len(weight), device=self.device))
        information = self._information(batch, e)
        return MergeTerms(
            (log_density * used).sum(),
            (weight * self.prior.kl(q)).sum() if with_prior else log_density.new_zeros(()),
            batch.share * (self.scale.penalty() + self.prior.penalty()),
            weight.new_zeros(len(weight)).index_add_(0, batch.first_rows, information),
            weight.detach(),
            information,
        )

    @torch.no_grad()
    def _information(self, batch: Batch, e: Expectation) -> Tensor:
        """W m^2 / D of each used observation, (N,): precision of log m that it gives."""
        robust = self.likelihood.weight(batch, e) * self.likelihood.share_of_spots(batch, e)
        return batch.observations.is_used * robust * e.mean**2 / e.variance
