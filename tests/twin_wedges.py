"""Wedges of the simulated sweep of ../shared/data/hewl_nai, numbered as one likes.

Observations are those of :func:`predict_reflections`, intensities the true photons in a beam whose
strength swings by a factor of 2.7 in 16 images, with the noise of a background. A wedge keeps its
place in the sweep, ``images 101-200``, or counts from 1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from braggflux.integrator.crystal.geometry import Experiment, Scan
from braggflux.integrator.io.dials import DialsFlag, ReflectionTable, read_experiments
from braggflux.integrator.prediction.predict import predict_reflections
from braggflux.pipelines.workspace.matching import match_observations

BACKGROUND_SD = 6.0


def renumbered(experiment: Experiment, first: int, last: int, call_first: int) -> Experiment:
    """Images ``first`` to ``last`` of a sweep, the first called ``call_first``."""
    scan, points = experiment.scan, experiment.crystal.A_at_scan_points
    begin = first - scan.image_range[0]
    n = last - first + 1
    start = scan.oscillation[0] + begin * scan.oscillation[1]
    frames = tuple(range(call_first - 1, call_first + n - 1))
    return replace(
        experiment,
        scan=Scan((call_first, call_first + n - 1), (start, scan.oscillation[1])),
        crystal=replace(experiment.crystal, A_at_scan_points=points[begin : begin + n + 1]),
        images=replace(experiment.images, indices=frames),
    )


class Twin:
    """The whole sweep as integrated, to ``d_min``.

    Parameters
    ----------
    folder : Path
        ``../shared/data/hewl_nai``.
    d_min : float
    """

    def __init__(self, folder: Path, d_min: float) -> None:
        (self.experiment,) = read_experiments(folder / "refined.expt")
        found = predict_reflections(self.experiment, d_min)
        hkl, xyz = found.miller_index.numpy(), found.xyz_px.numpy()
        with np.load(folder / "true_counts.npz") as file:
            true, rows = match_observations(file["miller_index"], file["xyz_px"], hkl, xyz)
            photons = file["photons"][true].astype(float)
        found, xyz = found[rows], xyz[rows]
        photons *= np.exp(0.5 * np.sin(xyz[:, 2] * 2 * np.pi / 16))
        noise = np.random.default_rng(0).normal(0, BACKGROUND_SD, len(rows))
        flags = DialsFlag.PREDICTED | DialsFlag.INTEGRATED_PRF | DialsFlag.INTEGRATED_SUM
        self.columns = {
            "miller_index": hkl[rows].astype(np.int32),
            "panel": found.panel.numpy().astype(np.uint64),
            "flags": np.full(len(rows), flags, np.uint64),
            "entering": found.entering.numpy(),
            "s1": found.s1.numpy(),
            "xyzcal.px": xyz,
            "xyzcal.mm": found.xyz_mm.numpy(),
            "xyzobs.px.value": xyz,
            "d": found.d.numpy(),
            "lp": found.lp.numpy(),
            "intensity.prf.value": photons + noise,
            "intensity.prf.variance": photons + BACKGROUND_SD**2,
        }

    def wedge(
        self, first: int, last: int, *, call_first: int | None = None, identifier: str = "twin"
    ) -> tuple[Experiment, ReflectionTable]:
        """Images ``first`` to ``last`` and their reflections, DIALS' array indices as frames."""
        call_first = first if call_first is None else call_first
        z = self.columns["xyzcal.px"][:, 2]  # of images from 1: array indices already
        keep = (z >= first - 1) & (z < last)
        columns = {name: column[keep] for name, column in self.columns.items()}
        for name in ("xyzcal.px", "xyzobs.px.value"):
            columns[name] = columns[name] + np.array([0.0, 0.0, call_first - first])
        columns["id"] = np.zeros(keep.sum(), np.int32)
        experiment = renumbered(self.experiment, first, last, call_first)
        table = ReflectionTable(columns, {0: identifier}, "the twin")
        return replace(experiment, identifier=identifier), table


def joined(wedges: list[tuple[Experiment, ReflectionTable]]) -> ReflectionTable:
    """One table of several wedges, ``id`` in their order."""
    columns = {
        name: np.concatenate([table.columns[name] for _, table in wedges])
        for name in wedges[0][1].columns
    }
    columns["id"] = np.repeat(np.arange(len(wedges)), [len(t) for _, t in wedges]).astype(np.int32)
    names = {i: experiment.identifier for i, (experiment, _) in enumerate(wedges)}
    return ReflectionTable(columns, names, "wedges of the twin")
