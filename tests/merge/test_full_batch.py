"""Full-batch steps: the optimum is one, it is reached, left halfway it is reached all the same."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_merge import fit, simulate

from braggflux.merge.fit import full_batch as full_batch_module
from braggflux.merge.fit.full_batch import FullBatchFit, grouped_median, restart_doubted
from braggflux.merge.fit.training import start
from braggflux.merge.model.objective import elbo


def negative_elbo(merging, table=None):
    table = merging.table if table is None else table
    return -elbo(merging.merger.loss(table.everything(), merging.merger.inference()))


def newton_parameters(merger):
    return (merger.log_spread_step, merger.log_concentration, *merger.scale.newton_parameters)


def newton_alone(merging, n_steps, table=None):
    """Steps of Newton's kind alone; minus the ELBO before every step."""
    table = merging.table if table is None else table
    moved = {id(p) for p in newton_parameters(merging.merger)}
    for p in merging.merger.parameters():
        p.requires_grad_(id(p) in moved)
    full_batch, values = FullBatchFit(merging.merger, merging.config), []
    for _ in range(n_steps):
        values.append(float(negative_elbo(merging, table).detach()))
        full_batch.steps(table, 1, lambda k: 0.0)
    return values


@pytest.fixture(scope="module")
def scored():
    """Merge with everything else fitted first, then Newton's steps alone to their end."""
    merging = simulate(photons=4000.0, d_min=5.0, seed=3).merging(n_correlation_shells=2)
    fit(merging, n_steps=60)
    values = newton_alone(merging, 40)
    merging.merger.zero_grad()
    negative_elbo(merging).backward()
    return merging, values


def test_every_step_descends_until_rounding(scored):
    values = np.array(scored[1])
    assert (np.diff(values) < 1e-6 * abs(values[0])).all()
    assert values[-10] - values[-1] < 0.01  # nats, over all observations


def test_the_end_is_a_maximum_of_the_elbo(scored):
    """The slope left would move no parameter by a hundredth of its standard deviation."""
    merging, merger = scored[0], scored[0].merger
    seen = merger.n_obs > 0
    information = merger.log_concentration.detach().exp()[seen]  # precision of log <F^2>
    assert (merger.log_spread_step.grad[seen].abs() / information.sqrt()).max() < 0.01
    assert merger.scale.frames.log_frame_scale.grad.abs().max() < 0.5
    before = float(negative_elbo(merging).detach())
    rng = torch.Generator().manual_seed(0)
    for p in newton_parameters(merger):
        saved = p.detach().clone()
        with torch.no_grad():
            p += 0.01 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
        assert float(negative_elbo(merging).detach()) > before
        with torch.no_grad():
            p.copy_(saved)


def test_concentration_is_the_information(scored):
    """q's precision in the log against the curvature of the ELBO by finite differences."""
    merging, merger = scored[0], scored[0].merger
    best = merger.log_spread.detach().clone()
    for row in merger.n_obs.argsort(descending=True)[:5].tolist():
        step = 0.02 / float(merger.log_concentration[row].detach().exp()) ** 0.5
        values = []
        for sign in (-1, 0, 1):
            moved = best.clone()
            moved[row] += sign * step
            merger.set_log_spread(moved)
            values.append(float(negative_elbo(merging).detach()))
        merger.set_log_spread(best)
        curvature = (values[0] - 2 * values[1] + values[2]) / step**2
        k = float(merger.log_concentration[row].detach().exp())
        assert k == pytest.approx(curvature, rel=0.25)


def test_the_information_of_the_data_is_kept_for_the_widths(scored):
    merging, merger = scored[0], scored[0].merger
    terms = merger.loss(merging.table.everything(), merger.inference())
    torch.testing.assert_close(merger.information, terms.information, rtol=1e-3, atol=1e-3)
    assert (merger.information[merger.n_obs > 0] > 0).all()


def test_adam_alone_does_not_get_further(scored):
    merging, values = scored
    merging = replace(merging, merger=deepcopy(merging.merger))
    optimizer = torch.optim.Adam(newton_parameters(merging.merger), lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        loss = negative_elbo(merging)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) > values[-1] - 0.05


