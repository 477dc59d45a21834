"""Integrator and merger under one ELBO.

    ELBO = sum_i [ log evidence_i(pixels) + <log p(J_i | K_i F_h^2)> - KL[z_i] - KL[theta_i] ]
           - sum_g KL[F_g] - scale penalty

Local terms are sums over observations. Global terms belong to the data set: in a minibatch the
divergence of a group of Bijvoet mates has the weight n_batch / n_g, the scale penalty
n_batch / N, so that minibatches which cover the data once add up to the full batch. The merge's
terms are those of :class:`braggflux.merge.model.merger.Merger`, weights included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.model.integrator import Integrator, IntegratorLoss
from braggflux.integrator.types import IntensityTable, ShoeboxBatch
from braggflux.merge.data.measurement import GaussianMeasurement, Measurement, PhotonCounts
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.objective import MergeTerms, elbo


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


def assemble_elbo(integration: IntegratorLoss | None, merging: MergeTerms | None) -> ElboTerms:
    """Sum the terms of a batch; one stage may be absent."""
    device = (merging.log_likelihood if integration is None else integration.log_evidence).device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    evidence = kl_profile = kl_background = zero
    if integration is not None:
        evidence = integration.log_evidence.double().sum()
        kl_profile = integration.kl_profile.double().sum()
        kl_background = integration.kl_background.double().sum()
    total = evidence - kl_profile - kl_background
    if merging is None:
        return ElboTerms(total, -evidence, kl_profile, kl_background, zero, zero)
    return ElboTerms(
        total + elbo(merging),
        -(evidence + merging.log_likelihood),
        kl_profile,
        kl_background,
        merging.kl_structure_factor,
        merging.scale_penalty,
    )


class JointModel(nn.Module):
    """Integrator and merger with the rule that binds them.

    Parameters
    ----------
    integrator : Integrator
    merger : Merger
    table : ObservationTable
        Of the observations that may be merged.
    table_row : Tensor, (N,) int64
        Row in ``table`` of each row of the shoebox store, -1 for none.
    store_row : Tensor, (N',) int64
        Row in the shoebox store of each row of ``table``.
    flags : Tensor, (N,) int64
        Flags of each row of the shoebox store.
    """

    def __init__(
        self,
        integrator: Integrator,
        merger: Merger,
        table: ObservationTable,
        table_row: Tensor,
        store_row: Tensor,
        flags: Tensor,
    ) -> None:
        super().__init__()
        self.integrator = integrator
        self.merger = merger
        self.observations = table
        self.register_buffer("table_row", table_row)
        self.register_buffer("store_row", store_row)
        self.register_buffer("flags", flags)

    def expected(self, rows: Tensor) -> Tensor:
        """Intensity that the merge expects of store rows, (B,) [photons]; NaN where none."""
        own = self.table_row[rows]
        with torch.no_grad():
            # whatever the first row says stands in for those that the merge does not know
            batch = self.observations.rows(own.clamp_min(0))
            mean = self.merger.generative(batch, self.merger.inference()).mean
        return torch.where(own >= 0, mean * self.observations.unit_intensity, torch.nan)

    def integrate(
        self,
        batch: ShoeboxBatch,
        *,
        sample: bool,
        use_expected: bool,
        noise: Tensor | None = None,
    ) -> tuple[IntegratorLoss, IntensityTable]:
        """Integrator's terms and the table it hands on, with its graph."""
        rows = batch.metadata.refl_row
        expected = self.expected(rows) if use_expected else None
        posterior = self.integrator.inference(batch, expected, sample=sample, noise=noise)
        table = self.integrator.intensity_table(batch.metadata, posterior, self.flags[rows])
        return self.integrator.loss(batch, posterior), table

    def observe(self, table: IntensityTable) -> ObservationTable:
        """Take the likelihoods of an intensity table of the whole store, and hold them."""
        measured = self._measured(table.likelihood[self.store_row])
        is_used = table.is_integrated[self.store_row]
        self.observations = self.observations.measured_as(measured, is_used)
        return self.observations

    def merge_batch(self, table: IntensityTable) -> Batch:
        """Bind an intensity table to what the merge knows of its rows; the usable ones are used.

        What an earlier pass rejected may be good now. Rows are not picked out: how many they are
        is known on the device alone.
        """
        own = self.table_row[table.metadata.refl_row]
        usable = (own >= 0) & table.is_integrated
        # one photon stands in for what may have no finite likelihood
        columns = (torch.where(usable, v, 1.0) for v in table.likelihood.columns().values())
        measured = self._measured(ShiftedPoisson(*columns))
        return self.observations.rows(own.clamp_min(0), measured, usable)

    def _measured(self, likelihood: ShiftedPoisson) -> Measurement:
        """Photon counts, or numbers with errors where the table was made of these."""
        is_counted = isinstance(self.observations.observations.measured, PhotonCounts)
        kind = PhotonCounts if is_counted else GaussianMeasurement
        return kind.of(likelihood, self.observations.unit_intensity)

    def joint_terms(
        self,
        batch: ShoeboxBatch,
        *,
        sample: bool = True,
        coupled: bool = True,
        noise: Tensor | None = None,
    ) -> tuple[ElboTerms, IntensityTable]:
        """ELBO of a minibatch of shoeboxes.

        With ``coupled`` false (staged) the integrator stands alone: its own evidence, no
        expectation from the merge. ``noise``, (B, K), is what the latents are drawn with.
        """
        integration, table = self.integrate(
            batch, sample=sample, use_expected=coupled, noise=noise
        )
        if not coupled:
            return assemble_elbo(integration, None), table
        merging = self.merger.loss(self.merge_batch(table), self.merger.inference())
        return assemble_elbo(integration, merging), table
