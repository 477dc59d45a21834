"""From a fitted merger to what is written of each dataset: the one way, whatever was merged.

Rotation, Laue and stills in memory, stores that are read batch by batch, and the joint run all end
in a list of :class:`MergedDataset`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.sums import ObservationSums
from braggflux.merge.output.amplitudes import (
    MergedRows,
    ScaledObservations,
    amplitudes_of_means,
    fresh_crystal_factor,
    merged_rows,
    weighted_mean,
    with_amplitudes,
)
from braggflux.merge.output.coupled_difference import ties_mates_only
from braggflux.merge.output.half_sets import (
    HalfSet,
    ScaledReflections,
    friedel_rows,
    split_half_sets,
)
from braggflux.merge.output.merged_table import DIFFERENCE, MergedTable, merged_table
from braggflux.merge.output.statistics import (
    ReflectionSums,
    Row,
    average_over_repeats,
    possible_reflections,
    resolution_shells,
    shell_statistics,
    unique_reflections,
)
from braggflux.merge.prior.reference import Reference
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.rows import UniqueRows

Array = NDArray[np.float64]

N_SHELLS = 10


@dataclass(frozen=True)
class MergedDataset:
    """One dataset, merged.

    Parameters
    ----------
    asu : ReciprocalAsu
    table : MergedTable
    half_sets : dict of str to HalfSet
        Amplitudes of random halves over all U reflections of ``asu``, mates joined: F1 and F2 of
        one split, F3 and F4 of the next.
    evidence : ScaledReflections or ReflectionSums
        What the statistics are of.
    intensity_halves : tuple of HalfSet, optional
        Where ``evidence`` are sums.
    history : tuple of str
        What the columns are.
    """

    asu: ReciprocalAsu
    table: MergedTable
    half_sets: dict[str, HalfSet]
    evidence: ScaledReflections | ReflectionSums
    intensity_halves: tuple[HalfSet, HalfSet] | None = None
    history: tuple[str, ...] = ()

    def statistics(self) -> list[Row]:
        """Statistics of each resolution shell and of all, averaged over the splits."""
        asu, unique = self.asu, unique_reflections(self.asu)
        halves = list(self.half_sets.values())
        return average_over_repeats(
            [
                shell_statistics(
                    self.evidence,
                    unique,
                    resolution_shells(unique.inv_d2, N_SHELLS),
                    possible=possible_reflections(asu.cell, asu.space_group, asu.d_min),
                    halves=pair,
                    intensity_halves=self.intensity_halves,
                )
                for pair in zip(halves[::2], halves[1::2], strict=True)
            ]
        )


def merged_datasets(
    merger: Merger,
    table: ObservationTable,
    unique: UniqueRows,
    scaled: ScaledObservations,
    *,
    n_splits: int = 1,
    seed: int = 0,
    is_marginal: bool = True,
) -> Iterator[MergedDataset]:
    """Merge observations in memory.

    Parameters
    ----------
    merger : Merger
        Fitted.
    table : ObservationTable
    unique : UniqueRows
    scaled : ScaledObservations
        Of ``table`` (:func:`braggflux.merge.output.amplitudes.scaled_observations`).
    n_splits : int
        Random splits into halves.
    seed : int
        Of the first split.
    is_marginal : bool
        See :func:`braggflux.merge.output.amplitudes.with_amplitudes`.
    """
    unit, n_rows = table.unit_intensity, len(unique)
    fresh = fresh_crystal_factor(merger)
    merged = merged_rows(merger, table, scaled, is_marginal=is_marginal).times(fresh)
    row = scaled.row.cpu().numpy()
    halves = []
    for repeat in range(n_splits):
        half = split_half_sets(row, np.ones_like(row), seed + repeat)
        for k in (0, 1):
            chosen = torch.as_tensor(half == k, device=scaled.row.device)
            part = amplitudes_of_means(merger, unit, *weighted_mean(scaled, n_rows, chosen))
            halves.append((part[0] * fresh.sqrt(), part[1] * fresh.sqrt()))
    scaled = scaled.times(fresh)
    history = what_columns_are(merger, is_marginal)
    for dataset, asu in enumerate(unique.asus):
        rows = unique.rows(dataset)
        yield MergedDataset(
            asu,
            _table(asu, merged, rows),
            _half_sets(asu, halves, rows),
            _evidence(asu, scaled, rows),
            history=history,
        )


def streamed_datasets(
    merger: Merger,
    unit_intensity: float,
    unique: UniqueRows,
    sums: ObservationSums,
    *,
    is_marginal: bool = True,
) -> Iterator[MergedDataset]:
    """Merge observations that are known by their sums; the halves are random halves of the images.

    Parameters
    ----------
    merger : Merger
        On the CPU.
    unit_intensity : float
        Of the merger, in units of the files.
    unique : UniqueRows
    sums : ObservationSums
    is_marginal : bool
        See :func:`braggflux.merge.output.amplitudes.with_amplitudes`.
    """

    def in_units_of_the_file(half: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        mean, sigma = sums.mean(half)
        return mean.cpu() * unit_intensity, sigma.cpu() * unit_intensity

    mean, n_obs = in_units_of_the_file(None), sums["n"].cpu().long()
    merged = with_amplitudes(merger, unit_intensity, *mean, n_obs, is_marginal=is_marginal)
    intensities = [in_units_of_the_file(half) for half in (0, 1)]
    halves = [amplitudes_of_means(merger, unit_intensity, *half) for half in intensities]
    history = what_columns_are(merger, is_marginal)
    for dataset, asu in enumerate(unique.asus):
        rows = unique.rows(dataset)
        one, other = (HalfSet.of(asu, *_numpy(half, rows)) for half in intensities)
        yield MergedDataset(
            asu,
            _table(asu, merged, rows),
            _half_sets(asu, halves, rows),
            _sums(asu, sums, merged, rows),
            (one, other),
            history,
        )


def what_columns_are(merger: Merger, is_marginal: bool = True) -> tuple[str, ...]:
    """Lines for the history of the files."""
    return (*_what_amplitudes_are(merger, is_marginal), *_dose(merger))


def _dose(merger: Merger) -> tuple[str, ...]:
    """Say what B the amplitudes were given back, where there was damage."""
    one = merger.prior.part(Wilson).inv_d2.new_ones(1)
    b = 2 * float(merger.scale.fresh_crystal_factor(one).log())
    if b == 0.0:
        return ()
    return (f"F, I of the crystal before the scan: B less by {b:.3f} A^2 than at the mean dose",)


def _what_amplitudes_are(merger: Merger, is_marginal: bool) -> tuple[str, ...]:
    prior = merger.prior
    own = "the prior of a model" if prior.has(Reference) else "Wilson's prior"
    if not prior.is_coupled:
        return (f"F F(+) F(-): each from its own observations, with {own}",)
    if ties_mates_only(merger):
        return (f"F F(+) F(-): each mate from its own observations, with {own}", *DIFFERENCE)
    width = "of F alone" if is_marginal else "of the difference to the relatives"
    lines = (f"F F(+) F(-): given the relatives in other datasets (parents); SIGF {width}",)
    has_tied_mates = any(
        bool((merger.joined[rows] == above).any()) for rows, above in prior.levels
    )
    return lines + DIFFERENCE * has_tied_mates


def _table(asu: ReciprocalAsu, merged: MergedRows, rows: slice) -> MergedTable:
    own = MergedRows(**{k: v.cpu()[rows] for k, v in vars(merged).items()})
    return merged_table(
        asu,
        own.amplitude,
        own.sigma_amplitude,
        own.intensity,
        own.sigma_intensity,
        own.n_obs,
        (own.difference, own.sigma_difference, own.merit),
        own.normalised,
    )


def _half_sets(
    asu: ReciprocalAsu, halves: list[tuple[torch.Tensor, torch.Tensor]], rows: slice
) -> dict[str, HalfSet]:
    return {f"F{k}": HalfSet.of(asu, *_numpy(half, rows)) for k, half in enumerate(halves, 1)}


def _numpy(values: tuple[torch.Tensor, torch.Tensor], rows: slice) -> tuple[Array, Array]:
    return values[0].cpu().numpy()[rows], values[1].cpu().numpy()[rows]


def _evidence(asu: ReciprocalAsu, scaled: ScaledObservations, rows: slice) -> ScaledReflections:
    """Observations of one dataset with the Friedel mates joined."""
    row, is_spot = scaled.row.cpu().numpy(), scaled.is_spot.cpu().numpy()
    inside = (row >= rows.start) & (row < rows.stop) & is_spot
    return ScaledReflections.of(
        asu,
        row[inside] - rows.start,
        scaled.intensity.cpu().numpy()[inside],
        scaled.variance.cpu().numpy()[inside],
    )


def _sums(
    asu: ReciprocalAsu, sums: ObservationSums, merged: MergedRows, rows: slice
) -> ReflectionSums:
    """Join the Friedel mates of the sums over the rows of one dataset."""
    plus, minus = friedel_rows(asu)

    def both(values: NDArray[Any]) -> NDArray[Any]:
        return values[plus] + np.where(minus >= 0, values[minus], 0)

    n = merged.n_obs.numpy()[rows]
    half = HalfSet.of(asu, *_numpy((merged.intensity, merged.sigma_intensity), rows))
    return ReflectionSums(
        half.mean,
        half.sigma,
        both(n),
        n[plus],
        np.where(minus >= 0, n[minus], 0),
        both(sums["deviation"].cpu().numpy()[rows]),
        both(sums["intensity"].cpu().numpy()[rows]),
    )
