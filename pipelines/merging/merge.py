"""Merging alone: unmerged reflections of any program to structure factors, with statistics."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from braggflux.integrator.processes import Processes
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.steps import find_steps, without_rows
from braggflux.merge.model.saved_scale import FILE_NAME, SavedScale, load_scale, save_scale
from braggflux.merge.problem import MergeProblem, build_problem
from braggflux.pipelines.inputs.inputs import MergeInputs
from braggflux.pipelines.maps.reference_amplitudes import reference_amplitudes
from braggflux.pipelines.merging.findings import say_images, say_steps
from braggflux.pipelines.merging.images import write_images
from braggflux.pipelines.merging.in_memory import FixedInputs, MergeFit, check_coupling
from braggflux.pipelines.merging.indexing import (
    ambiguous_operators,
    image_numbers,
    wanted_indexing,
    write_choices,
)
from braggflux.pipelines.merging.metrics import write_metrics
from braggflux.pipelines.merging.outputs import check_free_flags, write_problem
from braggflux.pipelines.merging.settings import say_what_data_leave_idle, settled
from braggflux.pipelines.merging.streamed import is_streamed, merge_stores
from braggflux.pipelines.merging.unmerged_output import ObservedRows
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.device import choose_device
from braggflux.pipelines.workspace.lock import one_writer
from braggflux.pipelines.workspace.outputs import (
    IMAGES,
    MERGE_RESULTS,
    complete_merge,
    require_free_folder,
)
from braggflux.pipelines.workspace.rundir import write_rows

logger = logging.getLogger(__name__)


def merge(inputs: MergeInputs, config: MergeConfig) -> list[Path]:
    """Read, fit, and write.

    Started by ``torchrun``, the processes share the images of every step; the first one writes.

    Returns
    -------
    list of Path
        Merged MTZ files in the order of the datasets; none of the other processes.

    Raises
    ------
    UserError
    """
    processes = Processes.of_environment()
    log.leave_to_first(processes)
    device = choose_device(config.device, processes)
    if not processes.is_first:
        with tempfile.TemporaryDirectory() as out, processes.joined(device):
            _merge(replace(inputs, out=Path(out)), config, device, processes)
            processes.wait()
        return []
    with one_writer(inputs.out), processes.joined(device):
        complete_merge(inputs.out)
        try:
            written = inputs.close_folder(_merge(inputs, config, device, processes))
        finally:
            complete_merge(inputs.out)  # interrupted while it moved its files
            shutil.rmtree(inputs.unfinished, ignore_errors=True)
        processes.wait()
        return written


def _merge(
    inputs: MergeInputs, config: MergeConfig, device: torch.device, processes: Processes
) -> list[Path]:
    require_free_folder(inputs.out, MERGE_RESULTS)
    inputs.require_files(config)
    config = settled(
        config,
        inputs.parents,
        has_model=inputs.prior_model is not None,
        has_scales=inputs.freeze_scales is not None,
    )
    saved = None
    if inputs.freeze_scales is not None:
        saved = load_scale(inputs.freeze_scales)
        config = saved.configured(config)
    torch.manual_seed(config.seed)
    if is_streamed(inputs.paths, config):
        return merge_stores(inputs, config, device, saved, processes)
    return _merge_in_memory(inputs, config, device, saved, processes)


def _merge_in_memory(
    inputs: MergeInputs,
    config: MergeConfig,
    device: torch.device,
    saved: SavedScale | None,
    processes: Processes,
) -> list[Path]:
    data, out = inputs.read(is_laue=config.laue), inputs.unfinished
    operators = ambiguous_operators(data, config)
    feature_scaling = None if saved is None else saved.feature_scaling
    problem = build_problem(data, config, inputs.parents, operators, feature_scaling)
    steps = find_steps(problem, config)
    if steps.levels:
        say_steps(steps, problem.table, image_numbers(problem, data), problem.names)
        if len(steps.rows):
            data = without_rows(data, steps.rows)
            problem = build_problem(data, config, inputs.parents, operators, feature_scaling)
    number = image_numbers(problem, data)
    labels = [d.labels._replace(wavelength=d.typical_wavelength) for d in data]
    say_what_data_leave_idle(config, problem, data)
    observed = None
    if not config.laue and problem.ambiguity is None:
        observed = ObservedRows.of(data)
    del data  # nearly as large as the table
    check_coupling(problem.unique, config)
    check_free_flags(problem.unique, config)
    if saved is not None:
        saved.check(problem.table)
    f_calc = None
    if inputs.prior_model is not None:
        f_calc = torch.as_tensor(reference_amplitudes(inputs.prior_model, problem.unique.asus))
    known = FixedInputs(saved, f_calc, wanted_indexing(config, problem, f_calc))
    inputs.open_folder(config)
    _log_size(problem)
    fitted = MergeFit(problem, config, known, device, processes).run()
    if not processes.is_first:
        return []
    merger, problem = fitted.merger, fitted.problem
    for name, rows in fitted.tables.items():
        write_rows(out / f"{name}.csv", rows, rows[0])
    write_metrics(out / "metrics.json", merger, fitted.predictions, problem.ambiguity)
    if problem.ambiguity is not None:
        write_choices(problem, number, out / "indexing.csv")
    save_scale(out / FILE_NAME, merger, problem.table, config)
    write_images(merger, problem.table, number, problem.names, out / IMAGES)
    say_images(merger, problem.table, number, problem.names, config.stills)
    return write_problem(problem, merger, config, out, labels, observed)


def _log_size(problem: MergeProblem) -> None:
    table = problem.table
    logger.info(
        "%d observations on %d images, %d unique reflections; metadata %s",
        len(table.observations),
        sum(table.images_of_dataset),
        len(problem.unique),
        " ".join(table.feature_names),
    )
