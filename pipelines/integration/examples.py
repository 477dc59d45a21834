"""Shoeboxes that the report shows: from weak to strong, and those that disagree most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.arrays import write_arrays
from braggflux.integrator.io.dials import (
    DialsFlag,
    place_on_scans,
    read_experiments,
    read_reflections,
)
from braggflux.pipelines.integration.trainer import Trainer
from braggflux.pipelines.workspace.matching import match_observations

N_SAMPLES, N_DISAGREEING = 8, 8
#: Error of strong spots beside counting, relative: what no integration can know.
RELATIVE_ERROR = 0.03
#: Rows whose expected intensity is computed at once.
ROWS_AT_ONCE = 100_000


@torch.no_grad()
def write_examples(trainer: Trainer, path: Path, integrated: Path | None = None) -> None:
    """Write shoeboxes with what was fitted, for the report.

    Parameters
    ----------
    trainer : Trainer
    path : Path
        ``.npz``; arrays with a row for each box: ``counts``, ``rate``, ``is_valid``, ``kind``
        (``sample``, ``mates``, ``dials``), ``row`` in intensities.h5, and numbers that the page
        shows under their names.
    integrated : Path, optional
        DIALS' integrated.refl of the same frames, with its .expt beside it.
    """
    table = trainer.table
    usable = torch.nonzero(table.is_integrated)[:, 0]
    order = usable[table.intensity[usable].argsort()]
    n = min(N_SAMPLES, len(order))
    of_mates = _z_of_mates(trainer)
    of_dials = _dials_intensities(trainer, integrated)
    sigma = table.likelihood.variance(table.intensity).double().sqrt().numpy()
    with np.errstate(all="ignore"):
        error = np.hypot(sigma, RELATIVE_ERROR * of_dials)
        from_dials = np.abs(table.intensity.double().numpy() - of_dials) / error
    chosen = {
        "sample": order[torch.linspace(0, len(order) - 1, n).long()].numpy(),
        "mates": _largest(np.abs(of_mates), usable.numpy()),
        "dials": _largest(from_dials, usable.numpy()),
    }
    rows = np.concatenate(list(chosen.values()))
    arrays = _fitted(trainer, torch.as_tensor(rows))
    arrays["kind"] = np.repeat(list(chosen), [len(r) for r in chosen.values()])
    arrays["row"] = rows
    arrays["image"] = np.floor(table.metadata.xyz_px[rows, 2].numpy()).astype(int) + 1
    arrays["z_to_mates"] = of_mates[rows]
    arrays["intensity_of_DIALS"] = of_dials[rows]
    write_arrays(path, arrays)


def _fitted(trainer: Trainer, rows: Tensor) -> dict[str, NDArray[np.generic]]:
    """Boxes, fitted rates and posteriors of some rows."""
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
        "background": trainer.table.background[rows],
    }
    return {k: v.cpu().numpy() for k, v in arrays.items()}


def _z_of_mates(trainer: Trainer) -> NDArray[np.float64]:
    """Intensity less what the merge expects of it, in sigma, (N,); NaN where it does not know."""
    table = trainer.table
    rows = torch.arange(len(table), device=trainer.device)
    parts = [trainer.model.expected(part).cpu() for part in rows.split(ROWS_AT_ONCE)]
    expected = torch.cat(parts).double()
    variance = table.likelihood.variance(expected.clamp_min(0).to(table.intensity.dtype)).double()
    sigma = (variance + (RELATIVE_ERROR * expected) ** 2).sqrt()
    return np.asarray(((table.intensity.double() - expected) / sigma).numpy())


def _dials_intensities(trainer: Trainer, integrated: Path | None) -> NDArray[np.float64]:
    """Profile-fitted intensities of DIALS of the rows, (N,); NaN where it has none."""
    metadata = trainer.table.metadata
    values = np.full(len(metadata), np.nan)
    if integrated is None or not integrated.is_file():
        return values
    try:
        models = read_experiments(integrated.with_suffix(".expt"))
        table, _ = place_on_scans(read_reflections(integrated), models)
    except UserError:  # what DIALS left cannot be shown; the run itself is whole
        return values
    if "intensity.prf.value" not in table:
        return values
    fitted = np.flatnonzero(table.has_flag(DialsFlag.INTEGRATED_PRF))
    ours, theirs = match_observations(
        metadata.miller_index.numpy(),
        metadata.xyz_px.double().numpy(),
        table["miller_index"][fitted],
        table["xyzcal.px"][fitted],
    )
    values[ours] = table["intensity.prf.value"][fitted[theirs]]
    return values


def _largest(value: NDArray[np.float64], usable: NDArray[np.int64]) -> NDArray[np.int64]:
    """Usable rows of the largest values, the largest first."""
    known = usable[np.isfinite(value[usable])]
    return known[np.argsort(-value[known], kind="stable")[:N_DISAGREEING]]
