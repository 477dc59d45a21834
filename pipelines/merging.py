"""Merging alone: unmerged reflections of any program to structure factors, with statistics."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import gemmi
import torch

from integrator.atomic import replacing
from integrator.errors import UserError
from merge.intensities.build import MergeProblem, build_problem
from merge.intensities.config import IntensityMergeConfig
from merge.intensities.correlation import choose_correlation
from merge.intensities.held_out import predict, split
from merge.intensities.merger import IntensityMerger
from merge.intensities.training import adopt, fit, pool_trees, start
from merge.io.observations import UnmergedData, combine_friedel
from pipelines import log, provenance, schema
from pipelines.merge_outputs import write_dataset
from pipelines.rundir import write_rows, write_text
from pipelines.unmerged_dials import read_inputs

logger = logging.getLogger(__name__)

#: Share of the epochs that the last fit, to all observations, gets.
FINAL_SHARE = 0.25


@dataclass(frozen=True)
class MergeInputs:
    """What the command line names.

    ``parents`` has one dataset number or None of each dataset; None for no relation at all.
    ``space_group`` is for files that hold none (streams).
    """

    paths: tuple[Path, ...]
    out: Path
    parents: tuple[int | None, ...] | None = None
    is_friedel: bool = False
    space_group: str | None = None


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
    data = _read(inputs)
    torch.manual_seed(config.seed)
    problem = build_problem(data, config, inputs.parents)
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
    merger = _fit(problem, config, inputs.out)
    paths = [write_dataset(problem, merger, config, k, inputs.out, d) for k, d in enumerate(data)]
    with replacing(inputs.out / "scale_model.pt") as temporary:
        torch.save(merger.state_dict(), temporary)
    return paths


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


def _fit(problem: MergeProblem, config: IntensityMergeConfig, out: Path) -> IntensityMerger:
    table = problem.table
    masks = split(table, config.held_out, config.stills, config.seed)
    training = table.with_masks(masks.is_used, masks.is_seen)
    merger = IntensityMerger(problem.unique, training, config)
    start(merger, training)
    is_coupled = config.prior == "double-wilson" and len(merger.prior.child) > 0
    if config.prior == "double-wilson" and not is_coupled:
        raise UserError(
            "--prior double-wilson finds no amplitude with a relative; give --parents for "
            "datasets or --anomalous for Bijvoet mates"
        )
    merger.prior.is_coupled = is_coupled
    if len(merger.prior.child):  # relatives start alike, coupled or not: each outvotes outliers
        pool_trees(merger)
    with log.progress("merging") as advance:
        fit(merger, training, config, observer=lambda e, _: advance(e, config.epochs))
    merger.scale.describe_unseen(training.observations.unit, training.observations.is_used)
    if is_coupled:
        _set_correlation(merger, training, masks, config, out)
    held = (("image", masks.by_image), ("observation", masks.by_observation))
    predictions = {name: asdict(predict(merger, training, chosen)) for name, chosen in held}
    adopt(merger, table, training)
    fit(merger, table, config, epochs=max(1, round(FINAL_SHARE * config.epochs)))
    _write_metrics(merger, predictions, out)
    return merger


def _set_correlation(merger, training, masks, config: IntensityMergeConfig, out: Path) -> None:
    if config.correlation is not None:
        merger.prior.one_minus_r2.fill_(1 - config.correlation**2)
    elif not config.held_out:
        raise UserError(
            "r is chosen by held-out data and held_out is 0; raise it or give --correlation"
        )
    else:
        rows = choose_correlation(merger, training, ~masks.is_used, config)
        write_rows(out / "correlation.csv", rows, rows[0])
    pool_trees(merger)
    fit(merger, training, config, epochs=max(1, round(FINAL_SHARE * config.epochs)))


def _write_metrics(merger: IntensityMerger, predictions: dict, out: Path) -> None:
    errors = merger.likelihood.error_parameters
    row = {"held_out": predictions, "error_model": errors}
    row["one_minus_r2"] = merger.prior.one_minus_r2.tolist() if merger.prior.is_coupled else None
    write_text(out / "metrics.json", json.dumps(row, indent=2) + "\n")
    logger.info("error model: %s", " ".join(f"{k} {v:.4g}" for k, v in errors.items()))
    for name, p in predictions.items():
        if p["cc_pred"] is not None:
            logger.info(
                "held out by %s: %d, CCpred %.4f, log-likelihood %.4f",
                *(name, p["n_obs"], p["cc_pred"], p["log_likelihood"]),
            )
