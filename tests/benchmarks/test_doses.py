"""Thinning of frames, and the dose at which one curve reaches another."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def doses(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("doses")


def test_thinned_counts_are_poisson_at_the_lower_rate(doses):
    rng = np.random.default_rng(0)
    counts = rng.poisson(40.0, 200_000).astype(np.uint16)
    counts[::10] = doses.MASKED
    thin = doses.thin(counts, 1 / 8, rng)
    assert thin.dtype == counts.dtype
    assert np.all(thin[::10] == doses.MASKED)
    kept = np.delete(thin, np.s_[::10]).astype(float)
    n, rate = len(kept), 5.0
    assert abs(kept.mean() - rate) < 5 * np.sqrt(rate / n)
    # of a Poisson count the variance of the variance is (rate + 2 rate^2) / n
    assert abs(kept.var() - rate) < 5 * np.sqrt((rate + 2 * rate**2) / n)


def test_dose_needed_is_the_shift_between_the_curves(doses):
    quality = {dose: (10 - np.log(dose), 0.0) for dose in (1, 4, 16, 64)}
    half_as_good = {dose: (10 - np.log(2 * dose), 0.0) for dose in (1, 8, 256)}
    needed = doses.dose_needed(quality, half_as_good, 0)
    assert needed == pytest.approx({1: 0.5, 8: 0.5})  # 1/256 is below all that was measured
