"""Outputs at the end of a run: integrated.refl and unmerged.mtz."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from braggflux.integrator.crystal.corrections import quantum_efficiency
from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    read_experiments,
    to_array_index,
    write_experiments,
    write_reflections,
)
from braggflux.integrator.io.dials.sweeps import sweeps_of
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.types import Flag, IntensityTable
from braggflux.merge.io.mtz import UnmergedTable, write_unmerged_mtz
from braggflux.merge.output.amplitudes import fresh_crystal_factor, used_observations
from braggflux.pipelines.config.run import DataSetFiles
from braggflux.pipelines.integration.data_sets import sweeps_of_set
from braggflux.pipelines.integration.epoch_outputs import labels_of
from braggflux.pipelines.integration.spot_measures import SpotMeasures, measure_spots
from braggflux.pipelines.integration.trainer import Trainer
from braggflux.pipelines.workspace.merged_files import first_line


def integrated_reflections(trainer: Trainer) -> ReflectionTable:
    """Our observations as a DIALS table of integrated reflections.

    ``intensity.prf`` is the maximum of the photon-count likelihood, of the whole spot, and
    ``intensity.sum`` the plain sum of what the scan recorded of it: both raw photons, before L/P,
    and free of any prior. ``xyzobs`` is where the photons fell. Rows that were not integrated
    hold their prediction and zeros.

    Parameters
    ----------
    trainer : Trainer

    Returns
    -------
    ReflectionTable
        Rows as in the store; frames counted from the start of each scan.
    """
    store, table, measured = trainer.problem.store, trainer.table, measure_spots(trainer)
    usable, metadata = table.is_integrated.numpy(), table.metadata
    # variance expected at the estimate: an observed count of 0 is not known without error
    variance = table.likelihood.variance(table.intensity)
    xyz, xyz_mm = metadata.xyz_px.double().numpy(), metadata.xyz_mm.double().numpy()
    value = np.where(usable, table.intensity.double().numpy(), 0.0)
    variance = np.where(usable, variance.double().numpy(), 0.0)
    columns = {
        "miller_index": metadata.miller_index.numpy().astype(np.int32),
        "id": metadata.experiment.numpy().astype(np.int32),
        "imageset_id": metadata.experiment.numpy().astype(np.int32),
        "panel": metadata.panel.numpy().astype(np.uint64),
        "entering": np.asarray(store.column("entering"), dtype=bool),
        "s1": metadata.s1.double().numpy(),
        "xyzcal.px": xyz,
        "xyzcal.mm": xyz_mm,
        "d": metadata.d.double().numpy(),
        "bbox": _bounding_boxes(store),
        "zeta": metadata.zeta.double().numpy(),
        "lp": metadata.lp.double().numpy(),
        "partiality": measured.partiality,
        "partial_id": np.arange(len(table), dtype=np.uint64),
        "intensity.prf.value": value,
        "intensity.prf.variance": variance,
        "profile.correlation": measured.correlation,
        "flags": _dials_flags(table, value, variance),
        **_centroid_columns(store, xyz, xyz_mm, measured),
        **_sum_columns(store, table, measured),
    }
    # an empty one stops dials.scale, which gives identifiers where there are none
    names = {i: e["identifier"] for i, e in enumerate(store.experiments) if e["identifier"]}
    return ReflectionTable(columns, names)


def _bounding_boxes(store: ShoeboxStore) -> np.ndarray:
    """(N, 6) int32: fast, slow and frame ranges, half-open; frames that there are, as in DIALS."""
    depth, height, width = store.box
    metadata = store.metadata()
    frame, slow, fast = metadata.corner.numpy().T
    end = frame + depth * metadata.frames_per_layer.numpy()
    n_images = np.array([e["n_images"] for e in store.experiments])[metadata.experiment.numpy()]
    frames = [np.maximum(frame, 0), np.minimum(end, n_images)]
    return np.stack([fast, fast + width, slow, slow + height, *frames], 1).astype(np.int32)


def _centroid_columns(
    store: ShoeboxStore, xyz: np.ndarray, xyz_mm: np.ndarray, measured: SpotMeasures
) -> dict[str, np.ndarray]:
    """Observed positions; the parallax is that of the predicted one."""
    metadata = store.metadata()
    to_mm = np.empty_like(xyz)
    for number, experiment in enumerate(store.experiments):
        rows = (metadata.experiment == number).numpy()
        pixel = np.array(experiment["pixel_size_mm"])[metadata.panel.numpy()[rows]]
        to_mm[rows, :2] = pixel
        to_mm[rows, 2] = np.radians(experiment["oscillation_deg"][1])
    is_measured = (measured.centroid_variance > 0).any(axis=1, keepdims=True)
    in_mm = xyz_mm + (measured.centroid - xyz) * to_mm
    return {
        "xyzobs.px.value": measured.centroid,
        "xyzobs.px.variance": measured.centroid_variance,
        "xyzobs.mm.value": np.where(is_measured, in_mm, 0.0),
        "xyzobs.mm.variance": measured.centroid_variance * to_mm**2,
    }


def _dials_flags(table: IntensityTable, value: np.ndarray, variance: np.ndarray) -> np.ndarray:
    usable = table.is_integrated.numpy()
    flags = np.full(len(table), DialsFlag.PREDICTED, dtype=np.int64)
    flags[usable] |= DialsFlag.INTEGRATED_SUM | DialsFlag.INTEGRATED_PRF
    flags[~usable] |= DialsFlag.DONT_INTEGRATE
    masked = (table.flags & (Flag.MASKED_CORE | Flag.PARTIAL_EDGE)).numpy() > 0
    flags[masked] |= DialsFlag.FOREGROUND_INCLUDES_BAD_PIXELS
    flags[usable & (value > 5 * np.sqrt(variance))] |= DialsFlag.STRONG | DialsFlag.INDEXED
    return flags


def _sum_columns(
    store: ShoeboxStore, table: IntensityTable, measured: SpotMeasures
) -> dict[str, np.ndarray]:
    # the boxes' background is that of a layer
    background = table.background / table.metadata.frames_per_layer
    return {
        "intensity.sum.value": measured.total,
        "intensity.sum.variance": measured.variance,
        "background.mean": background.double().numpy(),
        "background.sum.value": measured.background,
        "background.sum.variance": measured.background,
        "num_pixels.valid": measured.n_valid.astype(np.int32),
        "num_pixels.foreground": measured.n_core.astype(np.int32),
        "num_pixels.background": measured.n_background.astype(np.int32),
        "num_pixels.background_used": measured.n_background.astype(np.int32),
    }


def write_integrated(
    trainer: Trainer, reflections: ReflectionTable, path: Path, files: DataSetFiles
) -> None:
    """Write integrated.refl of a data set, and the integrated.expt that ``dials.scale`` takes.

    Parameters
    ----------
    trainer : Trainer
    reflections : ReflectionTable
        Of :func:`integrated_reflections`.
    path : Path
        Of the table; the experiment list gets the suffix ``.expt``.
    files : DataSetFiles
        The run's; of its experiments the sweeps that were integrated are written.
    """
    sweeps = sweeps_of(read_experiments(files.expt))
    numbers = sweeps_of_set(trainer.problem.store.experiments, files.name)
    rows = np.isin(reflections["id"], numbers)
    own = reflections.select(rows)
    for name in ("id", "imageset_id"):
        own.columns[name] = own[name] - np.int32(numbers[0])
    names = {k - numbers[0]: v for k, v in reflections.identifiers.items() if k in numbers}
    own = replace(own, identifiers=names)
    own.columns["qe"] = sensor_efficiency(trainer.table[torch.as_tensor(rows)], sweeps, numbers[0])
    write_experiments(path.with_suffix(".expt"), sweeps, source=files.expt)
    write_reflections(path, to_array_index(own, sweeps))


def sensor_efficiency(
    table: IntensityTable, experiments: list[Experiment], first: int = 0
) -> np.ndarray:
    """DIALS column ``qe``: photons that the sensor absorbs, 1 where its thickness is unknown.

    ``first`` is the number that the table gives to the first of ``experiments``.
    """
    metadata, efficiency = table.metadata, np.ones(len(table))
    for number, experiment in enumerate(experiments, first):
        for k, panel in enumerate(experiment.panels):
            if panel.mu > 0 and panel.thickness > 0:
                rows = ((metadata.experiment == number) & (metadata.panel == k)).numpy()
                normal = np.cross(panel.fast_axis, panel.slow_axis)
                s1 = metadata.s1[torch.as_tensor(rows)].double().numpy()
                efficiency[rows] = quantum_efficiency(s1, normal, panel.mu, panel.thickness)
    return efficiency


@torch.no_grad()
def write_unmerged(trainer: Trainer, path: Path, dataset: int, files: DataSetFiles) -> None:
    """Write scaled, unmerged observations of a data set: prior-free intensity over our scale."""
    problem, merger, observed = trainer.problem, trainer.model.merger, trainer.merge_table()
    fresh = fresh_crystal_factor(merger)
    scaled = used_observations(merger, observed).times(fresh)
    keep = (scaled.is_spot & (observed.observations.dataset == dataset)).cpu().numpy()
    k = merger.scale(observed.everything()).log_k.exp() / fresh[scaled.row]
    k = k * observed.unit_intensity
    metadata = problem.metadata[trainer.model.store_row.cpu()]
    lp = metadata.lp.double().numpy()
    first = sweeps_of_set(problem.store.experiments, files.name)[0]
    table = UnmergedTable(
        miller_index=metadata.miller_index.numpy()[keep],
        experiment=metadata.experiment.numpy()[keep] - first,
        intensity=scaled.intensity.cpu().numpy()[keep],
        sigma=scaled.variance.sqrt().cpu().numpy()[keep],
        xyz_px=metadata.xyz_px.double().numpy()[keep],
        lp=lp[keep],
        scale=(k.cpu().numpy() * lp)[keep],
    )
    write_unmerged_mtz(
        path,
        table,
        sweeps_of(read_experiments(files.expt)),
        cell=problem.asus[dataset].cell,
        space_group=problem.asus[dataset].space_group,
        history=[first_line("run"), "scaled; free of a prior; sigmas of outliers are enlarged"],
        labels=labels_of(trainer, files.name),
    )
