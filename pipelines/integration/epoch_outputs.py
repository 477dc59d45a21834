"""Outputs of every epoch: merged MTZ, peak heights, statistics, one row of metrics."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from braggflux.merge.io.dataset_labels import MAX_TITLE, DatasetLabels, DatasetNames
from braggflux.merge.output.amplitudes import used_observations
from braggflux.merge.output.datasets import MergedDataset, merged_datasets
from braggflux.merge.output.free_flags import FreeFlags
from braggflux.merge.output.statistics import write_statistics_csv
from braggflux.pipelines.integration.trainer import EpochResult, Trainer
from braggflux.pipelines.maps.anomalous_peaks import COUPLED, AnomalousModel, SitePeak
from braggflux.pipelines.workspace.merged_files import write_half_sets, write_merged
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory

logger = logging.getLogger(__name__)

NOT_TRAINED = "no training step yet"


def merge_epoch(trainer: Trainer) -> list[MergedDataset]:
    """Merge all observations of each data set, and two random halves with the scales of all."""
    problem, table = trainer.problem, trainer.merge_table()
    scaled = used_observations(trainer.model.merger, table)
    datasets = merged_datasets(
        trainer.model.merger,
        table,
        problem.merging.unique,
        scaled,
        seed=trainer.config.training.seed,
        is_marginal=problem.is_marginal,
    )
    return list(datasets)


class EpochWriter:
    """Writes the outputs of every epoch into a run directory.

    Parameters
    ----------
    directory : RunDirectory
    trainer : Trainer
    anomalous : sequence of AnomalousModel
        Phases and sites for each data set; empty where no peaks can be had.
    """

    def __init__(
        self, directory: RunDirectory, trainer: Trainer, anomalous: Sequence[AnomalousModel]
    ) -> None:
        self.directory = directory
        self.trainer = trainer
        self.anomalous = anomalous
        self.free = FreeFlags.of(trainer.config.merge)

    def write(self, result: EpochResult) -> list[MergedDataset]:
        """Write everything of one epoch and log its line."""
        datasets, metrics = merge_epoch(self.trainer), _of_training(result)
        for number, (name, merged) in enumerate(
            zip(self.trainer.problem.names, datasets, strict=True)
        ):
            own = RunDirectory(self.directory.path, name)
            self._write_files(own, merged, result.epoch)
            rows, peaks = merged.statistics(), []
            write_statistics_csv(own.statistics_file, rows)
            if self.anomalous:
                peaks = self.anomalous[number].score(merged.table)
            if peaks:
                own.write_peaks(result.epoch, peaks)
            _add_of_data_set(metrics, own, rows, peaks)
            n_epochs = self.trainer.config.training.epochs
            logger.info(summary_line(result, rows[-1], peaks, n_epochs, name))
        logger.debug(_objective(result))
        self.directory.append_metrics(metrics)
        return datasets

    def _write_files(self, own: RunDirectory, merged: MergedDataset, epoch: int) -> None:
        path = own.epoch_mtz(epoch)
        path.parent.mkdir(exist_ok=True)
        labels = labels_of(self.trainer, own.dataset)
        coupling = self.trainer.config.training.coupling
        made_by = f"run, coupling {coupling}, epoch {epoch}"
        write_merged(path, merged, labels, made_by, self.free)
        write_half_sets(own.half_sets, merged, labels, made_by)


def labels_of(trainer: Trainer, dataset: str) -> DatasetLabels:
    """Name, title and wavelength of a data set; its name is that of its EXPT."""
    expt = trainer.config.expt
    name = dataset or ("" if expt is None else expt.stem)
    names = DatasetNames(dataset=name or DatasetNames().dataset)
    title = f"{name}: integrated and merged by braggflux"[:MAX_TITLE]
    return DatasetLabels(names, title, trainer.problem.wavelength(dataset))


def _of_training(result: EpochResult) -> dict[str, Any]:
    """Begin a row of metrics with what the trainer knows."""
    metrics = dict(result.metrics)
    reasons = {key: NOT_TRAINED for key, value in metrics.items() if value is None}
    if "gpu_mem_mb" in reasons:
        reasons["gpu_mem_mb"] = "no GPU in use"
    return metrics | ({"reasons": reasons} if reasons else {})


def _add_of_data_set(
    metrics: dict[str, Any], own: RunDirectory, rows: list[dict], peaks: list[SitePeak]
) -> None:
    """Add the statistics and peaks of one data set, in place; of several, under its name."""
    overall, outer = rows[-1], rows[-2]
    of = f"/{own.dataset}" if own.dataset else ""
    reasons = metrics.setdefault("reasons", {})
    names = ("cc_half", "cc_anom", "r_pim", "completeness", "redundancy", "z_spread")
    shells = {name: (overall, name) for name in names} | {"cc_half_outer": (outer, "cc_half")}
    for key, (row, name) in shells.items():
        metrics[key + of] = row.get(name)
        if metrics[key + of] is None:
            reasons[key + of] = row.get("reason") or "not defined here"
    for peak in peaks:
        metrics[f"peak_sigma{of}/{peak.label}"] = peak.peak_sigma
        if peak.peak_sigma is None:
            reasons[f"peak_sigma{of}/{peak.label}"] = peak.reason
        if peak.difference == COUPLED:
            metrics[f"peak_sigma_own{of}/{peak.label}"] = peak.peak_sigma_own
    for row in own.read_peaks():
        if row["epoch"] == REFERENCE:
            label = f"{row['chain']}/{row['residue']}{row['seqid']}:{row['atom']}"
            metrics[f"baseline{of}/{label}"] = row["peak_sigma"]
    if not reasons:
        del metrics["reasons"]


def summary_line(
    result: EpochResult, overall: dict[str, Any], peaks: list[SitePeak], n_epochs: int, name: str
) -> str:
    """One line for the log: quality of the data, the highest peaks, and the time left.

    Parameters
    ----------
    result : EpochResult
    overall : dict
        Statistics of all shells together.
    peaks : list of SitePeak
    n_epochs : int
        Number of the last epoch.
    name : str
        Of the data set, where there are several.
    """
    parts = [f"epoch {result.epoch}/{n_epochs}", *([name] if name else [])]
    for key, label in (("r_pim", "R_pim"), ("cc_half", "CC1/2"), ("cc_anom", "CCanom")):
        if overall.get(key) is not None:
            parts.append(f"{label} {overall[key]:.{4 if key == 'cc_half' else 3}f}")
    known = sorted((p for p in peaks if p.peak_sigma is not None), key=lambda p: -p.peak_sigma)
    if known:
        parts.append(
            "peaks " + " ".join(f"{p.residue}{p.seqid} {p.peak_sigma:.2f}" for p in known[:3])
        )
    seconds = result.metrics["wall_s"]
    parts.append(f"{seconds:.1f} s")
    # epoch 0 has no training step, so that its time says nothing of the others'
    if 0 < result.epoch < n_epochs:
        parts.append(f"about {_duration(seconds * (n_epochs - result.epoch))} left")
    return "  ".join(parts)


def _objective(result: EpochResult) -> str:
    """Terms of the ELBO, for those who follow the optimisation."""
    m = result.metrics
    text = f"epoch {result.epoch}: merge elbo {m['merge_elbo']:.4f} nats/observation"
    if m.get("pixel_nll") is not None:
        text += f", pixel nll {m['pixel_nll']:.4f} nats/observation"
    return text


def _duration(seconds: float) -> str:
    """Time in the unit that people would say it in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
