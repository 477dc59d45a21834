"""Ablations of the merge do what they say: Gaussian hand-over, no double-Wilson, no physics."""

import math

import numpy as np
import pytest
import torch
from simulated_merge import fit, simulate

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.errors import UserError
from braggflux.merge.engine.amplitudes import merged_amplitudes
from braggflux.merge.engine.config import MergeConfig
from braggflux.merge.engine.likelihood import (
    GaussianLikelihood,
    PhotonCountLikelihood,
    observation_likelihood,
)
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.config.schema import updated

PLAIN = {"flicker": 0.0, "damage": 0.0, "absorption": 0.0}
KINDS = ("photon-counts", "gaussian")
LEAST_ERROR = math.exp(-7.0)


def observed(a, beta: float, t: float = 1.0) -> ShiftedPoisson:
    a = torch.as_tensor(a, dtype=torch.float64).reshape(-1)
    return ShiftedPoisson(a, torch.full_like(a, beta), torch.full_like(a, t))


def best_mean(kind: str, counts: np.ndarray, beta: float, grid: np.ndarray) -> float:
    """Intensity of the highest total log-density of many observations of one intensity."""
    model = observation_likelihood(kind, LEAST_ERROR, 1e-5)
    obs = observed(counts, beta)
    with torch.no_grad():
        total = [model(obs, torch.tensor(mu).double()).sum().item() for mu in grid]
    return float(grid[np.argmax(total)])


def test_options():
    assert MergeConfig().handover == "photon-counts"
    changed = updated(RunConfig(), {"merge.handover": "gaussian"})
    assert changed.merge.handover == "gaussian"
    with pytest.raises(UserError, match="photon-counts, gaussian"):
        updated(RunConfig(), {"merge.handover": "poisson"})
    assert isinstance(observation_likelihood("gaussian", 0.02, 0.01), GaussianLikelihood)
    assert isinstance(observation_likelihood("photon-counts", 0.02, 0.01), PhotonCountLikelihood)


def test_gaussian_sees_nothing_but_intensity_and_sigma():
    """Two likelihoods of one maximum and one curvature: alike to the Gaussian alone."""
    one = observed([12.0, 40.0], 8.0)
    # a -> c a, t -> sqrt(c) t keeps a / t^2; beta follows to keep the maximum
    c = 4.0
    a, t = c * one.effective_counts, math.sqrt(c) * one.exposure
    two = ShiftedPoisson(a, a / t - one.mode, t)
    torch.testing.assert_close(two.mode, one.mode)
    torch.testing.assert_close(two.observed_variance, one.observed_variance)
    mu = torch.tensor([[1.0, 60.0], [9.0, 20.0]]).double()
    for kind, is_alike in (("gaussian", True), ("photon-counts", False)):
        model = observation_likelihood(kind, 0.02, 0.01)
        for function in (model, model.variance, model.responsibility):
            found = torch.allclose(function(one, mu), function(two, mu), rtol=1e-9)
            assert found == is_alike, kind


def test_gaussian_is_the_normal_law_and_integrates_to_one():
    model = observation_likelihood("gaussian", 0.03, 0.01)
    obs, mu = observed([900.0], 100.0), torch.tensor([850.0]).double()
    sd = math.sqrt(900.0 + (0.03 * 850.0) ** 2)
    exact = torch.distributions.Normal(850.0, sd).log_prob(torch.tensor(800.0).double())
    torch.testing.assert_close(model.good(obs, mu)[0].detach(), exact)


@pytest.mark.parametrize("off", [-3.0, -1.0, 0.0, 2.0, 3.0])
def test_agree_at_high_counts(off):
    mu = 1e6
    sd = math.sqrt(mu + (1e-3 * mu) ** 2)
    obs, expected = observed([mu + 20.0 + off * sd], 20.0), torch.tensor([mu]).double()
    values, slopes = [], []
    for kind in KINDS:
        model = observation_likelihood(kind, 1e-3, 0.01)
        point = expected.clone().requires_grad_()
        value = model(obs, point).sum()
        values.append(value.item())
        slopes.append(torch.autograd.grad(value, point)[0].item() * sd)
    # third order in z / sqrt(counts) and in s
    assert values[0] == pytest.approx(values[1], abs=0.03)
    assert slopes[0] == pytest.approx(slopes[1], abs=0.03)


