"""Prior from a model's amplitudes: density, sigma_A, and what it does to the merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import robust_spread
from scipy import stats
from simulated_priors import crystal, observe, own_rows

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.sigma_a import (
    SigmaA2,
    choose_sigma_a,
    estimate_sigma_a2,
    set_sigma_a,
    smooth,
)
from braggflux.merge.fit.training import fit, start
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.amplitudes import merged_rows, scaled_observations
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.reference import Reference
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.problem import build_problem
from braggflux.merge.rows import UniqueRows

FAST = MergeConfig(network_width=0, epochs=40, batch_size=None, likelihood="normal")


def small_prior(sigma_a2: float, n_shells: int = 1) -> tuple[Reference, torch.Tensor]:
    """Prior over some 60 reflections, and its rows with a model."""
    c = crystal(d_min=12.0, sigma_a=0.5)
    wilson = Wilson.of_rows(UniqueRows([c.asu]), 2)
    with torch.no_grad():
        wilson.log_sigma.copy_(torch.tensor([0.3, -0.2]))
    model = torch.as_tensor(c.model.copy())
    model[::5] = torch.nan
    prior = Reference(wilson, model, n_shells)
    prior.sigma_a2.fill_(sigma_a2)
    return prior, prior.rows


@pytest.mark.parametrize(
    ("k", "bias"),
    [(300.0, 0.003), (20.0, 0.003), (4.0, 0.01), (1.0, 0.05)],
)
@pytest.mark.parametrize("sigma_a2", [0.5, 0.9])
def test_divergence_against_samples(k, bias, sigma_a2):
    """Densities by SciPy, expectations by sampling."""
    prior, rows = small_prior(sigma_a2)
    n = len(prior.shell)
    q = Nakagami(torch.full((n,), k).double(), torch.linspace(0.3, 3.0, n).double())
    got = prior.kl(q).detach()
    torch.manual_seed(0)
    f = q.rsample((6_000,))[:, rows].numpy()
    spread = prior.spread().detach()
    e_calc = prior.e_calc[rows].numpy()
    centre = np.sqrt(sigma_a2 * spread[rows].numpy()) * e_calc
    s = (1 - sigma_a2) * spread[rows].numpy()
    rice = stats.rice.logpdf(f, centre / np.sqrt(s / 2), scale=np.sqrt(s / 2))
    folded = stats.foldnorm.logpdf(f, centre / np.sqrt(s), scale=np.sqrt(s))
    centric = prior.is_centric[rows].numpy()
    assert 0 < centric.sum() < len(centric)
    log_q = Nakagami(q.concentration[rows], q.spread[rows]).log_prob(torch.as_tensor(f)).numpy()
    terms = log_q - np.where(centric, folded, rice)
    error = terms.std(0) / np.sqrt(len(terms))
    assert np.all(np.abs(got[rows].numpy() - terms.mean(0)) < bias + 5 * error)


def test_without_correlation_it_is_wilson():
    prior, rows = small_prior(1e-20)
    n = len(prior.shell)
    q = Nakagami(torch.rand(n).double() * 9 + 0.5, torch.rand(n).double() * 3 + 0.1)
    assert prior.is_believed
    torch.testing.assert_close(prior.kl(q), prior.below.kl(q), rtol=1e-9, atol=1e-9)
    prior.sigma_a2.zero_()
    assert torch.equal(prior.kl(q), prior.below.kl(q))
    assert torch.equal(prior.precision(), prior.below.precision())
    assert len(rows) < n


def test_rows_without_f_calc_keep_wilson():
    prior, rows = small_prior(0.8)
    n = len(prior.shell)
    q = Nakagami(torch.full((n,), 5.0).double(), torch.full((n,), 0.7).double())
    with_model = prior.kl(q)
    others = torch.ones(n, dtype=torch.bool)
    others[rows] = False
    assert others.sum() > 5
    torch.testing.assert_close(with_model[others], prior.below.kl(q)[others])
    assert (with_model[rows] - prior.below.kl(q)[rows]).abs().min() > 1e-4


def test_root_takes_the_model_and_the_child_its_parent():
    c = crystal(d_min=10.0, sigma_a=0.5)
    unique = UniqueRows([c.asu, c.asu], (None, 0))
    model = Reference(Wilson.of_rows(unique, 2), torch.as_tensor(np.tile(c.model, 2)), 1)
    prior = DoubleWilson(model, unique, 2)
    n = len(c.asu)
    q = Nakagami(torch.full((2 * n,), 50.0).double(), torch.full((2 * n,), 0.7).double())
    prior.couple()
    before = prior.kl(q)
    model.sigma_a2.fill_(0.8)
    after = prior.kl(q)
    torch.testing.assert_close(after[n:], before[n:], rtol=0, atol=0)
    assert (after[:n] - before[:n]).abs().min() > 1e-4
    stiff = prior.stiffness(q.spread)
    torch.testing.assert_close(stiff[n:], 0.5 * q.spread[n:] / prior.conditional()[1])
    assert (stiff[:n] > 0).all()


def test_gradient_of_sigma_is_finite_where_the_model_is_not_believed():
    prior, _ = small_prior(0.5, n_shells=2)
    prior.sigma_a2[0] = 0.0
    n = len(prior.shell)
    q = Nakagami(torch.full((n,), 5.0).double(), torch.full((n,), 0.7).double())
    prior.kl(q).sum().backward()
    assert torch.isfinite(prior.below.log_sigma.grad).all()


def test_gradient_of_the_divergence():
    prior, rows = small_prior(0.8)
    chosen = rows[:6]

    def divergence(k, omega):
        q = Nakagami(k, omega, validate_args=False)
        return prior.kl(q)[chosen]

    n = len(prior.shell)
    k = (torch.rand(n).double() * 9 + 0.6).requires_grad_()
    omega = (torch.rand(n).double() + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(divergence, (k, omega))


def normalised(c):
    """True intensity and model's over their means, (R,)."""
    z = c.amplitude**2 / (c.asu.epsilon * c.sigma)
    return z, c.model**2 / (c.asu.epsilon * 3.0 * np.exp(-20.0 / (2 * c.asu.d**2)))


