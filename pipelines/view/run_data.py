"""A finished run as its pages see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.integrator.types import Flag
from braggflux.pipelines.view.columns import IntensityColumns
from braggflux.pipelines.view.dials import DialsValues
from braggflux.pipelines.view.frames import FrameViews, box_shape
from braggflux.pipelines.view.maps import SiteMaps
from braggflux.pipelines.view.model import LoadingModel, RunModel
from braggflux.pipelines.view.query import Search, flag_words
from braggflux.pipelines.workspace.outputs import holds_merge
from braggflux.pipelines.workspace.rundir import RunDirectory

Array = NDArray[Any]

#: Seconds that the page of a reflection waits for the model.
PATIENCE_S = 20.0
#: Points of the curve of the likelihood of J.
CURVE_POINTS = 161


class RunData:
    """What the pages show, each part read when first asked for.

    Parameters
    ----------
    path : Path
        Run directory.
    dials : Path, optional
        DIALS' integrated reflections.

    Raises
    ------
    UserError
        No run, not finished, or without intensities.
    """

    def __init__(self, path: Path, dials: Path | None = None) -> None:
        if holds_merge(path):
            raise UserError(
                f"{path} holds a result of merge, which has no frames: its report.html shows it; "
                "give the folder of a run"
            )
        self.run = RunDirectory.open(path)
        session = self.run.read_provenance()["sessions"][-1]
        if not self.run.intensities.is_file():
            # the epochs of a joint run write none: it comes with the end
            state = "is not finished" if not session.get("ended") else "has no intensities.h5"
            raise UserError(
                f"{path} {state}: wait for its end, or go on with `braggflux run ... --resume`"
            )
        if not session.get("ended"):
            raise UserError(
                f"{path} is not finished: wait for its end, or go on with `braggflux run ... "
                "--resume`"
            )
        shape = box_shape(self.run)
        self.columns = IntensityColumns(self.run.intensities, shape[0] if shape else None)
        self.search = Search(self.columns)
        self.frames = FrameViews(self.run, self.columns)
        self.data_sets = self.run.data_sets()
        self.maps = [SiteMaps(own) for own in self.data_sets]
        self.dials = DialsValues(self.run, dials)
        self.loading = LoadingModel(self.run)

    def z(self, *, needed: bool = False) -> Array | None:
        """Deviations of all rows [sigma], None without the model; waits where ``needed``."""
        model = self.loading.wait(PATIENCE_S) if needed else self.loading.now
        return None if model is None else model.scaled.z

    def list_entry(self, row: int) -> dict[str, Any]:
        """One line of the list of reflections."""
        columns, z = self.columns, self.z()
        # what is not integrated has placeholders
        is_known = not columns["flags"][row] & Flag.REJECTED
        return {
            "row": row,
            "hkl": " ".join(str(i) for i in columns["miller_index"][row]),
            "d": float(columns["d"][row]),
            "image": int(columns.image[row]),
            "sweep": int(columns["experiment"][row]),
            "x": float(columns["xyz_px"][row, 0]),
            "y": float(columns["xyz_px"][row, 1]),
            "J": float(columns.intensity[row]) if is_known else None,
            "sigma": float(columns.sigma[row]) if is_known else None,
            "background": float(columns["background"][row]) if is_known else None,
            "z": None if z is None or np.isnan(z[row]) else float(z[row]),
            "flags": flag_words(int(columns["flags"][row])),
        }

    def check_row(self, row: int) -> None:
        """Raise :class:`UserError` unless there is such a row."""
        if not 0 <= row < len(self.columns):
            raise UserError(f"no row {row}: intensities.h5 has {len(self.columns)}, from 0")

    def reflection(self, row: int) -> dict[str, Any]:
        """Everything on one observation: box, likelihood of J, DIALS' value, symmetry mates."""
        self.check_row(row)
        model = self.loading.wait(PATIENCE_S)
        columns = self.columns
        found: dict[str, Any] = {"row": row, "reason": self.loading.why_not}
        sweep = int(columns["experiment"][row])
        found["first_image"] = int(columns.sweeps[sweep].get("image_range", (1,))[0])
        if model is not None:
            found["box"] = model.box(int(columns["refl_row"][row]))
        place = columns["xyz_px"][row].astype(float)
        found["dials"] = self.dials.of(columns["miller_index"][row], place, sweep)
        is_known = not columns["flags"][row] & Flag.REJECTED
        found["likelihood"] = self._likelihood(row, model, found["dials"]) if is_known else None
        found["mates"] = self._mates(row, model)
        return found

    def _likelihood(
        self, row: int, model: RunModel | None, dials: dict[str, Any]
    ) -> dict[str, Any]:
        """Density of J from the photons alone, with a flat prior, and what the merge expects."""
        a, beta, t = (
            float(self.columns[name][row])
            for name in ("effective_counts", "effective_background", "exposure")
        )
        mode, sigma = float(self.columns.intensity[row]), float(self.columns.sigma[row])
        low, high = mode - 5 * sigma, mode + 6 * sigma
        for kind in ("prf", "sum"):
            if kind in dials:
                near = np.clip(dials[kind]["value"], mode - 20 * sigma, mode + 20 * sigma)
                low, high = min(low, near - sigma), max(high, near + sigma)
        j = np.linspace(max(low, -beta * (1 - 1e-6)), high, CURVE_POINTS)
        log_l = a * np.log(np.maximum(j + beta, 1e-12)) - t * j
        density = np.exp(log_l - log_l.max())
        density /= density.sum() * (j[1] - j[0])
        expected = None
        if model is not None:
            store_row = int(self.columns["refl_row"][row])
            value = model.expected(store_row)
            expected = None if np.isnan(value) else value
        return {
            "J": j.tolist(),
            "density": density.tolist(),
            "mode": mode,
            "sigma": sigma,
            "expected": expected,
        }

    def _mates(self, row: int, model: RunModel | None) -> list[dict[str, Any]]:
        """Symmetry mates in the order of their images."""
        columns = self.columns
        rows = columns.equivalents(row)
        rows = rows[np.lexsort((columns["xyz_px"][rows, 2], columns["experiment"][rows]))]
        plus = columns.friedel_plus[rows]
        mates = []
        for number, is_plus in zip(rows.tolist(), plus.tolist(), strict=True):
            entry = self.list_entry(number) | {"plus": is_plus}
            if model is not None:
                at, scaled = int(columns["refl_row"][number]), model.scaled
                for name in ("intensity", "sigma", "expected", "z", "p_outlier"):
                    value = float(getattr(scaled, name)[at])
                    key = f"scaled_{name}" if name in ("intensity", "sigma") else name
                    entry[key] = None if np.isnan(value) else value
            mates.append(entry)
        return mates
