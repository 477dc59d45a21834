"""Files of one merged dataset: MTZ with half sets, statistics by shell."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from integrator.crystal.reciprocal_asu import ReciprocalAsu
from merge.half_sets import HalfSet, Observations, split_half_sets
from merge.intensities.build import MergeProblem
from merge.intensities.config import IntensityMergeConfig
from merge.intensities.merger import IntensityMerger
from merge.intensities.output import (
    ScaledObservations,
    half_set_amplitudes,
    merged_rows,
    scaled_observations,
)
from merge.io.mtz import MergedTable, merged_table, write_merged_mtz
from merge.io.observations import UnmergedData
from merge.statistics import (
    possible_reflections,
    resolution_shells,
    shell_statistics,
    unique_reflections,
    write_statistics_csv,
)
from pipelines.provenance import package_version

logger = logging.getLogger(__name__)

N_SHELLS = 10


def write_dataset(
    problem: MergeProblem,
    merger: IntensityMerger,
    config: IntensityMergeConfig,
    dataset: int,
    out: Path,
    data: UnmergedData,
) -> Path:
    """Write the merged MTZ and the statistics of one dataset; returns the MTZ's path."""
    names, asu = problem.names, problem.unique.asus[dataset]
    rows = problem.unique.rows(dataset)
    scaled = scaled_observations(merger, problem.table)
    merged = merged_rows(merger, problem.table, scaled, is_marginal=config.sigma == "amplitude")
    halves = _half_sets(problem, merger, config, scaled, rows)
    table = merged_table(
        asu,
        *(
            getattr(merged, name).numpy()[rows]
            for name in ("amplitude", "sigma_amplitude", "intensity", "sigma_intensity", "n_obs")
        ),
        halves,
    )
    stem = "" if len(names) == 1 else f"{names[dataset]}_"
    path = out / f"{stem}merged.mtz"
    wavelength = data.wavelength
    write_merged_mtz(
        path,
        table,
        data.cell,
        data.space_group,
        1.0 if wavelength is None else float(np.median(wavelength)),
        history=[f"braggflux merge {package_version()}, prior {config.prior}"],
        normalised=_normalised(asu, table, merged.normalised.numpy()[rows]),
    )
    _write_statistics(asu, scaled, rows, table, out / f"{stem}statistics.csv", names[dataset])
    return path


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


def _normalised(asu: ReciprocalAsu, table: MergedTable, values: np.ndarray) -> np.ndarray:
    """E of each row of the table: of the mates together where there are two."""
    plus = asu.refl_id(table.miller_index)
    mates = np.stack([values[plus], values[asu.friedel_mate[plus]]])
    seen = np.stack([np.isfinite(table.f_plus), np.isfinite(table.f_minus)])
    seen |= ~seen.any(0)
    return (mates * seen).sum(0) / seen.sum(0)


def _write_statistics(
    asu: ReciprocalAsu,
    scaled: ScaledObservations,
    rows: slice,
    table: MergedTable,
    path: Path,
    name: str,
) -> None:
    row = scaled.row.numpy()
    inside = (row >= rows.start) & (row < rows.stop) & scaled.is_spot.numpy()
    observations = Observations.of(
        asu,
        row[inside] - rows.start,
        scaled.intensity.numpy()[inside],
        scaled.variance.numpy()[inside],
    )
    unique = unique_reflections(asu)
    halves = tuple(_spread(asu, table, table.half_sets[n], len(unique)) for n in ("F1", "F2"))
    statistics = shell_statistics(
        observations,
        unique,
        resolution_shells(unique.inv_d2, N_SHELLS),
        possible=possible_reflections(asu.cell, asu.space_group, asu.d_min),
        halves=halves,
    )
    write_statistics_csv(path, statistics)
    overall = statistics[-1]
    shown = ("completeness", "redundancy", "r_pim", "cc_half", "cc_anom", "z_spread")
    logger.info(
        "%s: %s",
        name,
        " ".join(f"{k} {overall[k]:.4g}" for k in shown if overall[k] is not None),
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
