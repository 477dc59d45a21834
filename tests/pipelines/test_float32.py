"""Fifty epochs in float32, from empty boxes to a million counts a pixel, without a NaN."""

from __future__ import annotations

import pytest
import torch
from simulated_joint import joint_problem

from braggflux.integrator.types import ShoeboxBatch
from braggflux.merge.fit.half_set_correlation import half_set_correlation
from braggflux.merge.output.amplitudes import merged_rows, used_observations
from braggflux.pipelines.integration.trainer import GRADIENT_CLIP

EPOCHS = 50


@pytest.mark.parametrize("photon_counts", [True, False])
@pytest.mark.slow
def test_fifty_epochs_from_nothing_to_a_million_counts(photon_counts):
    problem = joint_problem(64, photons=3e8, decades=9.0, photon_counts=photon_counts)
    model, batch = problem.model, problem.batch
    counts, is_valid = batch.counts.clone(), batch.is_valid.clone()
    counts[:4] = 0.0  # dark
    is_valid[4] = False  # nothing recorded
    is_valid[5, :, 4:] = False  # half of it
    counts[6] = 0.0
    counts[6, 3, 4, 4] = 1e6  # one pixel has it all
    counts = counts.clamp_max(1e6)
    batch = ShoeboxBatch(counts * is_valid, is_valid, batch.metadata)
    assert batch.counts.dtype == torch.float32
    assert (batch.counts == 1e6).sum() > 10
    assert (batch.counts.sum((1, 2, 3)) == 0).sum() >= 5

    integrator = torch.optim.Adam(model.integrator.parameters(), lr=2e-3)
    merger = torch.optim.Adam(model.merger.parameters(), lr=3e-2)
    for epoch in range(EPOCHS):
        model.zero_grad(set_to_none=True)
        terms, table = model.joint_terms(batch)
        (-terms.elbo / len(batch)).backward()
        parameters = list(model.named_parameters())
        bad = [n for n, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
        assert not bad, f"epoch {epoch}: {bad}"
        torch.nn.utils.clip_grad_norm_(model.integrator.parameters(), GRADIENT_CLIP)
        integrator.step()
        merger.step()
        half_set_correlation(model.merger, model.observe(table.detach()), seed=epoch)
        assert all(torch.isfinite(v) for v in vars(terms).values()), f"epoch {epoch}: {terms}"
    with torch.no_grad():
        _, table = model.integrate(batch, sample=False, use_expected=True)
    for name in ("effective_counts", "effective_background", "exposure", "background"):
        assert table.columns()[name].isfinite().all(), name
    observed = model.observe(table)
    merged = merged_rows(model.merger, observed, used_observations(model.merger, observed))
    seen = merged.n_obs > 0
    assert seen.sum() > 10
    for column in (merged.amplitude, merged.sigma_amplitude, merged.intensity):
        assert column[seen].isfinite().all()
    assert (merged.sigma_intensity[seen] > 0).all()
