"""Merging stills from stores that are not held in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.file_kinds import PHOTON_COUNTS, file_kind
from braggflux.integrator.processes import ALONE, Processes
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.gauge import fix_gauge
from braggflux.merge.fit.half_set_correlation import half_set_correlation_of_sums
from braggflux.merge.fit.sigma_a import set_sigma_a_from_means
from braggflux.merge.fit.training import start, start_amplitudes
from braggflux.merge.io.stores.observation_store import ObservationStore
from braggflux.merge.io.stores.unmerged_store import SUFFIX, UnmergedStore
from braggflux.merge.model.finite import require_finite
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.saved_scale import FILE_NAME, SavedScale, save_scale
from braggflux.merge.model.sums import ObservationSums
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.stream.batches import ObservationStream
from braggflux.merge.stream.solve import solve_amplitudes
from braggflux.merge.stream.training import (
    fit_stream,
    held_out_batches,
    look_at_all,
    n_training_batches,
    predict_held_out,
)
from braggflux.pipelines.inputs.inputs import MergeInputs
from braggflux.pipelines.maps.reference_amplitudes import reference_amplitudes
from braggflux.pipelines.merging.in_memory import check_coupling
from braggflux.pipelines.merging.indexing import write_indexing
from braggflux.pipelines.merging.metrics import write_metrics
from braggflux.pipelines.merging.outputs import check_free_flags, write_stream
from braggflux.pipelines.merging.streamed_indexing import indexed, resolve_indexing
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.rundir import write_rows

logger = logging.getLogger(__name__)


def is_streamed(paths: Sequence[Path], config: MergeConfig) -> bool:
    """Stills in stores that together are too large for memory."""
    if not config.stills or any(path.suffix != SUFFIX for path in paths):
        return False
    if any(not path.is_file() or file_kind(path) == PHOTON_COUNTS for path in paths):
        return False
    n_obs = 0
    for path in paths:
        with UnmergedStore(path) as store:
            n_obs += len(store)
    return n_obs > config.stream_above


def merge_stores(
    inputs: MergeInputs,
    config: MergeConfig,
    device: torch.device,
    saved: SavedScale | None = None,
    processes: Processes = ALONE,
) -> list[Path]:
    """Fit scales to a part of the data (or take ``saved`` ones), then amplitudes to all.

    Returns
    -------
    list of Path
        Merged MTZ files in the order of the datasets.

    Raises
    ------
    UserError
        Something was asked for that needs all observations in memory.
    """
    with inputs.open() as stores:
        _check(config, stores)
        indexing = resolve_indexing(inputs, config, stores)
        stores = indexed(stores, indexing)
        feature_scaling = None if saved is None else saved.feature_scaling
        stream = ObservationStream(stores, config, feature_scaling, inputs.parents)
        check_coupling(stream.unique, config)
        check_free_flags(stream.unique, config)
        f_calc = None
        if inputs.prior_model is not None:
            f_calc = torch.as_tensor(reference_amplitudes(inputs.prior_model, stream.unique.asus))
        inputs.open_folder(config)
        logger.info(
            "%d observations on %d images in %d batches, %d unique reflections; metadata %s",
            *(len(stream), sum(s.n_images for s in stores), stream.n_batches, len(stream.unique)),
            " ".join(stream.feature_scaling.names),
        )
        merger = Merger(stream.unique, stream.sample, config, f_calc).to(device)
        merger.processes = processes
        _fit_scales(merger, stream, config, saved)
        # From an untrained start the parabola of one look is not good enough.
        for _ in range(1 if saved is None else 2):
            sums = look_at_all(merger, stream, config)
            solve_amplitudes(merger, sums)
        if f_calc is not None:
            _choose_sigma_a(merger, sums, inputs.unfinished)
        merger.prior.couple()
        if merger.prior.has(DoubleWilson):
            _choose_correlation(merger, sums, config, inputs.unfinished)
        predictions = {kind: asdict(p) for kind, p in predict_held_out(merger, stream).items()}
        solve_amplitudes(merger, sums.add(held_out_batches(stream, merger)))
        merger.to("cpu")
        require_finite(merger, None, "end of the fit")
        if not processes.is_first:
            return []
        merger.processes = ALONE
        ambiguity = None if indexing is None else indexing.ambiguity
        write_metrics(inputs.unfinished / "metrics.json", merger, predictions, ambiguity)
        if indexing is not None:
            names = [store.name for store in stores for _ in range(store.n_images)]
            write_indexing(inputs.unfinished / "indexing.csv", ambiguity, indexing.number, names)
        save_scale(inputs.unfinished / FILE_NAME, merger, stream.sample, config)
        return write_stream(merger, stream, sums, config, inputs.unfinished)


def _check(config: MergeConfig, stores: Sequence[ObservationStore]) -> None:
    """Refuse what is done in memory only."""
    if config.half_set_repeats > 1:
        n_obs, names = sum(len(s) for s in stores), " ".join(str(s.path) for s in stores)
        raise UserError(
            f"the {n_obs} observations of {names} are read batch by batch, which "
            "--half-set-repeats does not allow; leave it out, or hold all in memory with "
            f"--set stream_above={n_obs}"
        )


def _fit_scales(
    merger: Merger,
    stream: ObservationStream,
    config: MergeConfig,
    saved: SavedScale | None,
) -> None:
    merger.scale.forget_images()
    sample = stream.sample.to(merger.device)
    if saved is not None:
        saved.load_into(merger)
        start_amplitudes(merger, sample)
        return
    start(merger, sample)
    n_steps = n_training_batches(stream, config)
    with log.progress("merging") as advance:
        fit_stream(merger, stream, config, lambda step, _: advance(step, n_steps))
    fix_gauge(merger, sample, config)


def _choose_sigma_a(merger: Merger, sums: ObservationSums, out: Path) -> None:
    rows = set_sigma_a_from_means(merger, *sums.mean())
    write_rows(out / "sigma_a.csv", rows, rows[0])
    solve_amplitudes(merger, sums)


def _choose_correlation(
    merger: Merger,
    sums: ObservationSums,
    config: MergeConfig,
    out: Path,
) -> None:
    """Choose r of relatives and fit the amplitudes with it; scales know Wilson's prior only."""
    if config.correlation is not None:
        merger.prior.part(DoubleWilson).one_minus_r2.fill_(1 - config.correlation**2)
    else:
        rows = half_set_correlation_of_sums(merger, sums)
        write_rows(out / "correlation.csv", rows, rows[0])
    solve_amplitudes(merger, sums)
