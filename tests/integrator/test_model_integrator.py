"""The integrator on simulated boxes: bias, calibration, masks, extremes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    Spot,
    assert_within_se,
    gaussian_voxels,
    make_integrator,
    poisson_boxes,
    robust_spread,
    spot_metadata,
    tilted_background,
)

from braggflux.integrator.distributions.shifted_poisson import shifted_poisson_from_pixels
from braggflux.integrator.model.background import BackgroundFit
from braggflux.integrator.model.integrator import choose_reference
from braggflux.integrator.model.start import start_profile
from braggflux.integrator.types import Flag

SPOT = Spot(sigma_x_px=0.8, sigma_y_px=0.75, sigma_m_deg=0.08, box=(9, 9, 9))
LEVEL = 0.8


def simulate(true, n: int, seed: int = 0, is_valid=None, tilt: float = 0.05):
    """Boxes of ``true`` photons, (batch, true profile, true background)."""
    rng = np.random.default_rng(seed)
    data = spot_metadata(n, rng, SPOT)
    profile = gaussian_voxels(data, SPOT)
    background = tilted_background(LEVEL, tilt * rng.normal(size=(n, 3)), SPOT.box)
    j = np.broadcast_to(np.asarray(true, float), (n,))[:, None, None, None]
    return poisson_boxes(j * profile + background, data, rng, is_valid), profile, background


@pytest.fixture(scope="module")
def integrator():
    """Profile learned by EM from other boxes of the same simulation; networks untrained."""
    torch.manual_seed(0)
    rng = np.random.default_rng(99)
    strong, _, _ = simulate(rng.uniform(500, 20000, 300), 300, seed=99)
    model = make_integrator(strong.metadata, SPOT, LEVEL)
    start_profile(model, strong)
    return model


def oracle(batch, profile, background, true: float) -> np.ndarray:
    """Efficient and exactly unbiased: everything but J known."""
    flat = lambda a: torch.as_tensor(a).flatten(1).double()  # noqa: E731
    reference = torch.full((len(batch),), float(true)).double()
    return shifted_poisson_from_pixels(
        flat(batch.counts), flat(profile), flat(background), batch.is_valid.flatten(1), reference
    ).mode.numpy()


@pytest.mark.parametrize("true", [0.0, 5.0, 20.0, 100.0, 2000.0, 20000.0])
@pytest.mark.parametrize("knows", [False, True], ids=["alone", "expected"])
def test_bias_and_calibration(integrator, true, knows):
    """Bias below 1 % from 20 photons on and 0.2 photon below; z spread of 0.9 to 1.15.

    The bias is that of the difference to an estimate with everything else known, which is
    unbiased itself: the shot noise, common to both, drops out.
    """
    batch, profile, background = simulate(true, 500, seed=int(true))
    expected = torch.full((500,), float(true)) if knows else None
    with torch.no_grad():
        posterior = integrator.inference(batch, expected)
    likelihood = posterior.marginal_likelihood
    estimate = likelihood.mode.double().numpy()
    difference = estimate - oracle(batch, profile, background, true)
    error = difference.std() / math.sqrt(len(difference))
    assert abs(difference.mean()) < max(0.2, 0.01 * true) + 2 * error
    assert error < max(0.1, 0.005 * true)
    sigma = likelihood.variance(torch.full((500,), float(true))).sqrt().double().numpy()
    if true <= 2000:
        assert 0.9 < robust_spread((estimate - true) / sigma) < 1.15


def test_posterior_of_the_intensity_covers_the_truth(integrator):
    """Flat-prior 68 % intervals hold the truth as often as they say, far from 0."""
    batch, _, _ = simulate(300.0, 600, seed=3)
    with torch.no_grad():
        q = integrator.inference(batch).q_intensity
    draws = q.sample((400,))
    below = (draws < 300.0).float().mean(0)
    inside = ((below > 0.1587) & (below < 0.8413)).float().mean().item()
    # 400 draws blur each quantile by 0.02, which leaves the share unchanged to first order
    assert inside == pytest.approx(0.683, abs=5 * math.sqrt(0.683 * 0.317 / 600))


def test_unsure_profiles_cost_information_where_voxels_are_missing(integrator):
    """Delta method: half a spot scales with the share seen; a whole one hardly moves."""
    whole, _, _ = simulate(5000.0, 200, seed=4)
    is_valid = torch.ones_like(whole.is_valid)
    is_valid[..., 4:] = False
    half = replace(whole, counts=whole.counts * is_valid, is_valid=is_valid)
    with torch.no_grad():
        full, cut = integrator.inference(whole), integrator.inference(half)
    assert (full.information_fraction <= full.background_fit.information_fraction).all()
    lost = [
        1 - (p.information_fraction / p.background_fit.information_fraction).mean().item()
        for p in (full, cut)
    ]
    assert lost[0] < 0.05
    assert lost[1] > 2 * lost[0]


def test_masked_voxels_cost_precision_not_accuracy(integrator):
    rng = np.random.default_rng(8)
    is_valid = rng.random((500, *SPOT.box)) > 0.35
    batch, profile, background = simulate(200.0, 500, seed=5, is_valid=is_valid)
    whole, _, _ = simulate(200.0, 500, seed=5)
    with torch.no_grad():
        masked = integrator.inference(batch).marginal_likelihood
        full = integrator.inference(whole).marginal_likelihood
    difference = masked.mode.double().numpy() - oracle(batch, profile, background, 200.0)
    assert abs(difference.mean()) < 2.0
    j = torch.full((500,), 200.0)
    assert masked.variance(j).mean() > 1.3 * full.variance(j).mean()
    z = (masked.mode - j) / masked.variance(j).sqrt()
    assert 0.9 < robust_spread(z) < 1.15


def test_half_a_spot_is_no_half_intensity(integrator):
    """A detector gap over half of the spot: the profile says what is missing."""
    is_valid = np.ones((500, *SPOT.box), dtype=bool)
    is_valid[:, :, :, 5:] = False
    batch, profile, background = simulate(1000.0, 500, seed=6, is_valid=is_valid)
    with torch.no_grad():
        posterior = integrator.inference(batch)
    seen = posterior.likelihood.exposure
    assert 0.2 < seen.mean() < 0.8
    difference = posterior.likelihood.mode.double().numpy() - oracle(
        batch, profile, background, 1000.0
    )
    assert abs(difference.mean()) < 15.0
    table = integrator.intensity_table(batch.metadata, posterior, torch.zeros(500).long())
    rejected = (table.flags & Flag.REJECTED) > 0
    torch.testing.assert_close(rejected, seen < integrator.config.min_exposure)


def test_expectation_does_not_pull_the_estimate(integrator):
    """Expected 30 % too high or too low, inside what noise can explain: the mean stays."""
    batch, profile, background = simulate(100.0, 500, seed=9)
    reference = oracle(batch, profile, background, 100.0)
    means = []
    for factor in (0.7, 1.3):
        with torch.no_grad():
            mode = integrator.inference(batch, torch.full((500,), 100.0 * factor)).likelihood.mode
        means.append((mode.double().numpy() - reference).mean())
    assert np.abs(means).max() < 1.0
    assert abs(means[1] - means[0]) < 0.4


def test_choose_reference():
    own = torch.tensor([100.0, 100.0, 100.0, -5.0, 20.0])
    fit = BackgroundFit(None, None, None, own, None, None, None)
    expected = torch.tensor([110.0, 5000.0, torch.nan, 0.0, -1.0])
    found = choose_reference(fit, expected)
    # near: the expectation; impossible: the own one; unknown: the own one; never negative
    torch.testing.assert_close(found, torch.tensor([110.0, 100.0, 100.0, 0.0, 0.0]))
    torch.testing.assert_close(choose_reference(fit, None), own.clamp_min(0))


def test_loss_is_the_evidence_of_the_pixels(integrator):
    """Laplace over J, background known and given, against direct quadrature over J."""
    batch, _, _ = simulate(60.0, 8, seed=2)
    posterior = integrator.inference(batch)
    plain = replace(posterior, information_fraction=torch.ones_like(posterior.reference))
    evidence = integrator.loss(batch, plain).log_evidence.double()
    j = torch.linspace(0.0, 250.0, 2501, dtype=torch.float64)
    rate = j[:, None, None] * posterior.profile.double() + posterior.background_fit.background
    n = batch.counts.flatten(1).double()
    log_l = (n * rate.log() - rate).sum(-1)
    exact = torch.logsumexp(log_l, 0) + math.log(0.1)
    # second order of Laplace: about 1 / (12 a) and the error of the shifted Poisson two sigma off
    torch.testing.assert_close(evidence, exact, rtol=0, atol=0.1)


def test_generative_explains_the_counts(integrator):
    batch, _, _ = simulate(500.0, 200, seed=12)
    with torch.no_grad():
        posterior = integrator.inference(batch)
        rate = integrator.generative(posterior)
    n = batch.counts.flatten(1)
    assert_within_se((n - rate).sum(1).numpy(), 0.0)
    chi2 = ((n - rate) ** 2 / rate).mean(1).double().numpy()
    assert chi2.mean() == pytest.approx(1.0, abs=0.02)


EXTREMES = [
    "zero counts",
    "a million a pixel",
    "a million at the peak",
    "all masked",
    "one voxel",
    "hot corner",
]


def extreme(case: str):
    batch, _, _ = simulate(30.0, 6, seed=1)
    if case == "zero counts":
        return replace(batch, counts=torch.zeros_like(batch.counts))
    if case == "a million a pixel":
        return replace(batch, counts=torch.full_like(batch.counts, 1e6))
    if case == "a million at the peak":
        return simulate(1e7, 6, seed=1)[0]
    if case == "all masked":
        empty = torch.zeros_like(batch.counts)
        return replace(batch, counts=empty, is_valid=empty.bool())
    if case == "one voxel":
        is_valid = torch.zeros_like(batch.is_valid)
        is_valid[:, 4, 4, 4] = True
        return replace(batch, counts=batch.counts * is_valid, is_valid=is_valid)
    counts = torch.zeros_like(batch.counts)
    counts[:, 0, 0, 0] = 60000.0  # a zinger in the corner
    return replace(batch, counts=counts)


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("sample", [False, True])
def test_extremes_are_finite_with_their_gradients(case, sample):
    batch = extreme(case)
    model = make_integrator(batch.metadata, SPOT, LEVEL)
    posterior = model.inference(batch, torch.full((6,), 30.0), sample=sample)
    loss = model.loss(batch, posterior)
    table = model.intensity_table(batch.metadata, posterior, torch.zeros(6).long())
    for column in ("effective_counts", "effective_background", "exposure", "background"):
        values = table.columns()[column]
        assert torch.isfinite(values).all(), column
        assert (values >= 0).all(), column
    # what the merge does with the table
    merged = posterior.marginal_likelihood.log_prob(torch.full((6,), 25.0))
    total = loss.log_evidence - loss.kl_profile - loss.kl_background + merged
    assert torch.isfinite(total).all()
    total.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    if case == "all masked":
        assert ((table.flags & Flag.REJECTED) > 0).all()


def test_same_seed_same_sample(integrator):
    batch, _, _ = simulate(100.0, 4)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(integrator.inference(batch, sample=True).likelihood.mode)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
