"""Overloaded spots are found by their sigmas, and only where there are any."""

from __future__ import annotations

import numpy as np
import pytest

from braggflux.merge.data.overloads import MAX_SHARE, overload_level

N = 20_000


def counted(rng, instrument=0.01, background=10.0):
    """Intensities over five decades with counting errors and a relative error."""
    intensity = np.exp(rng.normal(6.0, 1.8, N))
    return intensity, np.sqrt(intensity + background**2 + (instrument * intensity) ** 2)


@pytest.mark.parametrize("instrument", [0.0, 0.01, 0.05])
def test_counting_and_instrument_errors_are_no_overloads(instrument):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        intensity, sigma = counted(rng, instrument)
        sigma *= np.exp(0.3 * rng.standard_normal(N))
        assert overload_level(intensity, sigma) == np.inf


@pytest.mark.parametrize("share", [0.003, 0.01, 0.03])
def test_level_is_where_sigma_jumps(share):
    rng = np.random.default_rng(1)
    intensity, sigma = counted(rng)
    sigma *= np.exp(0.3 * rng.standard_normal(N))
    level = np.quantile(intensity, 1 - share)
    over = intensity > level
    sigma[over] *= 4.0
    found = intensity > overload_level(intensity, sigma)
    assert share < MAX_SHARE
    # to a step of the search
    assert (found & over).sum() > 0.8 * over.sum()
    assert (found & ~over).sum() < 0.3 * over.sum()


def test_few_spots_say_nothing():
    rng = np.random.default_rng(0)
    intensity, sigma = counted(rng)
    sigma[np.argsort(intensity)[-10:]] *= 10.0
    assert overload_level(intensity, sigma) == np.inf
    assert overload_level(intensity[:500], sigma[:500]) == np.inf
    assert overload_level(np.full(N, np.nan), np.ones(N)) == np.inf
