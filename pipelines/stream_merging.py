"""Merging stills from a store that is not held in memory."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from integrator.errors import UserError
from merge.intensities.config import IntensityMergeConfig
from merge.intensities.merger import IntensityMerger
from merge.intensities.row_problem import solve_rows
from merge.intensities.row_sums import RowSums
from merge.intensities.saved_scale import SavedScale
from merge.intensities.stream import ObservationStream
from merge.intensities.stream_correlation import choose_from_sums
from merge.intensities.stream_training import (
    fit_stream,
    held_out_batches,
    look_at_all,
    n_training_batches,
    predict_held_out,
)
from merge.intensities.table import ObservationTable
from merge.intensities.training import start, start_amplitudes
from merge.io.unmerged_store import UnmergedStore
from pipelines import log
from pipelines.merge_outputs import write_stream
from pipelines.rundir import write_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamedMerge:
    """Result: merger on the CPU, predictions of what was held out by kind, and the merged MTZ.

    ``sample`` is the part of the observations that the merger was started with.
    """

    merger: IntensityMerger
    predictions: dict[str, dict]
    sample: ObservationTable
    path: Path


def merge_store(
    store: UnmergedStore,
    config: IntensityMergeConfig,
    out: Path,
    device: torch.device,
    saved: SavedScale | None = None,
) -> StreamedMerge:
    """Fit scales to a part of the data (or take ``saved`` ones), then amplitudes to all."""
    stream = ObservationStream(store, config, None if saved is None else saved.standard)
    logger.info(
        "%d observations on %d images in %d batches, %d unique reflections; metadata %s",
        *(len(store), store.n_images, stream.n_batches, len(stream.unique)),
        " ".join(stream.standard.names),
    )
    merger = IntensityMerger(stream.unique, stream.sample, config).to(device)
    sample = stream.sample.to(device)
    if saved is None:
        start(merger, sample)
        n_steps = n_training_batches(stream, config)
        with log.progress("merging") as advance:
            fit_stream(merger, stream, config, lambda step, _: advance(step, n_steps))
    else:
        saved.load_into(merger)
        start_amplitudes(merger, sample)
    # From an untrained start the parabola of one look is not good enough.
    for _ in range(1 if saved is None else 2):
        sums = look_at_all(merger, stream, config)
        solve_rows(merger, sums)
    if config.prior == "double-wilson":
        _couple(merger, stream, sums, config, out)
    predictions = {kind: asdict(p) for kind, p in predict_held_out(merger, stream).items()}
    solve_rows(merger, sums.add(held_out_batches(stream, merger)))
    merger.to("cpu")
    path = write_stream(merger, stream, sums, config, out)
    return StreamedMerge(merger, predictions, stream.sample, path)


def _couple(
    merger: IntensityMerger,
    stream: ObservationStream,
    sums: RowSums,
    config: IntensityMergeConfig,
    out: Path,
) -> None:
    """Choose r of the mates and fit the amplitudes with it; scales know Wilson's prior only."""
    if not len(merger.prior.child):
        raise UserError(
            "--prior double-wilson finds no amplitude with a relative; give --anomalous"
        )
    merger.prior.is_coupled = True
    if config.correlation is not None:
        merger.prior.one_minus_r2.fill_(1 - config.correlation**2)
    elif not stream.carriers:
        raise UserError(
            "r is chosen by held-out data and held_out is 0; raise it or give --correlation"
        )
    else:
        rows = choose_from_sums(merger, stream, sums)
        write_rows(out / "correlation.csv", rows, rows[0])
    solve_rows(merger, sums)
