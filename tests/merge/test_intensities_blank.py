"""Spots in a shadow: the mixture's density, and amplitudes that the shadow must not touch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import gemmi
import numpy as np
import pytest
import torch
from scipy import stats

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.measurement import GaussianMeasurement
from braggflux.merge.fit.training import fit, start, start_held_out
from braggflux.merge.io.observations import make_unmerged
from braggflux.merge.likelihood.alternatives import WithAlternatives
from braggflux.merge.likelihood.common_error import CommonError
from braggflux.merge.likelihood.error_model import ErrorModel
from braggflux.merge.likelihood.student_t import StudentT
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.amplitudes import merged_rows, scaled_observations
from braggflux.merge.problem import build_problem
from braggflux.merge.scale.base import Scale

CELL = gemmi.UnitCell(40, 50, 60, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")


def test_density_is_a_mixture_and_the_spots_of_a_cluster_are_blank_together():
    rng = np.random.default_rng(0)
    intensity, expected = rng.normal(5, 3, 3), rng.uniform(4, 6, 3)
    sigma, variance = rng.uniform(0.5, 2, 3), rng.uniform(1, 3, 3)
    log_odds = np.array([-1.0, -0.4, 0.3])
    model = WithAlternatives(StudentT(ErrorModel(True, 1.0), CommonError(True), 5.0))
    s2 = model.error_parameters["common_error"] ** 2
    tensor = torch.as_tensor
    usual = rng.uniform(2, 9, 3)
    odds_stray = float(model.stray_log_odds.detach().exp())
    cluster = torch.tensor([0, 0, 1])
    measured = GaussianMeasurement(tensor(intensity), tensor(sigma))
    batch = SimpleNamespace(observations=SimpleNamespace(measured=measured), cluster=cluster)
    nothing = torch.zeros(3, dtype=torch.float64)
    given = measured, tensor(expected), nothing, nothing
    place = Scale(nothing, blank_log_odds=tensor(log_odds))
    e = model.expectation(*given, place, tensor(usual))
    e = replace(e, variance=tensor(variance))
    density = model(batch, e).detach().numpy()
    share = model.share_of_spots(batch, e).numpy()
    for c, rows in ((0, [0, 1]), (1, [2])):
        shape = np.diag(variance[rows]) + s2 * np.outer(expected[rows], expected[rows])
        spot = stats.multivariate_t(shape=shape, df=5.0).pdf(intensity[rows] - expected[rows])
        nothing = stats.norm(0, sigma[rows]).pdf(intensity[rows]).prod()
        stray = stats.t(3, 0, np.hypot(sigma, usual)[rows]).pdf(intensity[rows]).prod()
        odds = np.exp(log_odds[rows].mean())
        total = spot + odds * nothing + odds_stray * stray
        wanted = np.log(total / (1 + odds + odds_stray))
        assert density[c] == pytest.approx(wanted, rel=1e-10)
        np.testing.assert_allclose(share[rows], spot / total, rtol=1e-10)
    # without odds every observation is its spot
    e = replace(model.expectation(*given, Scale(nothing), tensor(usual)), variance=e.variance)
    np.testing.assert_array_equal(model.share_of_spots(batch, e), 1.0)
    torch.testing.assert_close(model(batch, e), model.spots(batch, e), rtol=0, atol=0)


@pytest.mark.slow
def test_a_shadow_takes_reflections_away_and_spoils_none():
    rng = np.random.default_rng(0)
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 4.0, False)
    f = np.sqrt(rng.exponential(1000.0, len(asu)))
    n = 6000
    row = rng.integers(0, len(asu), n)
    xy = rng.uniform(0, 1000, (n, 2))
    lonely = np.arange(10)  # reflections that are seen in the shadow only
    in_shadow = (np.abs(xy[:, 0] - 700) < 60) & (xy[:, 1] > 500)
    row[~in_shadow & np.isin(row, lonely)] += 10
    sigma = np.full(n, 10.0)
    intensity = np.where(in_shadow, 0.0, f[row] ** 2 * np.exp(0.05 * rng.standard_normal(n)))
    intensity = intensity + sigma * rng.standard_normal(n)
    data = make_unmerged(
        source="a",
        miller_index=asu.miller_index[row],
        intensity=intensity,
        sigma=sigma,
        image_label=np.arange(n) // 300,
        metadata={"X": xy[:, 0], "Y": xy[:, 1]},
        wavelength=rng.uniform(1.0, 1.05, n),
        cell=CELL,
        space_group=SPACE_GROUP,
        name="a",
        has_lp_applied=True,
    )
    config = MergeConfig(laue=True, epochs=40, n_spectrum_knots=4)
    problem = build_problem([data], config)
    torch.manual_seed(0)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    fit(merger, problem.table, config)
    scaled = scaled_observations(merger, problem.table)
    source = problem.source
    strong = f[row[source]] ** 2 > 150
    assert scaled.is_spot.numpy()[strong & ~in_shadow[source]].mean() > 0.99
    assert scaled.is_spot.numpy()[strong & in_shadow[source]].mean() < 0.05
    merged = merged_rows(merger, problem.table, scaled)
    own = problem.unique.asus[0].refl_id(asu.miller_index)
    n_obs, amplitude = merged.n_obs.numpy()[own], merged.amplitude.numpy()[own]
    assert np.all(n_obs[lonely][f[lonely] > 15] == 0)
    seen = (n_obs > 2) & (f > 12)
    ratio = amplitude[seen] / f[seen]
    # 5 % and 10 units on each of at least 3 observations; the shadow would cost a factor
    assert np.std(ratio / np.median(ratio)) < 0.05

    # an amplitude that has lost all its observations to the alternatives is brought back
    lost = torch.as_tensor(own[seen][:5])
    before = merged.amplitude[lost]
    with torch.no_grad():
        merger.log_spread_step[lost] = 0.0
        merger.log_spread_step[lost] += float(np.log(2e4 / problem.table.unit_intensity))
        merger.log_concentration[lost] = 8.0
    assert (
        not scaled_observations(merger, problem.table).is_spot[torch.isin(scaled.row, lost)].any()
    )
    start_held_out(merger, problem.table, problem.table)
    after = merged_rows(merger, problem.table, scaled_observations(merger, problem.table))
    torch.testing.assert_close(after.amplitude[lost], before, rtol=0.05, atol=0.0)
