"""One run: shoeboxes, joint training, and everything that the run directory holds at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from braggflux.integrator.atomic import replacing
from braggflux.integrator.errors import UserError, brief
from braggflux.integrator.io.intensity_file import read_intensities, write_intensities
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.model.saved_integrator import SavedIntegrator
from braggflux.integrator.processes import Processes
from braggflux.integrator.torch_file import load_torch, save_torch
from braggflux.integrator.types import IntensityTable
from braggflux.merge.model.finite import require_finite
from braggflux.pipelines.config.run import INTEGRATOR_FILE, RunConfig
from braggflux.pipelines.integration.checks import check_input, why_no_peaks
from braggflux.pipelines.integration.epoch_outputs import EpochWriter
from braggflux.pipelines.integration.examples import write_examples
from braggflux.pipelines.integration.extraction import extract
from braggflux.pipelines.integration.final_outputs import (
    integrated_reflections,
    write_integrated,
    write_unmerged,
)
from braggflux.pipelines.integration.problem import Problem, build
from braggflux.pipelines.integration.trainer import EpochResult, Trainer
from braggflux.pipelines.maps.anomalous_peaks import AnomalousModel, peak_heights_from_mtz
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.device import choose_device
from braggflux.pipelines.workspace.lock import one_writer
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory
from braggflux.pipelines.workspace.stage_times import StageTimes

logger = logging.getLogger(__name__)

REMEDY = "name an earlier checkpoint in `latest`, or start anew in another --out"


def run(config: RunConfig, *, resume: bool = False) -> RunDirectory:
    """Train on the frames of ``config`` and fill its run directory.

    Parameters
    ----------
    config : RunConfig
        ``expt``, ``refl`` and ``out`` are needed; without ``model`` there are no peaks.
    resume : bool
        Go on from the latest checkpoint; the result is that of an uninterrupted run.

    Started by ``torchrun``, the processes share the work; the first one writes.
    """
    config = config.resolved()
    processes = Processes.of_environment()
    device = choose_device(config.training.device, processes)
    log.leave_to_first(processes)
    check_input(config)
    [out] = config.require("out")
    with one_writer(out) if processes.is_first else nullcontext(), processes.joined(device):
        return _run(config, device, processes, resume=resume)


def _run(
    config: RunConfig, device: torch.device, processes: Processes, *, resume: bool
) -> RunDirectory:
    stages = StageTimes()
    if processes.is_first:
        directory = RunDirectory.create(config, resume=resume)
        log.attach_file(directory.log_file)
        stages = StageTimes(directory.read_stage_times())
    else:
        directory = RunDirectory(config.out)
    try:
        trainer, writer = _prepare(directory, config, device, stages, processes)
        _train(trainer, writer, directory, config)
    except UserError:
        # a mistake found late must not stand in the way of the corrected command
        if processes.is_first:
            directory.abandon()
        raise
    if processes.is_first:
        with stages("final files"):
            _finish(trainer, writer, directory, config)
        directory.write_stage_times(stages.rows)
        logger.info("CPU time [s]: %s", stages.summary())
    processes.wait()
    return directory


def _prepare(
    directory: RunDirectory,
    config: RunConfig,
    device: torch.device,
    stages: StageTimes,
    processes: Processes,
) -> tuple[Trainer, EpochWriter]:
    """Cut the boxes, build the model, score the reference; the first process writes."""
    saved = None
    if config.trained_integrator is not None:
        saved = SavedIntegrator.read(config.trained_integrator / INTEGRATOR_FILE)
        text = f"starts from that of {config.trained_integrator}, {saved.epochs} epochs"
        if processes.is_first:
            directory.note("integrator", text)
        logger.info("the integrator %s", text)
    with stages("extraction"):
        store = _shoeboxes(directory, config, saved, processes)
    with stages("start of the models"):
        problem = build(store, config, saved)
    anomalous: list[AnomalousModel] = []
    if processes.is_first:
        anomalous = _anomalous_models(directory, config, problem)
        _write_reference(directory, config)
    is_staged = config.training.coupling == "staged"
    exchange = _exchange(directory, store, processes) if is_staged else None
    trainer = Trainer(problem, config, device, exchange, stages, processes)
    _log_problem(problem, device)
    return trainer, EpochWriter(directory, trainer, anomalous)


def _anomalous_models(
    directory: RunDirectory, config: RunConfig, problem: Problem
) -> list[AnomalousModel]:
    """Phases and sites for each data set; none, with a note, where no peaks can be had."""
    if reason := why_no_peaks(config):
        directory.note("peaks", reason)
        return []
    models = [
        AnomalousModel(config.model, asu.cell, asu.space_group, asu.d_min) for asu in problem.asus
    ]
    if models[0].why_no_sites:
        directory.note("peaks", models[0].why_no_sites)
    return models


def _shoeboxes(
    directory: RunDirectory,
    config: RunConfig,
    saved: SavedIntegrator | None,
    processes: Processes,
) -> ShoeboxStore:
    """Cut the boxes, or open those that an interrupted run has cut."""
    # the first process may have to clear the folder before: it says whether there are boxes
    if processes.from_first(directory.shoeboxes.is_file):
        return ShoeboxStore.open(directory.shoeboxes)
    if saved is not None:
        config = replace(config, extraction=replace(config.extraction, box=saved.box))
    return extract(config, directory.shoeboxes, processes)


def _write_reference(directory: RunDirectory, config: RunConfig) -> None:
    if config.reference is None or config.model is None:
        return
    d_min = config.extraction.d_min
    try:
        peaks = peak_heights_from_mtz(config.reference, config.model, d_min=d_min)
    except UserError as error:
        # a reference that cannot be scored is a missing row with its reason, not a failed run
        directory.note("reference", str(error))
        logger.warning("no reference row: %s", error)
        return
    for own in directory.data_sets():
        own.write_peaks(REFERENCE, peaks)


def _exchange(
    directory: RunDirectory, store: ShoeboxStore, processes: Processes
) -> Callable[[IntensityTable], IntensityTable]:
    """Staged coupling: the table goes through a file, as between separate programs."""

    def through_file(table: IntensityTable) -> IntensityTable:
        if processes.is_first:
            write_intensities(directory.intensities, table, store.experiments)
        processes.wait()
        return read_intensities(directory.intensities)

    return through_file


def _log_problem(problem: Problem, device: torch.device) -> None:
    merger = problem.model.merger
    logger.info(
        "%d observations of %d unique reflections in %s, to %.2f A, on %s",
        int(merger.n_obs.sum()),
        int((merger.n_obs > 0).sum()),
        problem.asus[0].space_group.xhm(),
        problem.asus[0].d_min,
        device,
    )


def _train(
    trainer: Trainer, writer: EpochWriter, directory: RunDirectory, config: RunConfig
) -> None:
    is_first = trainer.processes.is_first
    checkpoint = directory.latest_checkpoint()
    if checkpoint is not None:
        restore(trainer, checkpoint)
        if is_first:
            directory.rewind(trainer.epoch)
        logger.info("going on after epoch %d", trainer.epoch)
    else:
        if is_first:
            directory.rewind(-1)
        with log.progress("epoch 0") as advance:
            result = trainer.start(advance)
        if is_first:
            _write_epoch(trainer, writer, directory, result)
    while trainer.epoch < config.training.epochs:
        with log.progress(f"epoch {trainer.epoch + 1}") as advance:
            result = trainer.run_epoch(advance)
        require_finite(trainer.model, result.metrics["merge_elbo"], f"epoch {result.epoch}")
        if is_first:
            _write_epoch(trainer, writer, directory, result)


def _write_epoch(
    trainer: Trainer, writer: EpochWriter, directory: RunDirectory, result: EpochResult
) -> None:
    """Write the outputs of an epoch, and its checkpoint where one is due."""
    training = trainer.config.training
    with trainer.stages("outputs", result.epoch):
        writer.write(result)
        if result.epoch in (0, training.epochs) or not result.epoch % training.checkpoint_every:
            _save(trainer, directory)
    directory.write_stage_times(trainer.stages.rows)


def _finish(
    trainer: Trainer, writer: EpochWriter, directory: RunDirectory, config: RunConfig
) -> None:
    store, integrator = trainer.problem.store, trainer.model.integrator
    write_intensities(directory.intensities, trainer.table, store.experiments)
    SavedIntegrator.of(integrator, store, trainer.epoch).write(directory.integrator)
    reflections = integrated_reflections(trainer)
    for number, (own, files) in enumerate(
        zip(directory.data_sets(), config.data_sets, strict=True)
    ):
        with replacing(own.merged) as temporary:
            temporary.write_bytes(own.epoch_mtz(trainer.epoch).read_bytes())
        write_integrated(trainer, reflections, own.integrated_refl, files)
        write_unmerged(trainer, own.unmerged, number, files)
    write_examples(trainer, directory.shoebox_examples, directory.dials / "integrated.refl")


def _save(trainer: Trainer, directory: RunDirectory) -> None:
    path: Path = directory.checkpoint(trainer.epoch)
    path.parent.mkdir(exist_ok=True)
    save_torch(path, trainer.state_dict())
    directory.mark_latest(trainer.epoch)


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Go back to a checkpoint.

    Raises
    ------
    UserError
        It is damaged, or holds the parameters of another model.
    """
    state = load_torch(checkpoint, REMEDY)
    try:
        trainer.load_state_dict(state)
    except Exception as error:  # of whatever a stranger's file holds in place of parameters
        raise UserError(
            f"{checkpoint} does not fit this version or these settings ({brief(error)[-200:]}); "
            "go on with the version that wrote it, or start anew in another --out"
        ) from error
