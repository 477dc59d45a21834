"""Stills read batch by batch: the same ELBO, the same sums and amplitudes, and no more memory."""

from __future__ import annotations

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch

from braggflux.fixtures.stills import stills
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.training import fit, start
from braggflux.merge.io.stores.unmerged_store import UnmergedStore, write_unmerged_store
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.sums import ObservationSums
from braggflux.merge.output.amplitudes import scaled_observations, weighted_mean
from braggflux.merge.problem import build_problem
from braggflux.merge.stream.batches import ObservationStream, joined
from braggflux.merge.stream.solve import solve_amplitudes
from braggflux.merge.stream.training import (
    all_batches,
    fit_stream,
    held_out_batches,
    look_at_all,
    predict_held_out,
)
from braggflux.pipelines.simulate.stills_store import as_unmerged

D_MIN = 4.0
CONFIG = MergeConfig(
    stills=True, anomalous=True, d_min=D_MIN, network_width=8, batch_size=900, held_out=0.1
)


def write(path, n_images):
    experiment = stills(n_images, d_min=D_MIN, width=6e-4, images_per_chunk=16)
    write_unmerged_store(path, as_unmerged(experiment.chunks(), experiment))
    return experiment


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    path = tmp_path_factory.mktemp("stills") / "stills.h5"
    experiment = write(path, 160)
    with UnmergedStore(path) as store:
        yield store, experiment


@pytest.fixture(scope="module")
def stream(simulation):
    return ObservationStream([simulation[0]], CONFIG)


def whole_table(stream):
    """All observations in memory, with what the stream holds out held out."""
    problem = build_problem(
        [stream.stores[0].read()],
        CONFIG,
        feature_scaling=stream.feature_scaling,
        unique=stream.unique,
    )
    used, seen = [], []
    for k in range(stream.n_batches):
        table, masks = stream.split(k)
        o = table.observations
        used.append(o.is_used if masks is None else masks.is_used)
        seen.append(o.is_seen if masks is None else masks.is_seen)
    return problem.table.with_masks(torch.cat(used), torch.cat(seen))


def started(stream, table):
    torch.manual_seed(0)
    merger = Merger(stream.unique, table, CONFIG)
    start(merger, table)
    merger.set_counts(torch.as_tensor(stream.n_obs))
    return merger


