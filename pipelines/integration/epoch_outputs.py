"""What is written after every epoch: merged MTZ, peak heights, statistics, one row of metrics."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from braggflux.merge.engine.amplitudes import (
    Amplitudes,
    merged_amplitudes,
    relative_responsibility,
)
from braggflux.merge.io.mtz import MergedTable, merged_table, write_merged_mtz
from braggflux.merge.output.half_sets import HalfSet, Observations, split_half_sets
from braggflux.merge.output.statistics import (
    possible_reflections,
    resolution_shells,
    shell_statistics,
    unique_reflections,
    write_statistics_csv,
)
from braggflux.pipelines.integration.trainer import EpochResult, Trainer
from braggflux.pipelines.maps.anomalous_peaks import AnomalousModel, SitePeak, amplitudes
from braggflux.pipelines.workspace.provenance import package_version
from braggflux.pipelines.workspace.rundir import RunDirectory

logger = logging.getLogger(__name__)

N_SHELLS = 10
NOT_TRAINED = "no training step yet"


@dataclass(frozen=True)
class MergedEpoch:
    """Merged data of an epoch: the table for files, and the two halves for statistics."""

    table: MergedTable
    observations: Observations


def merge_epoch(trainer: Trainer) -> MergedEpoch:
    """Merge all observations, and two random halves with the scales of all."""
    merger = trainer.model.merger
    batch = trainer.merge_input()
    value, variance, good = merger.scaled_observations(batch)
    refl_id = batch.refl_id.cpu().numpy()
    good, _ = relative_responsibility(good, batch.refl_id, len(merger.n_obs))
    # an outlier's variance is what its probability to be none leaves of its weight
    observations = Observations.of(
        trainer.problem.asu,
        refl_id,
        value.cpu().numpy(),
        (variance / good.clamp_min(1e-6)).cpu().numpy(),
    )
    # rows of the asymmetric unit keep the mates apart already
    half = split_half_sets(refl_id, np.ones_like(refl_id), trainer.config.training.seed)
    half = torch.as_tensor(half, device=value.device)
    parts = [merged_amplitudes(merger, batch, half == k) for k in (0, 1)]
    halves = {
        f"F{k + 1}": (_numpy(part.amplitude), _numpy(part.sigma_amplitude))
        for k, part in enumerate(parts)
    }
    whole = merged_amplitudes(merger, batch)
    return MergedEpoch(_table(trainer, whole, halves), observations)


def _table(
    trainer: Trainer, merged: Amplitudes, halves: dict[str, tuple[np.ndarray, np.ndarray]]
) -> MergedTable:
    return merged_table(
        trainer.problem.asu,
        _numpy(merged.amplitude),
        _numpy(merged.sigma_amplitude),
        _numpy(merged.intensity),
        _numpy(merged.sigma_intensity),
        merged.n_obs.cpu().numpy(),
        halves,
    )


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()


class EpochWriter:
    """Writes the outputs of every epoch into a run directory.

    Parameters
    ----------
    directory : RunDirectory
    trainer : Trainer
    anomalous : AnomalousModel or None
        Phases and sites; None when Bijvoet mates are merged.
    """

    def __init__(
        self, directory: RunDirectory, trainer: Trainer, anomalous: AnomalousModel | None
    ) -> None:
        self.directory = directory
        self.trainer = trainer
        self.anomalous = anomalous
        problem = trainer.problem
        self.unique = unique_reflections(problem.asu)
        self.possible = possible_reflections(problem.cell, problem.space_group, problem.asu.d_min)
        self.shells = resolution_shells(self.unique.inv_d2, N_SHELLS)

    def write(self, result: EpochResult) -> MergedEpoch:
        """Write everything of one epoch and log its line."""
        merged = merge_epoch(self.trainer)
        path = self.directory.epoch_mtz(result.epoch)
        path.parent.mkdir(exist_ok=True)
        self.write_mtz(path, merged, result.epoch)
        peaks = self._peaks(merged)
        if peaks:
            self.directory.write_peaks(result.epoch, peaks)
        rows = self.statistics(merged)
        write_statistics_csv(self.directory.statistics_file, rows)
        self.directory.append_metrics(self._metrics(result, rows, peaks))
        logger.info(summary_line(result, rows[-1], peaks))
        return merged

    def write_mtz(self, path, merged: MergedEpoch, epoch: int) -> None:
        """Write the merged MTZ of an epoch."""
        problem = self.trainer.problem
        write_merged_mtz(
            path,
            merged.table,
            problem.cell,
            problem.space_group,
            problem.wavelength,
            history=[
                f"braggflux {package_version()}, epoch {epoch}, "
                f"coupling {self.trainer.config.training.coupling}",
                "F: each mate from its own observations, Wilson prior alone",
            ],
        )

    def statistics(self, merged: MergedEpoch) -> list[dict]:
        """Shell statistics; half-set correlations from the merged halves."""
        asu = self.trainer.problem.asu
        table = merged.table
        halves = tuple(
            _spread(table, table.half_sets[name], len(self.unique), asu) for name in ("F1", "F2")
        )
        return shell_statistics(
            merged.observations, self.unique, self.shells, possible=self.possible, halves=halves
        )

    def _peaks(self, merged: MergedEpoch) -> list[SitePeak]:
        if self.anomalous is None:
            return []
        table = merged.table
        return self.anomalous.peak_heights(table.miller_index, *amplitudes(table))

    def _metrics(self, result: EpochResult, rows: list[dict], peaks: list[SitePeak]) -> dict:
        overall, outer = rows[-1], rows[-2]
        names = ("cc_half", "cc_anom", "r_pim", "completeness", "redundancy", "z_spread")
        metrics = dict(result.metrics)
        reasons = {key: NOT_TRAINED for key, value in metrics.items() if value is None}
        if "gpu_mem_mb" in reasons:
            reasons["gpu_mem_mb"] = "no GPU in use"
        shells = {name: (overall, name) for name in names} | {"cc_half_outer": (outer, "cc_half")}
        for key, (row, name) in shells.items():
            metrics[key] = row.get(name)
            if metrics[key] is None:
                reasons[key] = row.get("reason") or "not defined here"
        for peak in peaks:
            metrics[f"peak_sigma/{peak.label}"] = peak.peak_sigma
            if peak.peak_sigma is None:
                reasons[f"peak_sigma/{peak.label}"] = peak.reason
        for row in self.directory.read_peaks():
            if row["epoch"] == "DIALS":
                label = f"{row['chain']}/{row['residue']}{row['seqid']}:{row['atom']}"
                metrics[f"baseline/{label}"] = row["peak_sigma"]
        if reasons:
            metrics["reasons"] = reasons
        return metrics


def _spread(table: MergedTable, half: HalfSet, n_unique: int, asu) -> HalfSet:
    """Half set over all unique reflections from one over those that were observed."""
    rows = asu.refl_id(table.miller_index)  # the F(+) half of the table comes first
    columns = []
    for name in ("mean", "sigma", "plus", "sigma_plus", "minus", "sigma_minus"):
        full = np.full(n_unique, np.nan)
        full[rows] = getattr(half, name)
        columns.append(full)
    return HalfSet(*columns)


def summary_line(result: EpochResult, overall: dict, peaks: list[SitePeak]) -> str:
    """One line for the log: objective, half-set correlation and the highest peaks."""
    m = result.metrics
    parts = [f"epoch {result.epoch:3d}", f"merge elbo {m['merge_elbo']:.4f}/obs"]
    if m.get("pixel_nll") is not None:
        parts.append(f"pixel nll {m['pixel_nll']:.4f}/obs")
    if overall.get("cc_half") is not None:
        parts.append(f"CC1/2 {overall['cc_half']:.4f}")
    known = sorted((p for p in peaks if p.peak_sigma is not None), key=lambda p: -p.peak_sigma)
    if known:
        parts.append(
            "peaks " + " ".join(f"{p.residue}{p.seqid} {p.peak_sigma:.2f}" for p in known[:3])
        )
    parts.append(f"{m['wall_s']:.1f} s")
    return "  ".join(parts)
