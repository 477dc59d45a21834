"""The trained model of a run, to say what it expected of each observation."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammainc

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.model.build import build_integrator
from braggflux.integrator.shoebox.mask import MaskBit
from braggflux.integrator.torch_file import load_torch
from braggflux.merge.likelihood.student_t import StudentT
from braggflux.merge.output.amplitudes import fresh_crystal_factor
from braggflux.merge.rows import parse_parents
from braggflux.pipelines.integration.problem import Problem, join, merge_settings
from braggflux.pipelines.integration.trainer import Trainer
from braggflux.pipelines.workspace.rundir import RunDirectory

Array = NDArray[Any]

#: An error that is so many times its sigma makes an outlier.
OUTLIER = 2.0
REMEDY = "make the run again"


@dataclass(frozen=True)
class Scaled:
    """Observations on the common scale, by row of intensities.h5, (N,); NaN where not merged.

    Parameters
    ----------
    intensity, sigma : ndarray
        Of the crystal before any damage, before outliers are given larger errors.
    expected : ndarray
        What the merge expects.
    z : ndarray
        Root of the deviance over sigma, with the sign of observed less expected.
    p_outlier : ndarray
        Probability that the error is more than :data:`OUTLIER` times its sigma.
    """

    intensity: Array
    sigma: Array
    expected: Array
    z: Array
    p_outlier: Array


class RunModel:
    """Integrator and merger of a run as its last checkpoint has them.

    Parameters
    ----------
    run : RunDirectory

    Raises
    ------
    UserError
        Shoeboxes or checkpoint are missing, damaged, or of another version of the model.
    """

    def __init__(self, run: RunDirectory) -> None:
        checkpoint = run.latest_checkpoint()
        if checkpoint is None or not run.shoeboxes.is_file():
            missing = "checkpoint" if run.shoeboxes.is_file() else "shoeboxes.h5"
            raise UserError(f"{run.path} has no {missing}")
        config = run.read_config()
        self.store = ShoeboxStore.open(run.shoeboxes)
        settings = merge_settings(config, float(self.store.metadata().d.min()))
        integrator = build_integrator(self.store, config.integrator)
        parents = parse_parents(config.parents)
        merging, model = join(integrator, self.store, settings, parents, config.prior_model)
        problem = Problem(self.store, merging, model)
        self.trainer = Trainer(problem, config, torch.device("cpu"))
        try:
            self.trainer.load_state_dict(load_torch(checkpoint, REMEDY))
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(f"{checkpoint.name} is of another version of the model") from error
        self.trainer.merge_table()
        self._lock = threading.Lock()

    @cached_property
    def scaled(self) -> Scaled:
        """All observations on the common scale."""
        with torch.no_grad():
            return self._scaled()

    def _scaled(self) -> Scaled:
        model, n = self.trainer.model, len(self.store)
        merger, table = model.merger, model.observations
        batch = table.everything()
        e = merger.generative(batch, merger.inference()).alone
        measured = batch.observations.measured
        residual = measured.compare(e.mean, torch.zeros_like(e.mean)).residual
        z = residual / e.variance.sqrt()
        unit = table.unit_intensity / e.scale * fresh_crystal_factor(merger)[batch.first_rows]
        columns = {
            "intensity": batch.observations.intensity * unit,
            "sigma": e.variance.sqrt() * unit,
            "expected": e.mean * unit,
            "z": z,
            "p_outlier": self._outlier(z),
        }
        used, store_row = batch.observations.is_used.bool(), torch.as_tensor(model.store_row)
        scattered = {}
        for name, values in columns.items():
            scattered[name] = np.full(n, np.nan)
            scattered[name][store_row[used].numpy()] = values[used].double().numpy()
        return Scaled(**scattered)

    def _outlier(self, z: torch.Tensor) -> torch.Tensor:
        """P(error > 2 sigma | z): Student's t is a Normal whose precision w is Gamma distributed.

        w | z ~ Gamma((dof + 1) / 2, (dof + z^2) / 2), and the error is sigma w^-1/2.
        """
        law = self.trainer.model.merger.likelihood
        student = next((part for part in law.modules() if isinstance(part, StudentT)), None)
        if student is None:
            return torch.full_like(z, torch.nan)
        dof = float(student.dof.detach())
        x = (dof + z.double().numpy() ** 2) / 2 / OUTLIER**2
        return torch.from_numpy(gammainc((dof + 1) / 2, x))

    def expected(self, row: int) -> float:
        """Intensity that the merge expects of a row [photons], NaN where it is not merged."""
        return float(self.trainer.model.expected(torch.tensor([row]))[0])

    def box(self, row: int) -> dict[str, Any]:
        """Return counts, expected photons and mask of the shoebox of a row, as nested lists.

        ``counts``, ``model``, ``valid`` and ``own`` are (D, H, W); ``corner`` is the (frame, slow,
        fast) index of the first voxel.
        """
        rows = torch.tensor([row])
        with self._lock, torch.no_grad():
            batch = self.store.read(rows)
            mask = self.store.read_raw(rows)[1][0].numpy()
            joint = self.trainer.model
            expected = joint.expected(rows) if self.trainer.coupled else None
            posterior = joint.integrator.inference(batch, expected)
            rate = joint.integrator.generative(posterior).reshape(batch.counts.shape)[0]
        return {
            "counts": batch.counts[0].int().tolist(),
            "model": np.round(rate.double().numpy(), 4).tolist(),
            "valid": batch.is_valid[0].int().tolist(),
            "own": ((mask & MaskBit.FOREGROUND) > 0).astype(int).tolist(),
            "corner": batch.metadata.corner[0].tolist(),
            "frames_per_layer": int(batch.metadata.frames_per_layer[0]),
        }


class LoadingModel:
    """The model of a run, loaded in a thread while pages are looked at already.

    Parameters
    ----------
    run : RunDirectory
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._model: RunModel | None = None
        self.why_not = "the model is being loaded; look again in a moment"
        self._thread = threading.Thread(target=self._load, daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            model = RunModel(self._run)
            _ = model.scaled
        except UserError as error:
            self.why_not = f"the run's model cannot be shown: {error}"
            return
        self._model, self.why_not = model, ""

    @property
    def now(self) -> RunModel | None:
        """The model, or None where it is not there (yet)."""
        return self._model

    def wait(self, seconds: float) -> RunModel | None:
        """Return the model, after some waiting; None where it is not there (yet)."""
        self._thread.join(seconds)
        return self._model