@pytest.mark.parametrize(("mu", "beta"), [(0.0, 10.0), (10.0, 10.0), (40.0, 10.0)])
def test_naive_weights_bias_low_counts_low(mu, beta):
    """Weights 1 / n pull the mean of Poisson counts down by one photon, wherever it lies.

    The harmonic mean of a Poisson law of mean m is m - 1 - 1 / m - ... The width of the outlier
    part does not matter: hardly any count is one.
    """
    rng = np.random.default_rng(0)
    counts = rng.poisson(mu + beta, 40_000).astype(float)
    error = math.sqrt((mu + beta) / len(counts))
    grid = np.linspace(max(mu - 3.0, 0.0), mu + 3.0, 301)
    photons = best_mean("photon-counts", counts, beta, grid)
    assert photons == pytest.approx(mu, abs=4 * error + 0.02)
    gaussian = best_mean("gaussian", counts, beta, grid)
    if mu == 0.0:  # no intensity below zero
        assert gaussian == 0.0
        return
    harmonic = 1 / np.mean(1 / np.maximum(counts, 1.0)) - beta
    assert -1.3 < harmonic - mu < -0.9
    # Normal(I; mu, n) has no term that depends on mu in its norm: the weighted mean exactly
    assert gaussian == pytest.approx(harmonic, abs=0.05)


@pytest.fixture(scope="module")
def weak():
    """Some photons on twenty of background, known scales."""
    return simulate(d_min=5.0, photons=20.0, background=20.0, **PLAIN)


def merged_intensities(weak, handover: str) -> tuple[np.ndarray, np.ndarray]:
    """Merged intensities (R,) [photons], and which have more than three observations."""
    merger = weak.merger(handover=handover, scale_network_width=0, absorption_order=0)
    for p in (*merger.scale.parameters(), *merger.likelihood.parameters()):
        p.requires_grad_(False)
    fit(merger, weak.batch, n_steps=100, rate=0.05)
    merged = merged_amplitudes(merger, weak.batch)
    return merged.intensity.numpy(), (merged.n_obs > 3).numpy()


def test_merged_weak_intensities_lie_low_after_a_gaussian_hand_over(weak):
    counted, seen = merged_intensities(weak, "photon-counts")
    gaussian, _ = merged_intensities(weak, "gaussian")
    true = weak.truth.amplitude**2
    standard_error = (counted - true)[seen].std() / math.sqrt(seen.sum())
    assert abs((counted - true)[seen].mean()) < 4 * standard_error
    assert (gaussian - true)[seen].mean() < -3 * standard_error
    assert (gaussian - counted)[seen].mean() < -0.3
    # and they are the means that weights from the observed counts give, computed by hand
    row, scale = weak.refl_id.numpy(), 1 / weak.table.metadata.lp.numpy()
    likelihood = weak.table.likelihood
    counts = likelihood.effective_counts.numpy()
    beta = likelihood.effective_background.numpy()
    weight = scale**2 / np.maximum(counts, 1.0)
    total = np.bincount(row, weight * (counts - beta) / scale, len(true))
    by_hand = total[seen] / np.bincount(row, weight, len(true))[seen]
    assert np.abs(gaussian[seen] - by_hand).mean() < 0.1
    assert (gaussian - counted)[seen].mean() == pytest.approx(
        (by_hand - counted[seen]).mean(), abs=0.1
    )


def test_uncoupled_mates_have_a_wilson_prior_each(weak):
    merger = weak.merger(double_wilson=False)
    merger.start(weak.batch)
    before = merger.prior.one_minus_r2.clone()
    merger.update_friedel_correlation(weak.batch, seed=0)
    assert torch.equal(merger.prior.one_minus_r2, before)
    q = merger.inference()
    alone = torch.distributions.kl_divergence(q, merger.prior.wilson.p_structure_factor())
    pair = alone[merger.prior.plus_row] + torch.where(
        merger.prior.has_mate, alone[merger.prior.minus_row], 0.0
    )
    torch.testing.assert_close(merger.prior.kl(q), pair)
    coupled = weak.merger()
    coupled.start(weak.batch)
    assert not torch.allclose(coupled.prior.kl(coupled.inference()), pair)


def test_without_physics_the_network_is_all_that_scales(weak):
    """No frame scale, B or absorption: neither in K nor in the penalty; L/P stays."""
    merger = weak.merger(physical_scale=False)
    rows = weak.table.metadata.refl_row
    physical = [merger.scale.log_frame_scale, merger.scale.b_factor, merger.scale.absorption]
    before, penalty = merger.scale(rows), merger.scale.penalty()
    torch.testing.assert_close(before, -weak.table.metadata.lp.double().log())
    with torch.no_grad():
        for parameter in (*physical, merger.scale.log_flicker, merger.scale.log_b_bend):
            parameter.add_(0.5)
    torch.testing.assert_close(merger.scale(rows), before)
    assert merger.scale.penalty() == penalty
    with torch.no_grad():
        merger.scale.network[-1].bias.add_(0.5)
    torch.testing.assert_close(merger.scale(rows), before + 0.5)
    assert merger.scale.penalty() > penalty
    assert merger.scale.n_inputs == 5
