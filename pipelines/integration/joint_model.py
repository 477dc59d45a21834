"""The one objective: integrator and merger under a single ELBO, assembled here and nowhere else.

    ELBO = sum_i [ log evidence_i(pixels) + <log p(J_i | K_i F_h^2)> - KL[z_i] - KL[theta_i] ]
           - sum_g KL[F_g] - scale penalty

Local terms are sums over observations. Global terms belong to the data set: in a minibatch the
divergence of a group of Bijvoet mates has the weight n_batch / n_g, the scale penalty
n_batch / N, so that minibatches which cover the data once add up to the full batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from braggflux.integrator.model.integrator import Integrator, IntegratorLoss
from braggflux.integrator.types import IntensityTable, ShoeboxBatch
from braggflux.merge.engine.merger import Merger, merge_batch, usable
from braggflux.merge.engine.types import MergeBatch, MergeLoss


@dataclass(frozen=True)
class ElboTerms:
    """The ELBO of a batch and its parts, sums in nats, ()."""

    elbo: Tensor
    nll: Tensor
    kl_profile: Tensor
    kl_background: Tensor
    kl_structure_factor: Tensor
    scale_penalty: Tensor

    def detached(self) -> dict[str, float]:
        """Plain numbers."""
        return {k: float(v.detach()) for k, v in vars(self).items()}


def assemble_elbo(
    integration: IntegratorLoss | None,
    merging: MergeLoss | None,
    group_weights: Tensor | None = None,
    batch_share: float = 1.0,
) -> ElboTerms:
    """Sum the terms of a batch; either stage may be absent.

    Parameters
    ----------
    integration : IntegratorLoss, optional
    merging : MergeLoss, optional
    group_weights : Tensor, (P,), optional
        Share of each group's observations in the batch; needed with ``merging``.
    batch_share : float
        Share of all merged observations in the batch.
    """
    zero = torch.zeros((), dtype=torch.float64)
    log_likelihood = kl_profile = kl_background = kl_f = penalty = zero
    if integration is not None:
        log_likelihood = integration.log_evidence.double().sum()
        kl_profile = integration.kl_profile.double().sum()
        kl_background = integration.kl_background.double().sum()
    if merging is not None:
        log_likelihood = log_likelihood + merging.log_likelihood.sum()
        kl_f = (group_weights * merging.kl_structure_factor).sum()
        penalty = batch_share * merging.scale_penalty
    elbo = log_likelihood - kl_profile - kl_background - kl_f - penalty
    return ElboTerms(elbo, -log_likelihood, kl_profile, kl_background, kl_f, penalty)


class JointModel(nn.Module):
    """Integrator and merger with the rule that binds them.

    Parameters
    ----------
    integrator : Integrator
    merger : Merger
    refl_id : Tensor, (N,) int64
        Unique reflection of each row of the shoebox store, -1 for none.
    flags : Tensor, (N,) int64
        Flags of each row of the shoebox store.
    """

    def __init__(
        self, integrator: Integrator, merger: Merger, refl_id: Tensor, flags: Tensor
    ) -> None:
        super().__init__()
        self.integrator = integrator
        self.merger = merger
        self.register_buffer("refl_id", refl_id)
        self.register_buffer("flags", flags)

    def expected(self, rows: Tensor) -> Tensor:
        """Intensity that the merge expects of store rows, (B,) [photons]; NaN where none."""
        refl_id = self.refl_id[rows]
        expected = self.merger.expected_intensity(refl_id.clamp_min(0), rows)
        return torch.where(refl_id >= 0, expected, torch.nan)

    def integrate(
        self, batch: ShoeboxBatch, *, sample: bool, use_expected: bool
    ) -> tuple[IntegratorLoss, IntensityTable]:
        """Integrator's terms and the table it hands on, with its graph."""
        rows = batch.metadata.refl_row
        expected = self.expected(rows) if use_expected else None
        posterior = self.integrator.inference(batch, expected, sample=sample)
        table = self.integrator.intensity_table(batch.metadata, posterior, self.flags[rows])
        return self.integrator.loss(batch, posterior), table

    def merge_terms(self, table: IntensityTable) -> tuple[MergeLoss, MergeBatch]:
        """Give the merge's terms for the usable rows of a table."""
        refl_id = self.refl_id[table.metadata.refl_row]
        keep = usable(table, refl_id)
        batch = merge_batch(table[keep], refl_id[keep])
        return self.merger.loss(batch, self.merger.inference()), batch

    def joint_terms(
        self, batch: ShoeboxBatch, *, sample: bool = True, coupled: bool = True
    ) -> tuple[ElboTerms, IntensityTable]:
        """ELBO of a minibatch of shoeboxes.

        With ``coupled`` false (staged) the integrator stands alone: its own evidence, no
        expectation from the merge.
        """
        integration, table = self.integrate(batch, sample=sample, use_expected=coupled)
        if not coupled:
            return assemble_elbo(integration, None), table
        merging, merged = self.merge_terms(table)
        weights = self.merger.group_weights(merged.refl_id)
        share = len(merged) / max(int(self.merger.n_obs.sum()), 1)
        return assemble_elbo(integration, merging, weights, share), table
