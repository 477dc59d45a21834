#!/usr/bin/env python3
r"""Errors of single observations, by what spoils them, of several runs on the same frames.

An observation is compared with the true photons of a simulation. At the ends of the scan the
truth holds what was recorded, so that our estimate of the whole spot is multiplied there by the
share of the profile that was exposed (``partiality``).

Columns
-------
n            observations that all runs have integrated, merged or not
run          as given
error        rms of (estimate - truth) / bound, the bound being the standard deviation that the
             first run's likelihood expects at the true photons
bias         sum of (estimate - truth) over the sum of the truth [%]
spread of z  robust standard deviation of (estimate - truth) / sigma

Example
-------
python benchmarks/single_observations.py d30_joint_s0 d30_staged_s0 --dose 30 \
    --truth ../shared/data/hewl_nai/true_counts.npz
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from braggflux.integrator.io.dials import read_reflections
from braggflux.integrator.io.intensity_file import read_intensities
from braggflux.integrator.types import Flag, IntensityTable
from braggflux.pipelines.compare.rows import MIN_PAIRS
from braggflux.pipelines.workspace.matching import match_observations

#: Part of the information that a spot with a hole may have kept, in classes.
KEPT = ((0.0, 0.5), (0.5, 0.8), (0.8, 1.0))
MEDIAN_ABS_NORMAL = 0.6745
RING = 0.0025  # half width of a ring [1/A]
RECORDED = 0.98  # a larger share of the profile counts as all of it


@dataclass(frozen=True)
class Run:
    """Estimates of a run in the order of its store, (N,).

    Attributes
    ----------
    table : IntensityTable
    partiality : ndarray
        Share of the profile on exposed frames.
    """

    table: IntensityTable
    partiality: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read the files of a run directory."""
        reflections = read_reflections(folder / "integrated.refl")
        return cls(read_intensities(folder / "intensities.h5"), reflections["partiality"])

    @property
    def recorded(self) -> np.ndarray:
        """Estimated photons on exposed frames."""
        return self.table.likelihood.mode.numpy() * self.partiality

    def bound(self, photons: np.ndarray) -> np.ndarray:
        """Return the standard deviation of :attr:`recorded` at true photons [photons]."""
        whole = torch.as_tensor(photons / self.partiality.clip(0.05))
        return self.table.likelihood.variance(whole).sqrt().numpy() * self.partiality

    @property
    def sigma(self) -> np.ndarray:
        """Standard deviation of :attr:`recorded` at its own value [photons]."""
        likelihood = self.table.likelihood
        return likelihood.variance(likelihood.mode).sqrt().numpy() * self.partiality


def classes(run: Run, rings: list[float]) -> dict[str, np.ndarray]:
    """Say which observations belong to which class, each (N,) bool; ``rings`` are spacings [A]."""
    flags = run.table.flags.numpy()
    has_hole, at_edge = (flags & bit > 0 for bit in (Flag.MASKED_CORE, Flag.PARTIAL_EDGE))
    # of layers of several frames the scan may have recorded a part that is not used
    is_cut = (run.partiality < RECORDED) & (run.table.metadata.frames_per_layer.numpy() == 1)
    # the exposure is that of the profile times the share of information that is left
    kept = run.table.likelihood.exposure.numpy()
    result = {"whole": ~has_hole & ~at_edge}
    for low, high in KEPT:
        inside = (kept >= low) & (kept < high)
        result[f"gap or dead pixel, {low:g}-{high:g} left"] = has_hole & ~at_edge & inside
    for low, high in ((0.5, 0.8), (0.8, RECORDED)):
        inside = (run.partiality >= low) & (run.partiality < high)
        result[f"end of the scan, {low:g}-{high:g} recorded"] = at_edge & is_cut & inside
    if rings:
        inverse_d = 1 / run.table.metadata.d.numpy()
        distance = np.abs(inverse_d[:, None] - 1 / np.array(rings)).min(1)
        result |= {"on a ring": distance < RING, "away from rings": distance > 3 * RING}
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--truth", type=Path, required=True, help="true_counts.npz")
    parser.add_argument("--dose", type=float, default=1.0, help="denominator")
    parser.add_argument("--rings", nargs="+", type=float, default=[], metavar="A", help="of ice")
    args = parser.parse_args()
    runs = {folder.name: Run.read(folder) for folder in args.runs}
    first = next(iter(runs.values()))
    with np.load(args.truth) as file:
        hkl, xyz, truth = file["miller_index"], file["xyz_px"], file["photons"] / args.dose
    metadata = first.table.metadata
    index, place = metadata.miller_index.numpy(), metadata.xyz_px.numpy()
    true_rows, rows = match_observations(hkl, xyz, index, place)
    photons = np.full(len(first.table), np.nan)
    photons[rows] = truth[true_rows]
    usable = np.isfinite(photons)
    for run in runs.values():
        usable &= run.table.is_integrated.numpy()
    bound = first.bound(np.nan_to_num(photons))
    print("| class | n | run | error | bias | spread of z |\n|" + " --- |" * 6)
    for name, members in classes(first, args.rings).items():
        chosen = usable & members
        if chosen.sum() < MIN_PAIRS:
            continue
        for label, run in runs.items():
            error = (run.recorded - photons)[chosen]
            z = np.median(np.abs(error / run.sigma[chosen])) / MEDIAN_ABS_NORMAL
            rms = np.sqrt(np.mean((error / bound[chosen]) ** 2))
            bias = 100 * error.sum() / photons[chosen].sum()
            print(f"| {name} | {chosen.sum()} | {label} | {rms:.3f} | {bias:+.2f} % | {z:.2f} |")


if __name__ == "__main__":
    main()