@pytest.mark.parametrize("sigma_a", [0.0, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_sigma_a_whatever_noise_scale_and_claimed_sigmas(sigma_a, noise):
    z_scores = []
    for seed in range(6):
        c = crystal(d_min=4.0, sigma_a=sigma_a, seed=seed)
        z, z_calc = normalised(c)
        rng = np.random.default_rng(seed)
        measured = 1.7 * (z + noise * rng.standard_normal(len(z)))
        claimed = np.full(len(z), 1.7 * noise * (2.0 if seed % 2 else 0.7))
        found = estimate_sigma_a2(
            *(torch.as_tensor(x) for x in (measured, claimed, z_calc, c.asu.is_centric))
        )
        assert found.error < (0.12 if noise > 0.5 else 0.06)
        z_scores.append((found.value - sigma_a**2) / found.error)
    assert abs(np.mean(z_scores)) < 4 / np.sqrt(6)
    assert np.abs(z_scores).max() < 4.5


def test_noise_claimed_from_few_counts_does_not_pull_sigma_a_up():
    """Weighted by what each mean claims, these would give 0.99 and more for 0.9."""
    values = []
    for seed in range(4):
        c = crystal(d_min=3.5, sigma_a=0.9, seed=seed)
        z, z_calc = normalised(c)
        rng = np.random.default_rng(seed)
        n_obs = rng.integers(1, 9, len(z))
        counts = rng.poisson(3.0 * n_obs * (z + 0.1))
        measured = counts / (3.0 * n_obs) - 0.1
        claimed = np.sqrt(counts + 0.5) / (3.0 * n_obs)
        columns = (measured, claimed, z_calc, c.asu.is_centric, n_obs)
        values.append(estimate_sigma_a2(*(torch.as_tensor(x) for x in columns)))
    error = np.mean([v.error for v in values]) / len(values) ** 0.5
    assert error < 0.02
    assert abs(np.mean([v.value for v in values]) - 0.81) < 3 * error


def test_model_scale_falloff_and_missing_reflections_do_not_matter():
    c = crystal(d_min=3.5, sigma_a=0.8)
    model = torch.as_tensor(c.model.copy())
    model[::3] = torch.nan
    prior = Reference(Wilson.of_rows(UniqueRows([c.asu]), 8), model, 1)
    known = prior.rows
    assert len(known) == int((~model.isnan()).sum())
    e2 = prior.e_calc[known].numpy() ** 2
    # knots at the ends, where reflections are few, are known to 20 %
    ratio = np.log(e2 / normalised(c)[1][known.numpy()])
    assert ratio.std() < 0.1
    assert np.abs(ratio).max() < 0.6
    assert e2.mean() == pytest.approx(1.0, abs=0.02)


def test_shells_follow_the_resolution_and_empty_ones_take_their_neighbours():
    c = crystal(d_min=3.0, sigma_a=0.9)
    rng = np.random.default_rng(1)
    z, z_calc = normalised(c)
    # beyond 4 A the model is random
    shuffled = np.where(c.asu.d < 4.0, rng.permutation(z_calc), z_calc)
    reference = Reference(Wilson.of_rows(UniqueRows([c.asu]), 8), torch.as_tensor(c.model), 8)
    reference.e_calc.copy_(torch.as_tensor(np.sqrt(shuffled)))
    z, one = torch.as_tensor(z), torch.ones(len(z), dtype=torch.float64)
    rows = choose_sigma_a(reference, z, 0.1 * one, one)
    assert rows[0]["sigma_a"] == pytest.approx(0.9, abs=0.04)
    assert rows[-1]["sigma_a"] < 0.25
    assert [r["n_reflections"] for r in rows] == torch.bincount(reference.shell).tolist()
    few = z.clone()
    few[reference.shell == 0] = torch.nan
    rows = choose_sigma_a(reference, few, 0.1 * one, one)
    assert rows[0]["n_reflections"] == 0
    assert rows[0]["sigma_a"] == pytest.approx(0.9, abs=0.08)
    none = choose_sigma_a(reference, torch.full_like(z, torch.nan), one, one)
    assert {r["sigma_a"] for r in none} == {0.0}


def merged_with(c, model, noise, sigma_a2=None):
    """Amplitudes and sigmas of the crystal's rows, on the true scale, and sigma_A by shell."""
    problem = build_problem([observe(c, noise, n_obs=3, flicker=0.1)], FAST)
    torch.manual_seed(0)
    own, shells, f_calc = own_rows(problem, c), None, None
    if model is not None:
        f_calc = torch.full((len(problem.unique),), torch.nan, dtype=torch.float64)
        f_calc[own] = torch.as_tensor(model)
    merger = Merger(problem.unique, problem.table, FAST, f_calc)
    start(merger, problem.table)
    fit(merger, problem.table, FAST)
    if model is not None:
        shells = set_sigma_a(merger, problem.table)
    fit(merger, problem.table, FAST, epochs=20)
    rows = merged_rows(merger, problem.table, scaled_observations(merger, problem.table))
    seen = rows.n_obs.numpy()[own] > 0
    f, sigma = rows.amplitude.numpy()[own], rows.sigma_amplitude.numpy()[own]
    return f, sigma, seen, shells


def scores(c, f, sigma, weak):
    """Error of weak amplitudes, correlation of all, spread of z by thirds of the intensity."""
    strong = c.amplitude > np.quantile(c.amplitude, 0.8)
    ratio = np.median(f[strong] / c.amplitude[strong])
    f, sigma = f / ratio, sigma / ratio
    error = np.sqrt(np.mean((f - c.amplitude)[weak] ** 2))
    z = (f - c.amplitude) / sigma
    return error, np.corrcoef(f, c.amplitude)[0, 1], robust_spread(z), robust_spread(z[weak])


def test_a_good_model_brings_weak_amplitudes_to_the_truth():
    c = crystal(d_min=3.0, sigma_a=0.9)
    noise = 300.0  # sigma of a mean is about the mean intensity at 4 A
    weak = c.sigma < 320.0
    assert 0.3 < weak.mean() < 0.9
    plain = scores(c, *merged_with(c, None, noise)[:2], weak)
    *with_model, _, shells = merged_with(c, c.model, noise)
    helped = scores(c, *with_model, weak)
    assert helped[0] < 0.88 * plain[0]
    assert helped[1] > plain[1] + 0.02
    assert 0.9 < helped[2] < 1.15
    assert 0.9 < helped[3] < 1.15
    found = [s["sigma_a"] for s in shells]
    assert np.mean(found) == pytest.approx(0.9, abs=0.05)


def test_what_is_believed_of_an_estimate():
    assert SigmaA2(0.1, 0.06, 500).believed == 0.0
    assert SigmaA2(0.8, 0.02, 500).believed == pytest.approx(0.8, abs=0.002)
    assert SigmaA2(1.1, 0.2, 500).believed == pytest.approx(0.8, abs=0.001)
    assert SigmaA2(1.001, 0.0, 500).believed == pytest.approx(0.998)
    assert SigmaA2(0.9, np.inf, 2).believed == 0.0


def test_mates_do_not_count_twice():
    c = crystal(d_min=4.0, sigma_a=0.7)
    z, z_calc = normalised(c)
    columns = [torch.as_tensor(x) for x in (z, np.full(len(z), 0.1), z_calc, c.asu.is_centric)]
    once = estimate_sigma_a2(*columns)
    twice = estimate_sigma_a2(*(torch.cat([x, x]) for x in columns))
    assert twice.value == pytest.approx(once.value, rel=1e-6)
    assert twice.error == pytest.approx(once.error, rel=0.01)


def test_smoothing_is_least_squares_of_a_random_walk():
    values, errors = [0.9, 0.2, 0.7, 0.0], [0.01, 0.2, 0.05, np.inf]
    got = smooth([SigmaA2(v, e, 99) for v, e in zip(values, errors, strict=True)])
    a = np.zeros((6, 4))
    for k in range(3):
        a[k, k] = 1 / errors[k]
        a[3 + k, k : k + 2] = -10.0, 10.0
    wanted = np.linalg.lstsq(
        a, np.append(np.array(values[:3]) / errors[:3], np.zeros(3)), rcond=None
    )[0]
    np.testing.assert_allclose([s.value for s in got], wanted, rtol=1e-6)
    error = np.sqrt(np.diag(np.linalg.inv(a.T @ a)))
    np.testing.assert_allclose([s.error for s in got], error, rtol=1e-6)
    nothing = smooth([SigmaA2(0.0, np.inf, 0)] * 3)
    assert [s.believed for s in nothing] == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_a_random_model_does_no_harm():
    c = crystal(d_min=3.0, sigma_a=0.0)
    noise = 100.0
    weak = c.sigma < 320.0
    plain = scores(c, *merged_with(c, None, noise)[:2], weak)
    *with_model, _, shells = merged_with(c, c.model, noise)
    harmed = scores(c, *with_model, weak)
    assert np.mean([s["sigma_a"] for s in shells]) < 0.15
    assert harmed[1] > plain[1] - 0.005
    assert harmed[0] < 1.02 * plain[0]
