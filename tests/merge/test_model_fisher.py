"""Fisher scoring: the optimum is one, it is reached, and the information is that of the ELBO."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_merge import fit, simulate

from braggflux.merge.engine.fisher import fisher_parameters, fisher_step
from braggflux.merge.engine.merger import grouped_median


def negative_elbo(merger, batch):
    terms = merger.loss(batch, merger.inference())
    weights = merger.group_weights(batch.refl_id)
    kl = (weights * terms.kl_structure_factor).sum()
    return -terms.log_likelihood.sum() + kl + terms.scale_penalty


def scoring(merger, batch, n_steps):
    """Only what Fisher scoring moves; minus the ELBO after every step."""
    values = []
    for _ in range(n_steps):
        merger.zero_grad()
        loss = negative_elbo(merger, batch)
        loss.backward()
        values.append(float(loss.detach()))
        fisher_step(merger, batch)
    return values


@pytest.fixture(scope="module")
def scored():
    """Merge with everything else fitted first, then Fisher scoring alone to its end."""
    experiment = simulate(photons=4000.0, d_min=5.0, seed=3)
    merger = experiment.merger()
    fit(merger, experiment.batch, n_steps=60)
    values = scoring(merger, experiment.batch, 40)
    merger.zero_grad()
    negative_elbo(merger, experiment.batch).backward()
    return experiment, merger, values


def test_every_step_descends_until_rounding(scored):
    values = np.array(scored[2])
    assert (np.diff(values) < 1e-6 * abs(values[0])).all()
    assert values[-10] - values[-1] < 0.01  # nats, over all observations


def test_the_end_is_a_maximum_of_the_elbo(scored):
    """The slope left would move no parameter by a hundredth of its standard deviation."""
    experiment, merger, _ = scored
    seen = merger.n_obs > 0
    information = merger.log_concentration.detach().exp()[seen]  # precision of log <F^2>
    assert (merger.log_spread.grad[seen].abs() / information.sqrt()).max() < 0.01
    assert merger.scale.log_frame_scale.grad.abs().max() < 0.5
    before = float(negative_elbo(merger, experiment.batch).detach())
    rng = torch.Generator().manual_seed(0)
    for p in fisher_parameters(merger):
        saved = p.detach().clone()
        with torch.no_grad():
            p += 0.01 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
        assert float(negative_elbo(merger, experiment.batch).detach()) > before
        with torch.no_grad():
            p.copy_(saved)


def test_concentration_is_the_information(scored):
    """q's precision in the log against the curvature of the ELBO by finite differences."""
    experiment, merger, _ = scored
    strong = merger.n_obs.argsort(descending=True)[:5]
    for row in strong.tolist():
        step = 0.02 / float(merger.log_concentration[row].detach().exp()) ** 0.5
        values = []
        for sign in (-1, 0, 1):
            with torch.no_grad():
                merger.log_spread[row] += sign * step
            values.append(float(negative_elbo(merger, experiment.batch).detach()))
            with torch.no_grad():
                merger.log_spread[row] -= sign * step
        curvature = (values[0] - 2 * values[1] + values[2]) / step**2
        k = float(merger.log_concentration[row].detach().exp())
        assert k == pytest.approx(curvature, rel=0.25)


def test_adam_alone_does_not_get_further(scored):
    experiment, merger, values = scored
    optimizer = torch.optim.Adam(fisher_parameters(merger), lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        loss = negative_elbo(merger, experiment.batch)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) > values[-1] - 0.05


@pytest.fixture
def astray():
    """A fitted merge with one group of mates moved far from its consistent observations."""
    experiment = simulate(photons=4000.0, d_min=6.0, seed=4)
    merger, batch = experiment.merger(), experiment.batch
    fit(merger, batch, n_steps=60)
    assert merger.restart_doubted(batch) == 0
    right = merger.log_spread.detach().clone()
    strong = (merger.n_obs > 3) & (merger.log_concentration > 6.0)
    rows = torch.nonzero(merger.group == merger.group[torch.nonzero(strong)[0, 0]])[:, 0]
    with torch.no_grad():
        merger.log_spread[rows] -= 0.6
    return merger, batch, rows, right[rows]


def test_steps_lead_back_to_observations_that_pass_for_outliers(astray):
    """With the weights of the good part alone, steps jump to and fro over them."""
    merger, batch, rows, right = astray
    scoring(merger, batch, 30)
    torch.testing.assert_close(merger.log_spread[rows], right, rtol=0, atol=0.01)


def test_amplitudes_that_doubt_all_their_observations_are_started_anew(astray):
    merger, batch, rows, right = astray
    assert merger.restart_doubted(batch) == 1
    torch.testing.assert_close(merger.log_spread[rows], right, rtol=0, atol=0.1)
    assert merger.restart_doubted(batch) == 0


def test_one_wrong_observation_does_not_hold_an_amplitude(astray):
    """q(F) sits on one observation that says half, all others are doubted: the majority wins."""
    merger, batch, rows, right = astray
    members = torch.isin(batch.refl_id, rows).nonzero()[:, 0]
    counts = batch.effective_counts.clone()
    counts[members[0]] *= float(torch.exp(torch.tensor(-0.6)))
    batch = replace(batch, effective_counts=counts)
    assert merger.restart_doubted(batch) == 1
    scoring(merger, batch, 30)
    torch.testing.assert_close(merger.log_spread[rows], right, rtol=0, atol=0.03)


def test_grouped_median_equals_a_loop():
    rng = np.random.default_rng(0)
    group = rng.choice([3, 7, 8, 20], 61)
    value, sigma = rng.normal(size=61), rng.uniform(0.1, 2, 61)
    median, of_median = grouped_median(*map(torch.as_tensor, (value, sigma, group)))
    for k, number in enumerate((3, 7, 8, 20)):
        inside = np.flatnonzero(group == number)
        middle = inside[np.argsort(value[inside])][(len(inside) - 1) // 2]
        assert (median[k], of_median[k]) == (value[middle], sigma[middle])
