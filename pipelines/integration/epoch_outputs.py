"""Outputs of every epoch: merged MTZ, peak heights, statistics, one row of metrics."""

from __future__ import annotations

import logging

from braggflux.merge.io.dataset_labels import DatasetLabels
from braggflux.merge.output.amplitudes import used_observations
from braggflux.merge.output.datasets import MergedDataset, merged_datasets
from braggflux.merge.output.merged_table import MergedTable
from braggflux.merge.output.statistics import write_statistics_csv
from braggflux.pipelines.integration.trainer import EpochResult, Trainer
from braggflux.pipelines.maps.anomalous_peaks import COUPLED, AnomalousModel, SitePeak
from braggflux.pipelines.workspace.merged_files import write_half_sets, write_merged
from braggflux.pipelines.workspace.rundir import RunDirectory

logger = logging.getLogger(__name__)

NOT_TRAINED = "no training step yet"


def merge_epoch(trainer: Trainer) -> MergedDataset:
    """Merge all observations, and two random halves with the scales of all."""
    problem, table = trainer.problem, trainer.merge_table()
    scaled = used_observations(trainer.model.merger, table)
    (dataset,) = merged_datasets(
        trainer.model.merger,
        table,
        problem.merging.unique,
        scaled,
        seed=trainer.config.training.seed,
    )
    return dataset


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

    def write(self, result: EpochResult) -> MergedDataset:
        """Write everything of one epoch and log its line."""
        merged = merge_epoch(self.trainer)
        path = self.directory.epoch_mtz(result.epoch)
        path.parent.mkdir(exist_ok=True)
        labels = DatasetLabels(wavelength=self.trainer.problem.wavelength)
        coupling = self.trainer.config.training.coupling
        made_by = f"run, coupling {coupling}, epoch {result.epoch}"
        write_merged(path, merged, labels, made_by)
        write_half_sets(self.directory.half_sets, merged, labels, made_by)
        peaks = self._peaks(merged.table)
        if peaks:
            self.directory.write_peaks(result.epoch, peaks)
        rows = merged.statistics()
        write_statistics_csv(self.directory.statistics_file, rows)
        self.directory.append_metrics(self._metrics(result, rows, peaks))
        logger.info(summary_line(result, rows[-1], peaks))
        return merged

    def _peaks(self, table: MergedTable) -> list[SitePeak]:
        if self.anomalous is None:
            return []
        return self.anomalous.score(table)

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
            if peak.difference == COUPLED:
                metrics[f"peak_sigma_own/{peak.label}"] = peak.peak_sigma_own
        for row in self.directory.read_peaks():
            if row["epoch"] == "DIALS":
                label = f"{row['chain']}/{row['residue']}{row['seqid']}:{row['atom']}"
                metrics[f"baseline/{label}"] = row["peak_sigma"]
        if reasons:
            metrics["reasons"] = reasons
        return metrics


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
