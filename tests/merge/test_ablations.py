"""Ablations of the merge do what they say: observed variance, mates apart, no physics."""

from __future__ import annotations

import math

import pytest
import torch
from simulated_merge import simulate
from torch.distributions import kl_divergence

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.merge.data.measurement import GaussianMeasurement, PhotonCounts
from braggflux.merge.fit.half_set_correlation import half_set_correlation
from braggflux.merge.fit.training import start
from braggflux.merge.prior.wilson import Wilson


@pytest.fixture(scope="module")
def weak():
    """Some photons on twenty of background."""
    return simulate(d_min=5.0, photons=20.0, background=20.0)


def test_observed_variance_sees_nothing_but_intensity_and_sigma():
    """Two likelihoods of one maximum and one curvature: alike to the Normal law alone."""
    a, beta = torch.tensor([12.0, 40.0]).double(), torch.tensor([8.0, 8.0]).double()
    one = ShiftedPoisson(a, beta, torch.ones(2).double())
    # a -> c a, t -> sqrt(c) t keeps a / t^2; beta follows to keep the maximum
    c = 4.0
    t = math.sqrt(c) * one.exposure
    two = ShiftedPoisson(c * a, c * a / t - one.mode, t)
    mean, spread = torch.tensor([9.0, 60.0]).double(), torch.tensor([1.0, 4.0]).double()
    for kind, is_alike in ((GaussianMeasurement, True), (PhotonCounts, False)):
        first, second = kind.of(one, 2.0), kind.of(two, 2.0)
        torch.testing.assert_close(first.mode, one.mode / 2)
        for values in (
            (first.variance(mean), second.variance(mean)),
            (first.compare(mean, spread).square, second.compare(mean, spread).square),
        ):
            assert torch.allclose(*values, rtol=1e-9) == is_alike, kind


def test_a_run_hands_on_what_a_file_of_counts_does(weak):
    """With and without photon counts: the table's measurement is that of the likelihoods."""
    for photon_counts, kind in ((True, PhotonCounts), (False, GaussianMeasurement)):
        merging = weak.merging(photon_counts=photon_counts)
        likelihood = weak.table.likelihood[merging.own_row]
        found = merging.table.observations.measured
        assert type(found) is kind
        expected = kind.of(likelihood, merging.table.unit_intensity)
        torch.testing.assert_close(found.mode, expected.mode, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found.observed_variance, expected.observed_variance, rtol=1e-5, atol=0
        )


def test_uncoupled_mates_have_a_wilson_prior_each(weak):
    merging = weak.merging(prior="wilson")
    merger = merging.merger
    start(merger, merging.table)
    assert not merger.prior.is_coupled
    q = merger.inference()
    alone = kl_divergence(q, merger.prior.part(Wilson).p_structure_factor())
    torch.testing.assert_close(merger.prior.kl(q), alone)
    with pytest.raises(LookupError):
        half_set_correlation(merger, merging.table, seed=0)
    # mates that are apart are trees of their own
    weight = merger.loss(merging.table.everything(), q).row_weight
    assert torch.equal(weight > 0, merger.n_obs > 0)
    coupled = weak.merging().merger
    coupled.load_state_dict(merger.state_dict(), strict=False)
    assert not torch.allclose(coupled.prior.kl(coupled.inference()), alone)


def test_without_physics_images_and_network_scale(weak):
    """No frame scale, B or absorption; L/P stays."""
    with_physics, merging = weak.merging(), weak.merging(physical_scale=False)
    physical = {"frames", "b_factor", "absorption", "detector"}
    assert physical < set(with_physics.merger.scale.terms)
    assert not physical & set(merging.merger.scale.terms)
    assert merging.merger.scale.network is not None
    with torch.no_grad():
        for case in (with_physics, merging):
            log_k = case.merger.scale(case.table.everything()).log_k
            lp = weak.table.metadata.lp[case.own_row].double()
            torch.testing.assert_close(log_k, -lp.log(), rtol=0, atol=1e-6)
