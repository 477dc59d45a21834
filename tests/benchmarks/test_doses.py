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


def test_weights_change_heights_and_not_correlations(doses, tmp_path):
    heights = {"weighted": 2.0, "unweighted": 1.0, "DANO": 3.0}
    common = {"CC": [0.5, 0.3], "CC of DANO": [0.6, 0.4]}
    rows = [
        {"row": name, "dose": dose, "seed": 0} | heights | common
        for name in ("joint", "staged", "dials", "dials-tuned")
        for dose in (1, 8)
    ]
    doses.draw(rows, tmp_path / "dose.svg")
    left, right = doses.plt.gcf().axes
    by_label = {line.get_label(): line for line in left.lines}
    assert list(by_label["DIALS tuned"].get_ydata()) == [1.0, 1.0]
    assert list(by_label["DIALS tuned, weighted"].get_ydata()) == [2.0, 2.0]
    # one line a program: weights have no part in the correlation
    assert [line.get_label() for line in right.lines] == [
        label for label in by_label if not label.endswith(", weighted")
    ]
    assert [line.get_color() for line in right.lines] == [
        by_label[line.get_label()].get_color() for line in right.lines
    ]
    doses.plt.close("all")
