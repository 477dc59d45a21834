"""What must not depend on how the data are written down, and the bound that the ELBO is."""

from dataclasses import replace

import numpy as np
import pytest
import tolerances
import torch
from simulated_merge import SPACE_GROUP, simulate

from braggflux.integrator.crystal import symmetry
from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.merge.engine.amplitudes import merged_amplitudes
from braggflux.merge.engine.likelihood import PhotonCountLikelihood


@pytest.fixture(scope="module")
def experiment():
    return simulate(d_min=5.0)


@pytest.fixture(scope="module")
def merger(experiment):
    merger = experiment.merger()
    merger.start(experiment.batch)
    return merger


def test_order_of_observations_does_not_matter(experiment, merger):
    order = torch.randperm(len(experiment.refl_id))
    shuffled = experiment.batch[order]
    with torch.no_grad():
        q = merger.inference()
        plain = merger.loss(experiment.batch, q).log_likelihood
        mixed = merger.loss(shuffled, q).log_likelihood
    assert torch.equal(plain[order], mixed)
    a, b = merged_amplitudes(merger, experiment.batch), merged_amplitudes(merger, shuffled)
    torch.testing.assert_close(
        a.amplitude, b.amplitude, rtol=tolerances.FLOAT64_SUM, atol=1e-12, equal_nan=True
    )


def test_symmetry_equivalents_are_one_reflection(experiment):
    """Any equivalent written for an observed index belongs to the same row."""
    hkl = experiment.table.metadata.miller_index.numpy()
    rotations = symmetry.rotations(SPACE_GROUP)
    for rotation in rotations:
        same = hkl @ rotation
        np.testing.assert_array_equal(experiment.asu.refl_id(same), experiment.refl_id)
    mates = experiment.asu.refl_id(-hkl)
    np.testing.assert_array_equal(mates, experiment.asu.friedel_mate[experiment.refl_id])


def test_units_of_the_amplitudes_do_not_matter(experiment, merger):
    """F in other units and K to match: the same expected photons, the same likelihood."""
    with torch.no_grad():
        before = merger.loss(experiment.batch, merger.inference())
        scaled = experiment.merger()
        scaled.load_state_dict(merger.state_dict())
        scaled.log_spread += 3.0
        scaled.scale.log_frame_scale -= 3.0
        scaled.prior.wilson.log_sigma += 3.0
        after = scaled.loss(experiment.batch, scaled.inference())
    torch.testing.assert_close(after.log_likelihood, before.log_likelihood, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        after.kl_structure_factor, before.kl_structure_factor, rtol=1e-7, atol=1e-9
    )


def test_swapping_the_names_of_the_mates_swaps_the_result(experiment, merger):
    """F(+) and F(-) are alike in the likelihood and in the output amplitudes."""
    mate = torch.as_tensor(experiment.asu.friedel_mate)
    swapped = replace(experiment.batch, refl_id=mate[experiment.refl_id])
    other = experiment.merger()
    other.load_state_dict(merger.state_dict())
    with torch.no_grad():
        other.log_spread.copy_(merger.log_spread[mate])
        other.log_concentration.copy_(merger.log_concentration[mate])
        a = merger.loss(experiment.batch, merger.inference())
        b = other.loss(swapped, other.inference())
    torch.testing.assert_close(a.log_likelihood, b.log_likelihood)
    # the prior is symmetric as a law: p(F+) p(F-|F+) = p(F-) p(F+|F-); I_0 at the mean keeps that
    torch.testing.assert_close(a.kl_structure_factor, b.kl_structure_factor, rtol=1e-8, atol=1e-8)


def toy(beta: float):
    """Five counts of one acentric reflection, without error model: K, counts, likelihood."""
    scale = torch.tensor([1.0, 0.5, 2.0, 1.5, 0.8]).double()
    counts = torch.tensor([30.0, 22.0, 71.0, 40.0, 35.0]).double() + beta
    observed = ShiftedPoisson(counts, torch.full((5,), beta).double(), torch.ones(5).double())
    return scale, observed


def log_evidence(scale, observed, sigma: float) -> float:
    """log of the integral of Wilson's law times the likelihood, by a fine grid over F."""
    f = torch.linspace(1e-3, 15.0, 20001).double()
    log_joint = Nakagami(torch.ones(1).double(), torch.tensor([sigma]).double()).log_prob(f)
    log_joint = log_joint + observed.log_prob(scale * f[:, None] ** 2).sum(-1)
    return (torch.logsumexp(log_joint, 0) + torch.log(f[1] - f[0])).item()


def elbo(q: Nakagami, scale, observed, sigma: float, n_nodes: int = 5) -> float:
    nodes, weights = q.intensity_nodes(n_nodes)
    expected = weights @ observed.log_prob(scale * nodes).sum(-1)
    prior = Nakagami(torch.ones(1).double(), torch.tensor([sigma]).double())
    return (expected - torch.distributions.kl_divergence(q, prior)).item()


def test_posterior_is_exact_for_counts_without_background():
    """Conjugate: k = 1 + sum n, rate = 1/Sigma + sum K; the bound is the evidence."""
    scale, observed = toy(beta=1e-9)
    k = 1 + observed.effective_counts.sum()
    omega = k / (1 / 50.0 + scale.sum())
    q = Nakagami(k[None], omega[None])
    # 5 nodes of the Wilson-Hilferty approximation: 1e-6 of the expectation at this k
    assert elbo(q, scale, observed, 50.0) == pytest.approx(
        log_evidence(scale, observed, 50.0), abs=1e-3
    )


@pytest.mark.parametrize("beta", [1e-9, 10.0, 200.0])
def test_the_elbo_is_a_bound(beta):
    """No q exceeds the evidence, and the best one comes close."""
    scale, observed = toy(beta)
    exact = log_evidence(scale, observed, 50.0)
    found = [
        elbo(
            Nakagami(torch.tensor([k]).double(), torch.tensor([omega]).double()),
            scale, observed, 50.0,
        )
        for k in np.geomspace(1, 1000, 40)
        for omega in np.linspace(20, 60, 41)
    ]  # fmt: skip
    assert max(found) < exact + 1e-3
    assert max(found) > exact - 0.05


def test_error_model_only_widens():
    """With a relative error the density at the truth falls and that in the tails rises."""
    observed = ShiftedPoisson(*torch.tensor([[1020.0], [20.0], [1.0]]).double())
    narrow, wide = PhotonCountLikelihood(1e-3, 1e-5), PhotonCountLikelihood(0.1, 1e-5)
    near, far = torch.tensor(1000.0).double(), torch.tensor(1250.0).double()
    assert wide(observed, near) < narrow(observed, near)
    assert wide(observed, far) > narrow(observed, far)
