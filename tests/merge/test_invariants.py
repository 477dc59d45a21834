"""What must not depend on how the data are written down, and the bound that the ELBO is."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from simulated_merge import SPACE_GROUP, Experiment, simulate

from braggflux.integrator.crystal import symmetry
from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.merge.data.measurement import PhotonCounts
from braggflux.merge.fit.training import start
from braggflux.merge.likelihood.common_error import CommonError
from braggflux.merge.likelihood.error_model import ErrorModel
from braggflux.merge.likelihood.student_t import Normal
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.scale.base import Scale

SETTINGS = {"n_correlation_shells": 1}


@pytest.fixture(scope="module")
def experiment():
    return simulate(d_min=5.0)


@pytest.fixture(scope="module")
def started(experiment):
    merging = experiment.merging(**SETTINGS)
    start(merging.merger, merging.table)
    return merging


def terms(merging):
    with torch.no_grad():
        return merging.merger.loss(merging.table.everything(), merging.merger.inference())


def test_order_of_observations_does_not_matter(experiment, started):
    order = np.random.default_rng(0).permutation(len(experiment.refl_id))
    shuffled = experiment.subset(order).merging(**SETTINGS)
    start(shuffled.merger, shuffled.table)
    assert torch.equal(torch.as_tensor(order)[shuffled.own_row], started.own_row)
    for name, value in started.merger.state_dict().items():
        assert torch.equal(value, shuffled.merger.state_dict()[name]), name


def test_symmetry_equivalents_are_one_reflection(experiment):
    """Any equivalent written for an observed index belongs to the same row."""
    hkl = experiment.table.metadata.miller_index.numpy()
    for rotation in symmetry.rotations(SPACE_GROUP):
        np.testing.assert_array_equal(experiment.asu.refl_id(hkl @ rotation), experiment.refl_id)
    mates = experiment.asu.refl_id(-hkl)
    np.testing.assert_array_equal(mates, experiment.asu.friedel_mate[experiment.refl_id])


def test_units_of_the_amplitudes_do_not_matter(started):
    """F in other units and K to match: the same expected photons, the same likelihood."""
    before = terms(started)
    merger = started.merger
    saved = deepcopy(merger.state_dict())
    with torch.no_grad():
        merger.set_log_spread(merger.log_spread + 3.0)
        merger.scale.frames.log_frame_scale -= 3.0
        merger.prior.part(Wilson).log_sigma += 3.0
    after = terms(started)
    merger.load_state_dict(saved)
    for name in ("log_likelihood", "kl_structure_factor"):
        torch.testing.assert_close(
            getattr(after, name), getattr(before, name), rtol=1e-8, atol=1e-8
        )


def test_swapping_the_names_of_the_mates_swaps_the_result(experiment, started):
    """F(+) and F(-) are alike in the likelihood and in the prior."""
    swapped = other_hand(experiment).merging(**SETTINGS)
    mate = torch.as_tensor(experiment.asu.friedel_mate)
    ours, theirs = started.merger, swapped.merger
    theirs.load_state_dict(ours.state_dict())
    theirs.set_log_spread(ours.log_spread.detach()[mate])
    with torch.no_grad():
        theirs.log_concentration.copy_(ours.log_concentration[mate])
    a, b = terms(started), terms(swapped)
    torch.testing.assert_close(a.log_likelihood, b.log_likelihood)
    # the prior is symmetric as a law: p(F+) p(F-|F+) = p(F-) p(F+|F-); I_0 at the mean keeps that
    torch.testing.assert_close(a.kl_structure_factor, b.kl_structure_factor, rtol=1e-8, atol=1e-8)


def other_hand(experiment) -> Experiment:
    """Same photons, every index with the opposite sign."""
    metadata = experiment.table.metadata
    metadata = replace(metadata, miller_index=-metadata.miller_index)
    mate = torch.as_tensor(experiment.asu.friedel_mate)
    return replace(
        experiment,
        table=replace(experiment.table, metadata=metadata),
        refl_id=mate[experiment.refl_id],
    )


def toy(beta: float):
    """Five counts of one acentric reflection, without error model: K, counts, likelihood."""
    scale = torch.tensor([1.0, 0.5, 2.0, 1.5, 0.8]).double()
    counts = torch.tensor([30.0, 22.0, 71.0, 40.0, 35.0]).double() + beta
    return scale, PhotonCounts(counts, torch.full((5,), beta).double(), torch.ones(5).double())


def log_evidence(scale, observed, sigma: float) -> float:
    """log of the integral of Wilson's law times the likelihood, by a fine grid over F."""
    f = torch.linspace(1e-3, 15.0, 20001).double()
    log_joint = Nakagami(torch.ones(1).double(), torch.tensor([sigma]).double()).log_prob(f)
    log_joint = log_joint + ShiftedPoisson.log_prob(observed, scale * f[:, None] ** 2).sum(-1)
    return (torch.logsumexp(log_joint, 0) + torch.log(f[1] - f[0])).item()


def elbo(q: Nakagami, scale, observed, sigma: float) -> float:
    """Of the Normal law without an error model, that is of the counts themselves."""
    model = Normal(ErrorModel(False, 1.0), CommonError(False))
    batch = SimpleNamespace(observations=SimpleNamespace(measured=observed), cluster=None)
    mean = scale * q.spread
    spread = mean**2 / q.concentration
    expected = model.expectation(observed, mean, spread, scale, Scale(torch.zeros(())), mean)
    maximum = 0.5 * torch.log(2 * torch.pi * observed.observed_variance) + observed.log_maximum
    with torch.no_grad():
        value = (model(batch, expected) + maximum).sum()
    prior = Nakagami(torch.ones(1).double(), torch.tensor([sigma]).double())
    return (value - torch.distributions.kl_divergence(q, prior)).item()


@pytest.mark.parametrize("beta", [1e-9, 10.0, 200.0])
def test_the_elbo_is_a_bound(beta):
    """No q exceeds the evidence by more than the second order costs; the best comes close."""
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
    assert max(found) < exact + 0.02
    assert max(found) > exact - 0.05


def test_posterior_is_exact_for_counts_without_background():
    """Conjugate: k = 1 + sum n, rate = 1/Sigma + sum K; the bound is the evidence."""
    scale, observed = toy(beta=1e-9)
    k = 1 + observed.effective_counts.sum()
    q = Nakagami(k[None], (k / (1 / 50.0 + scale.sum()))[None])
    # <log F^2> to second order: 1 / (12 k^2) of each of 198 photons
    exact = log_evidence(scale, observed, 50.0)
    assert elbo(q, scale, observed, 50.0) == pytest.approx(exact, abs=5e-3)