def test_batches_are_whole_images_and_cover_the_store(stream):
    table = whole_table(stream)
    assert stream.n_batches >= 8
    images = np.diff(stream.edges, axis=0)
    assert images.min() > 0
    assert images.sum() == stream.stores[0].n_images
    assert len(table.observations) == sum(
        len(stream.batch(k).observations) for k in range(stream.n_batches)
    )
    generator = torch.Generator().manual_seed(0)
    numbers = stream.numbers(generator)
    first, second = ([next(numbers) for _ in range(stream.n_batches)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(stream.n_batches))
    assert first != second
    assert first != sorted(first)


def test_streamed_batches_add_up_to_the_table_in_memory(stream):
    table = whole_table(stream)
    merger = started(stream, table)
    merger.scale.forget_images()  # as for every stream
    counted = torch.bincount(
        table.terms.row[table.observations.is_used], minlength=len(stream.n_obs)
    )
    np.testing.assert_array_equal(stream.n_obs, counted.numpy())
    with torch.no_grad():
        for p in merger.parameters():
            p += 0.05 * torch.randn_like(p)
        q = merger.inference()
        full = merger.loss(table.everything(), q)
        parts = [merger.loss(stream.batch(k), q) for k in range(stream.n_batches)]
        for name in ("log_likelihood", "kl_structure_factor", "scale_penalty"):
            total = float(sum(getattr(part, name) for part in parts))
            # networks are float32: sums in another order differ in the last digits
            assert total == pytest.approx(float(getattr(full, name)), rel=1e-6), name
        # every row once, however often it was measured
        seen = merger.n_group[merger.group] > 0
        weight = sum(part.row_weight for part in parts)
        torch.testing.assert_close(weight, seen.double())
        once = float((merger.prior.kl(q) * seen).sum())
        assert once == pytest.approx(float(full.kl_structure_factor), rel=1e-12)
        # the divergence may wait for several batches
        late = [merger.loss(stream.batch(k), q, with_prior=False) for k in range(3)]
        early = [merger.loss(stream.batch(k), q) for k in range(3)]
        waited = (sum(t.row_weight for t in late) * merger.prior.kl(q)).sum()
        assert float(waited) == pytest.approx(float(sum(t.kl_structure_factor for t in early)))
        assert all(float(t.kl_structure_factor) == 0 for t in late)


def test_sums_are_those_of_the_observations_in_memory(stream):
    table = whole_table(stream)
    merger = started(stream, table)
    everything = table.with_masks(
        torch.ones_like(table.observations.is_used), table.observations.is_seen
    )
    sums = look_at_all(merger, stream, CONFIG).add(held_out_batches(stream, merger))
    scaled = scaled_observations(merger, everything)
    n_rows = len(merger.group)
    unit = stream.feature_scaling.unit_intensity
    mean, sigma = weighted_mean(scaled, n_rows)
    torch.testing.assert_close(sums.mean()[0] * unit, mean, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(sums.mean()[1] * unit, sigma, rtol=1e-4, atol=1e-4, equal_nan=True)
    n_spots = torch.bincount(scaled.row[scaled.is_spot], minlength=n_rows)
    torch.testing.assert_close(sums["n"].long(), n_spots)
    halves = sums.by_half[:, :, 0]
    assert 0.3 < float(halves[0].sum() / halves.sum()) < 0.7
    again = look_at_all(merger, stream, CONFIG).add(held_out_batches(stream, merger))
    torch.testing.assert_close(again.by_half, sums.by_half)


@pytest.mark.slow
def test_one_look_gives_the_amplitudes_of_the_full_elbo(stream):
    table = whole_table(stream)
    merger = started(stream, table)
    config = replace(CONFIG, batch_size=None)
    fit(merger, table, config, epochs=10)
    fit(merger, table, config, epochs=60, with_scales=False)
    wanted = merger.inference()
    mean, sigma = wanted.mean.detach(), wanted.variance.detach().sqrt()
    seen = merger.n_obs >= 3
    with torch.no_grad():  # q as it is after some training: off by its own noise
        merger.log_spread_step += 0.5 * sigma / mean * torch.randn_like(mean)
    off = ((merger.inference().mean.detach() - mean) / sigma)[seen].abs().median()
    for _ in range(2):
        solve_amplitudes(merger, look_at_all(merger, stream, config))
    got = merger.inference()
    z = ((got.mean.detach() - mean) / sigma)[seen].abs()
    assert off > 0.1
    assert z.median() < 0.03
    assert z.quantile(0.95) < 0.3
    ratio = (got.variance.detach().sqrt() / sigma)[seen]
    assert 0.95 < ratio.median() < 1.05


def test_less_than_a_pass_recovers_the_truth(simulation, stream):
    store, experiment = simulation
    config = replace(CONFIG, stream_training=len(store) * 3 // 4)
    torch.manual_seed(0)
    merger = Merger(stream.unique, stream.sample, config)
    start(merger, stream.sample)
    steps = []
    fit_stream(merger, stream, config, lambda step, _: steps.append(step))
    assert 0.7 < len(steps) / stream.n_batches < 0.8
    solve_amplitudes(merger, ObservationSums(merger, 0).add(all_batches(stream, merger)))
    truth, asu = experiment.truth, stream.unique.asus[0]
    index, square = truth.expand()
    row = asu.refl_id(index)
    f = np.zeros(len(asu))
    f[row[row >= 0]] = np.sqrt(square[row >= 0])
    seen = (merger.n_obs.numpy() > 2) & (f > 0)
    found = merger.inference().mean.detach().numpy()
    cc = np.corrcoef(found[seen], f[seen])[0, 1]
    assert cc > 0.97, cc
    held_out = predict_held_out(merger, stream)
    assert held_out["observation"].cc_pred > 0.8
    assert held_out["image"].cc_pred > 0.8
    assert held_out["image"].n_obs > 100


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, simulation):
    def merge(store):
        stream = ObservationStream([store], replace(CONFIG, stream_training=3000))
        merger = Merger(stream.unique, stream.sample, CONFIG)
        start(merger, stream.sample)
        fit_stream(merger, stream, replace(CONFIG, stream_training=3000))
        solve_amplitudes(merger, look_at_all(merger, stream, CONFIG))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    write(tmp_path / "more.h5", 640)
    small = merge(simulation[0])
    with UnmergedStore(tmp_path / "more.h5") as store:
        n_bytes = len(store) * 8 * 20  # in memory: some twenty columns
        grown = (merge(store) - small) * 1024
    assert grown < 0.3 * n_bytes


def test_scans_are_not_streamed(simulation):
    with pytest.raises(UserError, match="only with --stills"):
        ObservationStream([simulation[0]], replace(CONFIG, stills=False))


def test_joined_blocks_are_the_store(simulation):
    store = simulation[0]
    whole = store.read(0, 30)
    parts = joined([store.read(0, 10), store.read(10, 11), store.read(11, 30)])
    np.testing.assert_array_equal(whole.intensity, parts.intensity)
    np.testing.assert_array_equal(whole.image, parts.image)
    np.testing.assert_array_equal(whole.metadata["xobs"], parts.metadata["xobs"])
