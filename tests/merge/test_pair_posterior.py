"""Posterior of a Bijvoet difference: against a dense sum, and against drawn truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from braggflux.merge.output.pair_posterior import Pairs, posterior_difference


def pairs_of(intensity, sigma, expected, one_minus_r2, model=None):
    """Pairs of intensities (2, P)."""
    expected = np.asarray(expected, float)
    model = model or (np.full(len(expected), np.nan),) * 2
    values = (intensity, sigma, expected, expected * one_minus_r2, *model)
    return Pairs(*(torch.as_tensor(np.asarray(x)) for x in values))


def by_dense_sum(intensity, sigma, expected, one_minus_r2, prior_of_plus=None):
    """Mean and spread of the difference of one pair, by a sum over F+ and the difference."""
    spread, r = expected * one_minus_r2, np.sqrt(1 - one_minus_r2)
    top = np.sqrt(max(intensity[0], 0) + 8 * sigma[0])
    plus = np.linspace(0, top, 800)[1:, None]
    reach = min(8 * np.sqrt(spread / 2), 2 * top)
    minus = plus - np.linspace(-reach, reach, 401)
    sd = np.sqrt(spread / 2)
    prior = prior_of_plus or stats.rayleigh(scale=np.sqrt(expected / 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        rice = stats.rice.logpdf(minus, r * plus / sd, scale=sd)
    log_p = prior.logpdf(plus) + np.where(minus > 0, rice, -np.inf)
    log_p = log_p + stats.norm.logpdf(plus**2, intensity[0], sigma[0])
    log_p = log_p + stats.norm.logpdf(minus**2, intensity[1], sigma[1])
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * (plus - minus)).sum()
    return mean, np.sqrt((p * (plus - minus - mean) ** 2).sum())


@pytest.mark.parametrize("one_minus_r2", [4e-4, 0.02, 0.3])
@pytest.mark.parametrize("noise", [0.02, 0.5])
@pytest.mark.parametrize("level", [-1.0, 0.05, 2.0])
def test_quadrature_is_the_dense_sum(level, noise, one_minus_r2):
    """Strong to absent, mates known alike or one eight times better, alike to hardly so."""
    for sigma in ((noise, noise), (noise / 4, 2 * noise)):
        seen = max(level, -3 * noise)
        intensity = (seen + 0.3 * noise, seen - 0.5 * noise)
        pairs = pairs_of(*(np.array(x)[:, None] for x in (intensity, sigma)), [1.0], one_minus_r2)
        mean, spread = (float(x) for x in posterior_difference(pairs))
        true_mean, true_spread = by_dense_sum(intensity, sigma, 1.0, one_minus_r2)
        assert spread == pytest.approx(true_spread, rel=0.01)
        assert abs(mean - true_mean) < 0.01 * true_spread


def test_a_model_takes_the_place_of_wilsons_prior():
    intensity, sigma, centre, variance = (0.8, 0.5), (0.3, 0.3), 0.6, 0.1
    model = np.array([centre]), np.array([variance])
    columns = (np.array(x)[:, None] for x in (intensity, sigma))
    mean, spread = posterior_difference(pairs_of(*columns, [1.0], 0.1, model))
    sd = np.sqrt(variance / 2)
    true = by_dense_sum(intensity, sigma, 1.0, 0.1, stats.rice(centre / sd, scale=sd))
    assert (float(mean), float(spread)) == pytest.approx(true, rel=0.01)


@pytest.mark.parametrize("noise", [0.003, 0.03, 0.3])
def test_drawn_differences_are_found_without_bias_and_with_their_errors(noise):
    rng, n, one_minus_r2 = np.random.default_rng(1), 4000, 0.004
    normal = lambda: (rng.normal(size=n) + 1j * rng.normal(size=n)) / 2**0.5  # noqa: E731
    expected = np.exp(rng.normal(size=n))
    plus = normal()
    minus = np.sqrt(1 - one_minus_r2) * plus + np.sqrt(one_minus_r2) * normal()
    f = np.abs([plus, minus]) * np.sqrt(expected)
    sigma = noise * np.exp(0.5 * rng.normal(size=(2, n))) * np.sqrt(expected)
    intensity = f**2 + sigma * rng.normal(size=(2, n))
    mean, spread = (
        x.numpy() for x in posterior_difference(pairs_of(intensity, sigma, expected, one_minus_r2))
    )
    true = f[0] - f[1]
    z = (mean - true) / spread
    assert z.std() == pytest.approx(1.0, abs=0.04)  # 1.1 % is its standard error
    weight = spread**-2
    slope = (weight * mean * true).sum() / (weight * mean**2).sum()
    assert slope == pytest.approx(1.0, abs=4 * (weight @ mean**2) ** -0.5)
    # the mean figure of merit is the square of the correlation with the truth, to some per cent
    unit = np.sqrt(0.5 * expected * one_minus_r2)
    merit = np.mean(1 - (spread / unit) ** 2)
    assert np.corrcoef(mean / unit, true / unit)[0, 1] ** 2 == pytest.approx(merit, abs=0.03)
