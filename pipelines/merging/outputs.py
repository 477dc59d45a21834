"""Files of one merged dataset: MTZ with half sets, statistics by shell."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import IntensityMergeConfig
from braggflux.merge.io.dataset_labels import DatasetLabels
from braggflux.merge.io.mtz import MergedTable, merged_table, write_merged_mtz
from braggflux.merge.model.merger import IntensityMerger
from braggflux.merge.output.amplitudes import (
    MergedRows,
    ScaledObservations,
    amplitudes_of_means,
    half_set_amplitudes,
    merged_rows,
    scaled_observations,
    with_amplitudes,
)
from braggflux.merge.output.half_sets import HalfSet, Observations, friedel_rows, split_half_sets
from braggflux.merge.output.statistics import (
    ReflectionSums,
    average_over_repeats,
    possible_reflections,
    resolution_shells,
    shell_statistics,
    unique_reflections,
    write_statistics_csv,
)
from braggflux.merge.problem import MergeProblem
from braggflux.merge.stream.batches import ObservationStream
from braggflux.merge.stream.sums import RowSums
from braggflux.pipelines.merging.findings import model_rows, say_of_dataset
from braggflux.pipelines.workspace.provenance import package_version

logger = logging.getLogger(__name__)

N_SHELLS = 10
#: Of a spread from the median, times the root of the number of values.
MEDIAN_ERROR = 1.17


def write_dataset(
    problem: MergeProblem,
    merger: IntensityMerger,
    config: IntensityMergeConfig,
    dataset: int,
    out: Path,
    labels: DatasetLabels,
) -> Path:
    """Write the merged MTZ and the statistics of one dataset; returns the MTZ's path."""
    names, asu = problem.names, problem.unique.asus[dataset]
    rows = problem.unique.rows(dataset)
    scaled = scaled_observations(merger, problem.table)
    merged = merged_rows(merger, problem.table, scaled, is_marginal=config.sigma != "difference")
    halves = _half_sets(problem, merger, config, scaled, rows)
    n_obs = merged.n_obs.numpy()[rows]
    table = merged_table(
        asu,
        *(
            getattr(merged, name).numpy()[rows]
            for name in ("amplitude", "sigma_amplitude", "intensity", "sigma_intensity")
        ),
        n_obs,
        halves,
    )
    stem = _stem(names, dataset)
    path = out / f"{stem}merged.mtz"
    normalised = merged.normalised.numpy()[rows]
    _write_mtz(path, asu, table, normalised, labels, config)
    evidence = _observations(asu, scaled, rows)
    _write_statistics(asu, evidence, table, out / f"{stem}statistics.csv", names[dataset])
    say_of_dataset(names[dataset], asu, table, *model_rows(merger, rows), config)
    return path


