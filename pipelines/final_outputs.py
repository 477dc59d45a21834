"""What is written at the end: integrated.refl, unmerged.mtz and shoeboxes for the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from integrator.crystal.corrections import quantum_efficiency
from integrator.crystal.geometry import Experiment
from integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    read_experiments,
    to_array_index,
    write_experiments,
    write_reflections,
)
from integrator.io.shoebox_store import ShoeboxStore
from integrator.shoebox.sweep import sweeps_of
from integrator.types import Flag, IntensityTable
from merge.io.mtz import UnmergedTable, write_unmerged_mtz
from merge.model.amplitudes import relative_responsibility
from pipelines.trainer import Trainer

N_EXAMPLES = 12


def integrated_reflections(
    trainer: Trainer, table: IntensityTable, summed: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> ReflectionTable:
    """Our observations as a DIALS table of integrated reflections.

    ``intensity.prf`` is the maximum of the photon-count likelihood and ``intensity.sum`` the
    plain sum over the spot: both raw photons, before L/P, and free of any prior.

    Parameters
    ----------
    trainer : Trainer
    table : IntensityTable
    summed : tuple of ndarray, (N,)
        Summed intensity, its variance and the number of voxels, see :func:`sum_intensities`.
    """
    store = trainer.problem.store
    n = len(table)
    # variance expected at the estimate: an observed count of 0 is not known without error
    variance = (table.intensity.clamp_min(0) + table.effective_background) / table.exposure
    xyz, xyz_mm = table.xyz_px.double().numpy(), table.xyz_mm.double().numpy()
    value, variance = table.intensity.double().numpy(), variance.double().numpy()
    columns = {
        "miller_index": table.miller_index.numpy().astype(np.int32),
        "id": table.experiment.numpy().astype(np.int32),
        "imageset_id": table.experiment.numpy().astype(np.int32),
        "panel": table.panel.numpy().astype(np.uint64),
        "entering": np.asarray(store.column("entering"), dtype=bool),
        "s1": table.s1.double().numpy(),
        "xyzcal.px": xyz,
        "xyzcal.mm": xyz_mm,
        "xyzobs.px.value": xyz,
        "xyzobs.px.variance": np.full_like(xyz, 0.1),
        "xyzobs.mm.value": xyz_mm,
        "xyzobs.mm.variance": np.full_like(xyz, 1e-4),
        "d": table.d.double().numpy(),
        "bbox": _bounding_boxes(store),
        "zeta": store.metadata().zeta.double().numpy(),
        "lp": table.lp.double().numpy(),
        "partiality": np.ones(n),
        "partial_id": np.arange(n, dtype=np.uint64),
        "intensity.prf.value": value,
        "intensity.prf.variance": variance,
        "profile.correlation": np.ones(n),
        "flags": _dials_flags(table, value, variance),
        **_sum_columns(table, summed, int(np.prod(store.box))),
    }
    identifiers = {i: e["identifier"] for i, e in enumerate(store.experiments)}
    return ReflectionTable(columns, identifiers)


def _bounding_boxes(store: ShoeboxStore) -> np.ndarray:
    """(N, 6) int32: fast, slow and frame ranges, half-open."""
    depth, height, width = store.box
    frame, slow, fast = store.metadata().corner.numpy().T
    depth = depth * store.metadata().frames_per_layer.numpy()
    box = [fast, fast + width, slow, slow + height, frame, frame + depth]
    return np.stack(box, 1).astype(np.int32)


def _dials_flags(table: IntensityTable, value: np.ndarray, variance: np.ndarray) -> np.ndarray:
    usable = ((table.flags & Flag.REJECTED) == 0).numpy()
    flags = np.full(len(table), DialsFlag.PREDICTED, dtype=np.int64)
    flags[usable] |= DialsFlag.INTEGRATED_SUM | DialsFlag.INTEGRATED_PRF
    flags[~usable] |= DialsFlag.DONT_INTEGRATE
    masked = (table.flags & (Flag.MASKED_CORE | Flag.PARTIAL_EDGE)).numpy() > 0
    flags[masked] |= DialsFlag.FOREGROUND_INCLUDES_BAD_PIXELS
    flags[usable & (value > 5 * np.sqrt(variance))] |= DialsFlag.STRONG | DialsFlag.INDEXED
    return flags


def _sum_columns(
    table: IntensityTable, summed: tuple[np.ndarray, np.ndarray, np.ndarray], n_box: int
) -> dict[str, np.ndarray]:
    value, variance, n_voxels = summed
    background = table.background.double().numpy()
    rest = (n_box - n_voxels).astype(np.int32)
    return {
        "intensity.sum.value": value,
        "intensity.sum.variance": variance,
        "background.mean": background,
        "background.sum.value": background * n_voxels,
        "background.sum.variance": background * n_voxels,
        "num_pixels.valid": n_voxels.astype(np.int32),
        "num_pixels.foreground": n_voxels.astype(np.int32),
        "num_pixels.background": rest,
        "num_pixels.background_used": rest,
    }


@torch.no_grad()
def sum_intensities(trainer: Trainer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Background-subtracted sum over the voxels that hold the spot, its variance, their number.

    The share of the profile on the summed, valid voxels divides the sum, so that a spot cut by a
    gap is not summed short.
    """
    n = len(trainer.problem.store)
    value, variance, voxels = np.zeros(n), np.ones(n), np.ones(n)
    for batch in trainer.dataset.batches(trainer.config.training.batch_size):
        batch = batch.to(trainer.device)
        posterior = trainer.model.integrator.inference(batch)
        counts, valid = batch.counts.flatten(1), batch.is_valid.flatten(1)
        core = valid & (posterior.profile > 1e-3)
        share = (posterior.profile * core).sum(1).clamp_min(0.05)
        background = posterior.background_fit.background
        rows = batch.metadata.refl_row.numpy(force=True)
        value[rows] = (((counts - background) * core).sum(1) / share).numpy(force=True)
        spread = ((counts.clamp_min(0) * core).sum(1) + 1.0) / share**2
        variance[rows] = spread.numpy(force=True)
        voxels[rows] = core.sum(1).numpy(force=True)
    return value, variance, np.maximum(voxels, 1)


