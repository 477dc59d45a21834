"""What DIALS integrated for an observation."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    place_on_scans,
    read_experiments,
    read_reflections,
)
from braggflux.integrator.io.dials.sweeps import sweeps_of
from braggflux.pipelines.workspace.rundir import RunDirectory

Array = NDArray[Any]

#: Farther apart than this, two entries are not one observation [pixels, frames].
MAX_DISTANCE = 5.0
GIVE_ONE = "give one: braggflux view RUN_DIR --dials integrated.refl"


class DialsValues:
    """Integrated intensities of DIALS beside those of a run, read when first asked for.

    Parameters
    ----------
    run : RunDirectory
        Of one data set.
    path : Path, optional
        DIALS' integrated.refl or scaled.refl; that of the run, where it has one, without it.
    """

    def __init__(self, run: RunDirectory, path: Path | None = None) -> None:
        self._run = run
        self._path = path
        self._lock = threading.Lock()
        self._table: ReflectionTable | None = None
        self._reason = ""
        if path is not None and not path.is_file():
            raise UserError(f"{path} does not exist; give DIALS' integrated.refl, or leave it out")

    def of(self, hkl: Array, xyz: Array, sweep: int) -> dict[str, Any]:
        """Give J and sigma [photons] by profile fitting and summation, or the ``reason`` for none.

        Parameters
        ----------
        hkl : ndarray, (3,)
            As observed.
        xyz : ndarray, (3,)
            (fast, slow, frame from the start of the scan).
        sweep : int
        """
        table = self._loaded()
        if table is None:
            return {"reason": self._reason}
        same = (table["miller_index"] == hkl).all(1) & (self._sweep == sweep)
        rows = np.flatnonzero(same)
        distance = np.linalg.norm(table["xyzcal.px"][rows] - xyz, axis=1)
        if not len(rows) or distance.min() > MAX_DISTANCE:
            return {"reason": "DIALS did not predict it there"}
        row, flags = rows[distance.argmin()], int(table["flags"][rows[distance.argmin()]])
        found: dict[str, Any] = {"source": Path(table.source).name}
        for kind, bit in (("prf", DialsFlag.INTEGRATED_PRF), ("sum", DialsFlag.INTEGRATED_SUM)):
            if flags & bit and f"intensity.{kind}.value" in table.columns:
                value = float(table[f"intensity.{kind}.value"][row])
                variance = max(float(table[f"intensity.{kind}.variance"][row]), 0.0)
                found[kind] = {"value": value, "sigma": variance**0.5}
        if "prf" not in found and "sum" not in found:
            return {"reason": "DIALS predicted it and did not integrate it"}
        found["outlier"] = bool(flags & DialsFlag.OUTLIER_IN_SCALING)
        return found

    def _loaded(self) -> ReflectionTable | None:
        with self._lock:
            if self._table is None and not self._reason:
                try:
                    self._load()
                except UserError as error:
                    self._reason = str(error)
            return self._table

    def _load(self) -> None:
        path = self._path or self._found()
        if path is None:
            self._reason = f"the run has no integrated.refl of DIALS; {GIVE_ONE}"
            return
        table = read_reflections(path)
        if "flags" not in table or not (table["flags"] & np.uint64(DialsFlag.INTEGRATED)).any():
            self._reason = f"{path.name} is not of dials.integrate; {GIVE_ONE}"
            return
        expt = path.with_suffix(".expt")
        if not expt.is_file():
            expt = self._run.integrated_expt
        experiments = read_experiments(expt)
        table, number = place_on_scans(table, experiments)
        usable = sweeps_of(experiments)
        position = [next((k for k, s in enumerate(usable) if s is e), -1) for e in experiments]
        self._sweep = np.where(number >= 0, np.array(position)[number], -1)
        self._table = table

    def _found(self) -> Path | None:
        config = self._run.read_config()
        candidates = [self._run.dials / "scaled.refl", self._run.dials / "integrated.refl"]
        candidates += [config.refl] if config.refl is not None else []
        for path in candidates:
            if path.is_file():
                return path
        return None
