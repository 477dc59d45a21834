"""Merging alone: unmerged reflections of any program to structure factors, with statistics."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import gemmi
import torch

from integrator.errors import UserError
from merge.intensities.build import MergeProblem, build_problem
from merge.intensities.config import IntensityMergeConfig
from merge.intensities.correlation import choose_correlation
from merge.intensities.held_out import predict, split
from merge.intensities.merger import IntensityMerger
from merge.intensities.saved_scale import FILE_NAME, SavedScale, load_scale, save_scale
from merge.intensities.training import fit, pool_trees, start, start_amplitudes
from merge.io.observations import UnmergedData, combine_friedel
from merge.io.unmerged_store import SUFFIX, UnmergedStore
from pipelines import log, provenance, schema
from pipelines.device import choose_device
from pipelines.merge_outputs import write_dataset
from pipelines.rundir import write_rows, write_text
from pipelines.stream_merging import merge_store
from pipelines.unmerged_dials import read_inputs

logger = logging.getLogger(__name__)

#: Share of the epochs that the last fit, to all observations, gets.
FINAL_SHARE = 0.25


@dataclass(frozen=True)
class MergeInputs:
    """What the command line names.

    ``parents`` has one dataset number or None of each dataset; None for no relation at all.
    ``space_group`` is for files that hold none (streams); ``freeze_scales`` an earlier merge whose
    scales are used.
    """

    paths: tuple[Path, ...]
    out: Path
    parents: tuple[int | None, ...] | None = None
    is_friedel: bool = False
    space_group: str | None = None
    freeze_scales: Path | None = None


def parse_parents(text: str | None) -> tuple[int | None, ...] | None:
    """Read ``none,0``.

    Raises
    ------
    UserError
    """
    if text is None:
        return None
    parents: list[int | None] = []
    for word in text.split(","):
        if word.strip().lower() == "none":
            parents.append(None)
        elif word.strip().isdigit():
            parents.append(int(word))
        else:
            raise UserError(
                f"--parents {text}: {word!r} is neither none nor the number of a dataset, "
                "counted from 0; give one of each, e.g. none,0"
            )
    return tuple(parents)


def parse_space_group(name: str | None) -> gemmi.SpaceGroup | None:
    """Look a space group up by its name.

    Raises
    ------
    UserError
    """
    if name is None:
        return None
    group = gemmi.find_spacegroup_by_name(name)
    if group is None:
        raise UserError(
            f"--space-group {name}: no such space group; give a Hermann-Mauguin symbol, "
            "e.g. P43212 or 'P 63'"
        )
    return group


def merge(inputs: MergeInputs, config: IntensityMergeConfig) -> list[Path]:
    """Read, fit, choose r, predict what was held out, fit again to all, and write.

    Returns
    -------
    list of Path
        Merged MTZ files in the order of the datasets.

    Raises
    ------
    UserError
    """
    device = choose_device(config.device)
    saved = None
    if inputs.freeze_scales is not None:
        saved = load_scale(inputs.freeze_scales)
        config = saved.configured(config)
    torch.manual_seed(config.seed)
    if _is_streamed(inputs, config):
        return [_merge_streamed(inputs, config, device, saved)]
    data = _read(inputs)
    standard = None if saved is None else saved.standard
    problem = build_problem(data, config, inputs.parents, standard)
    if saved is not None:
        saved.check(problem.table)
    _prepare(inputs, config)
    log.attach_file(inputs.out / "run.log")
    table = problem.table
    logger.info(
        "%d observations on %d images, %d unique reflections; metadata %s",
        len(table.observations),
        sum(table.images_of_dataset),
        len(problem.unique),
        " ".join(table.feature_names),
    )
    merger = _fit(problem, config, inputs.out, device, saved)
    paths = [write_dataset(problem, merger, config, k, inputs.out, d) for k, d in enumerate(data)]
    save_scale(inputs.out / FILE_NAME, merger, table, config)
    return paths


def _is_streamed(inputs: MergeInputs, config: IntensityMergeConfig) -> bool:
    """Stills in one store too large for memory."""
    if not config.stills or len(inputs.paths) != 1 or inputs.paths[0].suffix != SUFFIX:
        return False
    if not inputs.paths[0].is_file():
        return False
    with UnmergedStore(inputs.paths[0]) as store:
        return len(store) > config.stream_above


def _merge_streamed(
    inputs: MergeInputs,
    config: IntensityMergeConfig,
    device: torch.device,
    saved: SavedScale | None,
) -> Path:
    _prepare(inputs, config)
    log.attach_file(inputs.out / "run.log")
    with UnmergedStore(inputs.paths[0]) as store:
        result = merge_store(store, config, inputs.out, device, saved)
    _write_metrics(result.merger, result.predictions, inputs.out)
    save_scale(inputs.out / FILE_NAME, result.merger, result.sample, config)
    return result.path


def _read(inputs: MergeInputs) -> list[UnmergedData]:
    data = read_inputs(inputs.paths, space_group=parse_space_group(inputs.space_group))
    if not inputs.is_friedel:
        return data
    if len(data) != 2:
        raise UserError(
            f"--friedel takes the two Friedel halves of one crystal form, got {len(data)} "
            "dataset(s): give PLUS.mtz MINUS.mtz"
        )
    return [combine_friedel(*data)]


def _prepare(inputs: MergeInputs, config: IntensityMergeConfig) -> None:
    inputs.out.mkdir(parents=True, exist_ok=True)
    write_text(inputs.out / "config.yaml", schema.annotated_yaml(config))
    files = {f"input {i + 1}": path for i, path in enumerate(inputs.paths)}
    record = provenance.session_record() | {"inputs": provenance.input_records(files)}
    write_text(inputs.out / "provenance.json", json.dumps(record, indent=2) + "\n")


def _fit(
    problem: MergeProblem,
    config: IntensityMergeConfig,
    out: Path,
    device: torch.device,
    saved: SavedScale | None,
) -> IntensityMerger:
    """Return the fitted merger, on the CPU."""
    masks = split(problem.table, config.held_out, config.stills, config.seed)
    training = problem.table.with_masks(masks.is_used, masks.is_seen)
    merger = IntensityMerger(problem.unique, training, config).to(device)
    table, training = problem.table.to(device), training.to(device)
    if saved is None:
        start(merger, training)
    else:
        saved.load_into(merger)
        start_amplitudes(merger, training)
    with_scales = saved is None
    is_coupled = config.prior == "double-wilson" and len(merger.prior.child) > 0
    if config.prior == "double-wilson" and not is_coupled:
        raise UserError(
            "--prior double-wilson finds no amplitude with a relative; give --parents for "
            "datasets or --anomalous for Bijvoet mates"
        )
    merger.prior.is_coupled = is_coupled
    if is_coupled:
        pool_trees(merger)
    with log.progress("merging") as advance:
        fit(
            merger,
            training,
            config,
            with_scales=with_scales,
            observer=lambda e, _: advance(e, config.epochs),
        )
    if is_coupled:
        _set_correlation(merger, training, masks, config, out, with_scales)
    held = (("image", masks.by_image), ("observation", masks.by_observation))
    predictions = {name: asdict(predict(merger, training, chosen)) for name, chosen in held}
    epochs = max(1, round(FINAL_SHARE * config.epochs))
    fit(merger, table, config, epochs=epochs, with_scales=with_scales)
    _write_metrics(merger, predictions, out)
    return merger.to("cpu")


def _set_correlation(
    merger, training, masks, config: IntensityMergeConfig, out: Path, with_scales: bool
) -> None:
    if config.correlation is not None:
        merger.prior.one_minus_r2.fill_(1 - config.correlation**2)
    elif not config.held_out:
        raise UserError(
            "r is chosen by held-out data and held_out is 0; raise it or give --correlation"
        )
    else:
        held_out = (~masks.is_used).to(merger.device)
        rows = choose_correlation(merger, training, held_out, config)
        write_rows(out / "correlation.csv", rows, rows[0])
    pool_trees(merger)
    epochs = max(1, round(FINAL_SHARE * config.epochs))
    fit(merger, training, config, epochs=epochs, with_scales=with_scales)


def _write_metrics(merger: IntensityMerger, predictions: dict, out: Path) -> None:
    errors = merger.likelihood.error_parameters
    row = {"held_out": predictions, "error_model": errors}
    row["one_minus_r2"] = merger.prior.one_minus_r2.tolist() if merger.prior.is_coupled else None
    tensor = merger.prior.anisotropic_b()
    row["anisotropic_b"] = None if tensor is None else tensor.tolist()
    write_text(out / "metrics.json", json.dumps(row, indent=2) + "\n")
    logger.info("error model: %s", " ".join(f"{k} {v:.4g}" for k, v in errors.items()))
    for name, p in predictions.items():
        if p["cc_pred"] is not None:
            logger.info(
                "held out by %s: %d, CCpred %.4f, log-likelihood %.4f",
                *(name, p["n_obs"], p["cc_pred"], p["log_likelihood"]),
            )