def write_stream(
    merger: IntensityMerger,
    stream: ObservationStream,
    sums: RowSums,
    config: IntensityMergeConfig,
    out: Path,
) -> list[Path]:
    """Write a merged MTZ and the statistics of each store; returns the MTZs' paths.

    The halves are random halves of the images. R factors are about <F^2> of q(F), mates apart.
    """
    unit = stream.standard.unit_intensity

    def in_units_of_the_file(half: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        mean, sigma = sums.mean(half)
        return mean.cpu() * unit, sigma.cpu() * unit

    merged = with_amplitudes(
        merger,
        unit,
        *in_units_of_the_file(None),
        sums["n"].cpu().long(),
        config.sigma != "difference",
    )
    intensities = [in_units_of_the_file(half) for half in (0, 1)]
    halves = {
        f"F{half + 1}": tuple(
            values.numpy() for values in amplitudes_of_means(merger, unit, *intensities[half])
        )
        for half in (0, 1)
    }
    columns = ("amplitude", "sigma_amplitude", "intensity", "sigma_intensity", "n_obs")
    paths, all_names = [], [store.name for store in stream.stores]
    for k, (asu, store) in enumerate(zip(stream.unique.asus, stream.stores, strict=True)):
        rows = stream.unique.rows(k)
        table = merged_table(
            asu,
            *(getattr(merged, name).numpy()[rows] for name in columns),
            {name: tuple(x[rows] for x in half) for name, half in halves.items()},
        )
        stem = _stem(all_names, k)
        paths.append(out / f"{stem}merged.mtz")
        normalised = merged.normalised.numpy()[rows]
        _write_mtz(paths[-1], asu, table, normalised, stream.labels(k), config)
        pair = tuple(HalfSet.of(asu, *(x.numpy()[rows] for x in half)) for half in intensities)
        evidence = _reflection_sums(asu, sums, merged, rows)
        _write_statistics(asu, evidence, table, out / f"{stem}statistics.csv", store.name, pair)
        say_of_dataset(store.name, asu, table, *model_rows(merger, rows), config)
    return paths


def _stem(names: Sequence[str], dataset: int) -> str:
    """Begin the names of a dataset's files; with its number where another has the same name."""
    if len(names) == 1:
        return ""
    name = names[dataset]
    return f"{name}_" if names.count(name) == 1 else f"{name}_{dataset}_"


def _write_mtz(
    path: Path,
    asu: ReciprocalAsu,
    table: MergedTable,
    normalised: np.ndarray,
    labels: DatasetLabels,
    config: IntensityMergeConfig,
) -> None:
    if labels.wavelength is None:
        logger.warning(
            "%s: the input does not know its wavelength; 0 is written, which MTZ has for unknown",
            path.name,
        )
    write_merged_mtz(
        path,
        table,
        asu.cell,
        asu.space_group,
        labels.wavelength or 0.0,
        history=[f"braggflux merge {package_version()}, prior {config.prior}"],
        names=labels.names,
        title=labels.title,
        mean_intensity="I",
        extra=_extra_columns(asu, table, normalised),
    )


def _reflection_sums(
    asu: ReciprocalAsu, sums: RowSums, merged: MergedRows, rows: slice
) -> ReflectionSums:
    """Join the Friedel mates of the sums over the rows of one dataset."""
    plus, minus = friedel_rows(asu)

    def both(values: np.ndarray) -> np.ndarray:
        return values[plus] + np.where(minus >= 0, values[minus], 0)

    n = merged.n_obs.numpy()[rows]
    half = HalfSet.of(asu, merged.intensity.numpy()[rows], merged.sigma_intensity.numpy()[rows])
    return ReflectionSums(
        half.mean,
        half.sigma,
        both(n),
        n[plus],
        np.where(minus >= 0, n[minus], 0),
        both(sums["deviation"].cpu().numpy()[rows]),
        both(sums["intensity"].cpu().numpy()[rows]),
    )


def _half_sets(
    problem: MergeProblem,
    merger: IntensityMerger,
    config: IntensityMergeConfig,
    scaled: ScaledObservations,
    rows: slice,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Amplitudes of random halves: F1 and F2, then F3 and F4 of the next split."""
    halves = {}
    for repeat in range(config.half_set_repeats):
        row = scaled.row.numpy()
        half = torch.as_tensor(split_half_sets(row, np.ones_like(row), config.seed + repeat))
        for k in (0, 1):
            value, sigma = half_set_amplitudes(merger, problem.table, scaled, half == k)
            halves[f"F{2 * repeat + k + 1}"] = value.numpy()[rows], sigma.numpy()[rows]
    return halves


def _extra_columns(
    asu: ReciprocalAsu, table: MergedTable, normalised: np.ndarray
) -> list[tuple[str, str, np.ndarray]]:
    """E, and N of both mates together where they are apart."""
    columns = [("E", "E", _normalised(asu, table, normalised))]
    if table.is_anomalous:
        columns.append(("N", "I", np.nansum([table.n_plus, table.n_minus], axis=0)))
    return columns


def _normalised(asu: ReciprocalAsu, table: MergedTable, values: np.ndarray) -> np.ndarray:
    """E of each row of the table: of the mates together where there are two."""
    plus = asu.refl_id(table.miller_index)
    mates = np.stack([values[plus], values[asu.friedel_mate[plus]]])
    seen = np.stack([np.isfinite(table.f_plus), np.isfinite(table.f_minus)])
    seen |= ~seen.any(0)
    return (mates * seen).sum(0) / seen.sum(0)


def _observations(asu: ReciprocalAsu, scaled: ScaledObservations, rows: slice) -> Observations:
    """Observations of one dataset with the Friedel mates joined."""
    row = scaled.row.numpy()
    inside = (row >= rows.start) & (row < rows.stop) & scaled.is_spot.numpy()
    return Observations.of(
        asu,
        row[inside] - rows.start,
        scaled.intensity.numpy()[inside],
        scaled.variance.numpy()[inside],
    )


def _write_statistics(
    asu: ReciprocalAsu,
    observations: Observations | ReflectionSums,
    table: MergedTable,
    path: Path,
    name: str,
    intensity_halves: tuple[HalfSet, HalfSet] | None = None,
) -> None:
    unique = unique_reflections(asu)
    shells = resolution_shells(unique.inv_d2, N_SHELLS)
    possible = possible_reflections(asu.cell, asu.space_group, asu.d_min)
    halves = [_spread(asu, table, half, len(unique)) for half in table.half_sets.values()]
    statistics = average_over_repeats(
        [
            shell_statistics(
                observations,
                unique,
                shells,
                possible=possible,
                halves=pair,
                intensity_halves=intensity_halves,
            )
            for pair in zip(halves[::2], halves[1::2], strict=True)
        ]
    )
    write_statistics_csv(path, statistics)
    overall = statistics[-1]
    shown = ("completeness", "redundancy", "r_pim", "r_split", "cc_half", "cc_anom", "z_spread")
    logger.info(
        "%s: %s",
        name,
        " ".join(f"{k} {overall[k]:.4g}" for k in shown if overall[k] is not None),
    )
    if reason := doubt_of_cc_anom(overall):
        logger.warning("%s: %s", name, reason)


def doubt_of_cc_anom(overall: Mapping[str, float | int | str | None]) -> str | None:
    """Say why CCanom is not to be believed; None where nothing speaks against it.

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


def _spread(asu: ReciprocalAsu, table: MergedTable, half: HalfSet, n_unique: int) -> HalfSet:
    """Half set over all unique reflections from one over those observed."""
    rows = asu.refl_id(table.miller_index)  # the F(+) half of the table comes first
    columns = []
    for name in ("mean", "sigma", "plus", "sigma_plus", "minus", "sigma_minus"):
        full = np.full(n_unique, np.nan)
        full[rows] = getattr(half, name)
        columns.append(full)
    return HalfSet(*columns)