def test_observations_in_parts_are_the_same_step(monkeypatch):
    """Of a large table only the graph of a part is held at a time."""
    merging = simulate(photons=400.0, d_min=6.0, seed=5).merging(n_correlation_shells=2)
    ends, sizes = [], []
    for part_rows in (1 << 18, 100):
        monkeypatch.setattr(full_batch_module, "PART_ROWS", part_rows)
        own = deepcopy(merging)
        loss = own.merger.loss
        own.merger.loss = lambda batch, q, loss=loss: (
            sizes.append(len(batch.rows)) or loss(batch, q)
        )
        FullBatchFit(own.merger, own.config).steps(own.table, 3, lambda k: 0.0)
        ends.append([p.detach().clone() for p in own.merger.parameters()])
        if part_rows == 100:
            assert max(sizes[3:]) == 100
            assert sum(sizes[3:]) == sum(sizes[:3]) == 3 * len(own.table.observations)
    for whole, parts in zip(*ends, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


def test_a_fit_that_is_resumed_is_the_same_fit():
    """Adam's moments and counts go with the state; bit for bit."""
    ends = []
    for is_resumed in (False, True):
        merging = simulate(d_min=6.0).merging()
        start(merging.merger, merging.table)
        first = FullBatchFit(merging.merger, merging.config)
        first.steps(merging.table, 5, lambda k: k / 10)
        second = first
        if is_resumed:
            states = deepcopy((merging.merger.state_dict(), first.state_dict()))
            merging = simulate(d_min=6.0).merging()
            merging.merger.load_state_dict(states[0])
            second = FullBatchFit(merging.merger, merging.config)
            second.load_state_dict(states[1])
        second.steps(merging.table, 5, lambda k: 0.5 + k / 10)
        ends.append(merging.merger.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


# --- amplitudes that went astray


@pytest.fixture
def astray():
    """A fitted merge with one group of mates moved far from its consistent observations."""
    merging = simulate(photons=4000.0, d_min=6.0, seed=4).merging(n_correlation_shells=1, dof=8.0)
    merger = merging.merger
    fit(merging, n_steps=60)
    assert restart_doubted(merger, merging.table) == 0
    right = merger.log_spread.detach().clone()
    strong = (merger.n_obs > 3) & (merger.log_concentration > 6.0)
    rows = torch.nonzero(merger.group == merger.group[torch.nonzero(strong)[0, 0]])[:, 0]
    moved = right.clone()
    moved[rows] -= 0.6
    merger.set_log_spread(moved)
    return merging, rows, right[rows]


def test_steps_lead_back_to_observations_that_pass_for_outliers(astray):
    merging, rows, right = astray
    newton_alone(merging, 30)
    torch.testing.assert_close(merging.merger.log_spread[rows], right, rtol=0, atol=0.01)


def test_amplitudes_that_doubt_all_their_observations_are_started_anew(astray):
    merging, rows, right = astray
    assert restart_doubted(merging.merger, merging.table) == 1
    torch.testing.assert_close(merging.merger.log_spread[rows], right, rtol=0, atol=0.1)
    assert restart_doubted(merging.merger, merging.table) == 0


def test_one_wrong_observation_does_not_hold_an_amplitude(astray):
    """q(F) sits on one observation that says half, all others are doubted: the majority wins."""
    merging, rows, _ = astray
    merger, observed = merging.merger, merging.table.observations
    first = torch.isin(merging.row, rows).nonzero()[0, 0]
    counts = observed.measured.effective_counts.clone()
    counts[first] *= float(torch.exp(torch.tensor(-0.6)))
    measured = replace(observed.measured, effective_counts=counts)
    table = merging.table.measured_as(measured, observed.is_used)
    far = merger.log_spread.detach()[rows]
    assert restart_doubted(merger, table) == 1
    newton_alone(merging, 30, table)
    found = merger.log_spread.detach()[rows]
    without = observed.is_used.clone()
    without[first] = False
    newton_alone(merging, 30, table.measured_as(measured, without))
    majority = merger.log_spread.detach()[rows]
    assert (found - majority).abs() < 0.1 * (far - majority).abs()
    assert (found - majority).abs() < merger.log_concentration[rows].exp() ** -0.5


def test_what_is_not_used_has_no_vote(astray):
    merging, rows, _ = astray
    used = ~torch.isin(merging.row, rows)
    assert restart_doubted(merging.merger, merging.used(used)) == 0


def test_grouped_median_equals_a_loop():
    rng = np.random.default_rng(0)
    group = rng.choice([3, 7, 8, 20], 61)
    value, sigma = rng.normal(size=61), rng.uniform(0.1, 2, 61)
    median, of_median = grouped_median(*map(torch.as_tensor, (value, sigma, group)))
    for k, number in enumerate((3, 7, 8, 20)):
        inside = np.flatnonzero(group == number)
        middle = inside[np.argsort(value[inside])][(len(inside) - 1) // 2]
        assert (median[k], of_median[k]) == (value[middle], sigma[middle])
