"""Files of the merged datasets: MTZ, half sets, statistics by shell."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from braggflux.merge.config import MergeConfig
from braggflux.merge.io.dataset_labels import DatasetLabels
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.sums import ObservationSums
from braggflux.merge.output.amplitudes import fresh_crystal_factor, scaled_observations
from braggflux.merge.output.datasets import MergedDataset, merged_datasets, streamed_datasets
from braggflux.merge.output.free_flags import FreeFlags
from braggflux.merge.output.statistics import write_statistics_csv
from braggflux.merge.prior.registry import prior_name
from braggflux.merge.problem import MergeProblem
from braggflux.merge.rows import UniqueRows
from braggflux.merge.stream.batches import ObservationStream
from braggflux.pipelines.merging.findings import model_rows, say_of_dataset
from braggflux.pipelines.merging.unmerged_output import ObservedRows
from braggflux.pipelines.workspace.merged_files import (
    HALF_SETS,
    first_line,
    write_half_sets,
    write_merged,
)

logger = logging.getLogger(__name__)

#: Of a spread from the median, times the root of the number of values.
MEDIAN_ERROR = 1.17


def check_free_flags(unique: UniqueRows, config: MergeConfig) -> None:
    """Refuse flags that cannot be those of every dataset, before anything is fitted.

    Raises
    ------
    UserError
    """
    free = FreeFlags.of(config)
    for asu in unique.asus:
        free.check(asu.cell, asu.space_group)


def write_problem(
    problem: MergeProblem,
    merger: Merger,
    config: MergeConfig,
    out: Path,
    labels: Sequence[DatasetLabels],
    observed: ObservedRows | None = None,
) -> list[Path]:
    """Write the files of each dataset; returns the merged MTZs' paths.

    Parameters
    ----------
    problem : MergeProblem
    merger : Merger
        On the CPU.
    config : MergeConfig
    out : Path
    labels : sequence of DatasetLabels
        Of each dataset.
    observed : ObservedRows, optional
        For the unmerged file; none of observations that are harmonics or indexed in several ways.
    """
    scaled = scaled_observations(merger, problem.table)
    if observed is not None:
        in_units = scaled.times(fresh_crystal_factor(merger))
        made_by = first_line("merge")
        for k, own in enumerate(labels):
            path = out / f"{_stem(problem.names, k)}unmerged.mtz"
            observed.write(path, problem, in_units, k, own, made_by)
    datasets = merged_datasets(
        merger,
        problem.table,
        problem.unique,
        scaled,
        n_splits=config.half_set_repeats,
        seed=config.seed,
        is_marginal=config.sigma != "difference",
    )
    return _write(datasets, merger, problem.unique, problem.names, labels, config, out)


def write_stream(
    merger: Merger,
    stream: ObservationStream,
    sums: ObservationSums,
    config: MergeConfig,
    out: Path,
) -> list[Path]:
    """Write merged MTZ, half sets and statistics of each store; returns the merged MTZs' paths.

    The halves are random halves of the images. R factors are about <F^2> of q(F), mates apart.
    """
    datasets = streamed_datasets(
        merger,
        stream.feature_scaling.unit_intensity,
        stream.unique,
        sums,
        is_marginal=config.sigma != "difference",
    )
    names = [store.name for store in stream.stores]
    labels = [stream.labels(k) for k in range(len(names))]
    return _write(datasets, merger, stream.unique, names, labels, config, out)


def _write(
    datasets: Iterable[MergedDataset],
    merger: Merger,
    unique: UniqueRows,
    names: Sequence[str],
    labels: Sequence[DatasetLabels],
    config: MergeConfig,
    out: Path,
) -> list[Path]:
    paths, made_by = [], f"merge, prior {prior_name(unique, config)}"
    free = FreeFlags.of(config)
    for k, dataset in enumerate(datasets):
        stem = _stem(names, k)
        paths.append(out / f"{stem}merged.mtz")
        write_merged(paths[-1], dataset, labels[k], made_by, free)
        write_half_sets(out / f"{stem}{HALF_SETS}", dataset, labels[k], made_by)
        _write_statistics(dataset, out / f"{stem}statistics.csv", names[k])
        expected = model_rows(merger, unique.rows(k))
        say_of_dataset(names[k], dataset.asu, dataset.table, *expected, config)
    return paths


def _stem(names: Sequence[str], dataset: int) -> str:
    """Begin the names of a dataset's files; with its number where another has the same name."""
    if len(names) == 1:
        return ""
    name = names[dataset]
    return f"{name}_" if names.count(name) == 1 else f"{name}_{dataset}_"


def _write_statistics(dataset: MergedDataset, path: Path, name: str) -> None:
    rows = dataset.statistics()
    write_statistics_csv(path, rows)
    overall = rows[-1]
    shown = ("completeness", "redundancy", "r_pim", "r_split", "cc_half", "cc_anom", "z_spread")
    logger.info(
        "%s: %s",
        name,
        " ".join(f"{k} {overall[k]:.4g}" for k in shown if overall[k] is not None),
    )
    if reason := doubt_of_cc_anom(overall):
        logger.warning("%s: %s", name, reason)


def doubt_of_cc_anom(overall: Mapping[str, float | int | str | None]) -> str | None:
    """Reason why CCanom is not to be believed; None where nothing speaks against it.

    Mean intensities and differences of two halves have the same noise. Where the differences agree
    better, in units of their errors, scales that have seen the mates apart have made them agree.

    Parameters
    ----------
    overall : mapping
        Row of :func:`braggflux.merge.output.statistics.shell_statistics`.
    """
    cc, n = overall["cc_anom"], overall["cc_anom_pairs"]
    spread, usual = overall["z_spread_anom"], overall["z_spread"]
    if None in (cc, spread, usual) or not usual or cc * n**0.5 < 3:
        return None
    ratio, error = spread / usual, MEDIAN_ERROR / n**0.5
    if ratio > 1 - max(0.1, 3 * error):
        return None
    return (
        f"CCanom {cc:.2f} is not confirmed: differences of the halves lie {ratio:.2f} times as "
        "far apart as their means do, in units of their errors; scales made them agree. Fit the "
        "scales anew, with fewer parameters"
    )
