"""What falls off with resolution: amplitudes or scale, by what is known of the scale."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_intensities import CELL, D_MIN, SPACE_GROUP, simulated

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.gauge import fix_gauge
from braggflux.merge.fit.training import fit, start
from braggflux.merge.io.observations import make_unmerged
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.amplitudes import merged_rows, scaled_observations
from braggflux.merge.problem import build_problem


@pytest.mark.parametrize("wilson_b", [0.0, 12.0])
def test_falloff_moves_from_the_amplitudes_to_the_scale(wilson_b):
    rng = np.random.default_rng(5)
    asu = ReciprocalAsu(CELL, SPACE_GROUP, D_MIN, False)
    f = np.sqrt(rng.exponential(1e4 * np.exp(-30 / (2 * asu.d**2))))
    wavelength = rng.uniform(0.95, 1.05, 20 * 150)
    data, *_ = simulated(rng, f=f, asu=asu, wavelength=wavelength)
    config = MergeConfig(laue=True, epochs=3, anisotropic=False, wilson_b=wilson_b)
    problem = build_problem([data], config)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    fit(merger, problem.table, config)
    with torch.no_grad():
        everything = problem.table.everything()
        before = merger.loss(everything, merger.inference())
        scaled = scaled_observations(merger, problem.table)
        rows = merged_rows(merger, problem.table, scaled)
        assert merger.prior.log_sigma.std() > 0.1
        fix_gauge(merger, problem.table, config)
        after = merger.loss(everything, merger.inference())
    for name in ("log_likelihood", "kl_structure_factor"):
        value, expected = (float(getattr(x, name)) for x in (after, before))
        assert value == pytest.approx(expected, rel=1e-9), name
    d = torch.as_tensor(problem.unique.d)
    sigma = merger.prior.wilson_sigma().detach()
    torch.testing.assert_close(
        (sigma / sigma[0]).log(), -0.5 * wilson_b * (d**-2 - d[0] ** -2), rtol=0, atol=1e-9
    )
    scaled = scaled_observations(merger, problem.table)
    now = merged_rows(merger, problem.table, scaled)
    torch.testing.assert_close(now.normalised, rows.normalised)
    ratio = (now.amplitude / rows.amplitude).square()
    seen = rows.n_obs > 0
    torch.testing.assert_close((now.intensity / rows.intensity)[seen], ratio[seen])
    assert ratio.std() > 0.05


@pytest.mark.slow
def test_falloff_of_stills_is_that_of_points_on_the_ewald_sphere():
    """Points grow with 1/d, so that a cut at one distance loses more of the inner reflections."""
    rng = np.random.default_rng(7)
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 3.0, False)
    f = np.sqrt(rng.exponential(1e4 * np.exp(-30 / (2 * asu.d**2))))
    image = np.repeat(np.arange(60), 300)
    row = rng.integers(0, len(asu), len(image))
    offset = rng.uniform(-1, 1, len(image)) * 2e-4
    width = 2e-4 * 3.0 / asu.d[row]
    partiality = np.exp(-0.5 * (offset / width) ** 2)
    sigma = np.full(len(image), 20.0)
    scale = np.exp(0.2 * rng.standard_normal(60))[image]
    data = make_unmerged(
        source="a",
        miller_index=asu.miller_index[row],
        intensity=scale * partiality * f[row] ** 2 + sigma * rng.standard_normal(len(image)),
        sigma=sigma,
        image_label=image,
        metadata={"ewald_offset": offset, "BATCH": image},
        wavelength=None,
        cell=CELL,
        space_group=SPACE_GROUP,
        name="a",
        has_lp_applied=True,
    )
    config = MergeConfig(stills=True, epochs=30, batch_size=2000, anisotropic=False)
    torch.manual_seed(0)
    problem = build_problem([data], config)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    fit(merger, problem.table, config)
    merger.requires_grad_(False)
    everything = problem.table.everything()

    def error():
        """Of the logarithm of F against resolution, largest less smallest."""
        found = merger.inference().mean.numpy()
        true = f[asu.refl_id(problem.unique.asus[0].miller_index)]
        shells = np.array_split(np.argsort(problem.unique.d), 8)
        ratio = [np.log((found[s] ** 2).mean() / (true[s] ** 2).mean()) / 2 for s in shells]
        return np.ptp(ratio)

    before, wrong = merger.loss(everything, merger.inference()), error()
    fix_gauge(merger, problem.table, replace(config, falloff="amplitudes"))
    assert error() == wrong
    fix_gauge(merger, problem.table, config)
    after = merger.loss(everything, merger.inference())
    for name in ("log_likelihood", "kl_structure_factor"):
        value, expected = (float(getattr(x, name)) for x in (after, before))
        assert value == pytest.approx(expected, rel=1e-9), name
    assert wrong > 0.2
    assert error() < 0.1