def write_integrated(trainer: Trainer, path: Path, expt: Path) -> None:
    """Write integrated.refl, and the integrated.expt that ``dials.scale`` takes with it.

    Parameters
    ----------
    trainer : Trainer
    path : Path
        Of the table; the experiment list gets the suffix ``.expt``.
    expt : Path
        The run's; of it the sweeps that were integrated are written.
    """
    summed = sum_intensities(trainer)
    sweeps = sweeps_of(read_experiments(expt))
    reflections = integrated_reflections(trainer, trainer.table, summed)
    reflections.columns["qe"] = sensor_efficiency(trainer.table, sweeps)
    write_experiments(path.with_suffix(".expt"), sweeps, source=expt)
    write_reflections(path, to_array_index(reflections, sweeps))


def sensor_efficiency(table: IntensityTable, experiments: list[Experiment]) -> np.ndarray:
    """DIALS column ``qe``: photons that the sensor absorbs, 1 where its thickness is unknown."""
    efficiency = np.ones(len(table))
    for number, experiment in enumerate(experiments):
        for k, panel in enumerate(experiment.panels):
            if panel.mu > 0 and panel.thickness > 0:
                rows = ((table.experiment == number) & (table.panel == k)).numpy()
                normal = np.cross(panel.fast_axis, panel.slow_axis)
                s1 = table.s1[torch.as_tensor(rows)].double().numpy()
                efficiency[rows] = quantum_efficiency(s1, normal, panel.mu, panel.thickness)
    return efficiency


@torch.no_grad()
def write_unmerged(trainer: Trainer, path: Path, expt: Path) -> None:
    """Write scaled, unmerged observations: prior-free intensity over our scale."""
    merger = trainer.model.merger
    batch = trainer.merge_input()
    value, variance, good = merger.scaled_observations(batch)
    good, _ = relative_responsibility(good, batch.refl_id, len(merger.n_obs))
    fresh = merger.scale.fresh_crystal_factor(merger.inv_d2)[batch.refl_id]
    keep = (good > 0.5).cpu().numpy()
    value, sigma = (value * fresh).cpu().numpy(), (variance.sqrt() * fresh).cpu().numpy()
    scale = (merger.scale(batch.scale_index).exp() / fresh).cpu().numpy()
    rows = batch.scale_index.cpu()
    metadata = trainer.problem.metadata[rows]
    lp = metadata.lp.double().numpy()
    table = UnmergedTable(
        miller_index=metadata.miller_index.numpy()[keep],
        experiment=metadata.experiment.numpy()[keep],
        intensity=value[keep],
        sigma=sigma[keep],
        xyz_px=metadata.xyz_px.double().numpy()[keep],
        lp=lp[keep],
        scale=(scale * lp)[keep],
    )
    write_unmerged_mtz(
        path,
        table,
        sweeps_of(read_experiments(expt)),
        cell=trainer.problem.cell,
        space_group=trainer.problem.space_group,
        history=["scaled by braggflux; outliers (half as good as their best mate) left out"],
    )


@torch.no_grad()
def write_examples(trainer: Trainer, path: Path) -> None:
    """Write some shoeboxes with their posteriors, from weak to strong, for the report."""
    table = trainer.table
    usable = torch.nonzero((table.flags & Flag.REJECTED) == 0)[:, 0]
    order = usable[table.intensity[usable].argsort()]
    n = min(N_EXAMPLES, len(order))
    rows = order[torch.linspace(0, len(order) - 1, n).long()]
    batch = trainer.problem.store.read(rows).to(trainer.device)
    posterior = trainer.model.integrator.inference(batch)
    rate = trainer.model.integrator.generative(posterior).reshape(batch.counts.shape)
    q = posterior.q_intensity
    arrays = {
        "counts": batch.counts,
        "rate": rate,
        "is_valid": batch.is_valid,
        "miller_index": batch.metadata.miller_index,
        "resolution": batch.metadata.d,
        "intensity": posterior.likelihood.mode,
        "flat_prior_posterior_mean": q.base_dist.mean - posterior.likelihood.effective_background,
        "flat_prior_posterior_sd": q.base_dist.variance.sqrt(),
        "expected_by_the_merge": trainer.model.expected(batch.metadata.refl_row),
        "background": table.background[rows],
    }
    np.savez_compressed(path, **{k: v.cpu().numpy() for k, v in arrays.items()})
