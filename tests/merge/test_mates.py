"""Bijvoet mates while scales are fitted: one amplitude, and differences that halves confirm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_intensities import CELL, D_MIN, SPACE_GROUP, simulated

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.mates import confirmed_log_ratio
from braggflux.merge.fit.training import fit, start
from braggflux.merge.model.merger import Merger
from braggflux.merge.problem import build_problem

CONFIG = MergeConfig(anomalous=True, network_width=8, epochs=20, held_out=0.0)


def anomalous_problem(difference, n_images=40, seed=0, config=CONFIG):
    """Images of a crystal whose mates differ by ``difference`` rms in F, relative."""
    rng = np.random.default_rng(seed)
    asu = ReciprocalAsu(CELL, SPACE_GROUP, D_MIN, True)
    mate = asu.friedel_mate
    f = np.sqrt(rng.exponential(1000.0, len(asu)))[np.minimum(np.arange(len(asu)), mate)]
    half = 0.5 * difference * rng.standard_normal(len(asu))
    half = (
        half[np.minimum(np.arange(len(asu)), mate)]
        * asu.friedel_sign
        * (mate != np.arange(len(asu)))
    )
    f = f * (1 + half)
    data, *_ = simulated(rng, n_images, 150, f=f, asu=asu)
    problem = build_problem([data], config)
    own = asu.refl_id(problem.unique.asus[0].miller_index)
    return problem, f[own]


def fitted(problem, config=CONFIG):
    torch.manual_seed(0)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    fit(merger, problem.table, config)
    return merger


def test_tied_mates_share_a_row_and_part_with_its_amplitude():
    problem, _ = anomalous_problem(0.1)
    merger = Merger(problem.unique, problem.table, CONFIG)
    start(merger, problem.table)
    merger.count(problem.table)
    joined = merger.joined
    away = joined != torch.arange(len(joined))
    assert int(away.sum()) == int((problem.unique.asus[0].friedel_sign < 0).sum())
    merger.log_ratio[away] = 0.2
    with merger.tied(problem.table) as tied:
        assert not away[tied.terms.row].any()
        extra = tied.terms.base_log_scale - problem.table.terms.base_log_scale
        assert torch.equal(extra, merger.log_ratio[problem.table.terms.row])
        merger.count(tied)
        # the divergence of both counts once, in however many batches
        q = merger.inference()
        with torch.no_grad():
            whole = merger.loss(tied.everything(), q).kl_structure_factor
            units = torch.arange(tied.n_units).tensor_split(5)
            parts = [merger.loss(tied.batch(u), q).kl_structure_factor for u in units]
            seen = (merger.n_obs > 0) & ~away
            torch.testing.assert_close(whole, merger.prior.kl(q)[seen].sum())
        torch.testing.assert_close(sum(parts), whole)
        shared = merger.log_spread.clone()
    torch.testing.assert_close(
        merger.log_spread.detach()[away], shared.detach()[joined[away]] + 0.2
    )


@pytest.mark.slow
def test_differences_that_halves_confirm_are_known_and_noise_is_not():
    problem, f = anomalous_problem(0.2, n_images=60)
    merger = fitted(problem)
    ratio = confirmed_log_ratio(merger, problem.table, CONFIG)
    minus = (merger.joined != torch.arange(len(merger.joined))).nonzero()[:, 0]
    plus = merger.joined[minus]
    found = (ratio[plus] - ratio[minus]).numpy()
    true = 2 * np.log(f[plus] / f[minus])
    strong = found != 0
    assert strong.mean() > 0.5
    assert np.corrcoef(found[strong], true[strong])[0, 1] > 0.9
    assert np.polyfit(true[strong], found[strong], 1)[0] == pytest.approx(0.9, abs=0.15)
    problem, _ = anomalous_problem(0.0, n_images=60)
    assert not confirmed_log_ratio(fitted(problem), problem.table, CONFIG).any()


def test_merging_without_mates_ties_nothing():
    config = replace(CONFIG, anomalous=False)
    problem, _ = anomalous_problem(0.1, n_images=10, config=config)
    merger = Merger(problem.unique, problem.table, config)
    assert not merger.has_mates
    assert torch.equal(merger.joined, torch.arange(len(merger.joined)))
