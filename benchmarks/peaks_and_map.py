#!/usr/bin/env python3
r"""Draw the figure of README: heights of the iodides after every epoch beside DIALS, and the maps.

Both programs are judged by the same map: differences F(+) - F(-) weighted by their errors, phases
of the model. The section is the plane through three anomalous scatterers, in which their peaks
and the noise between them are seen.

Examples
--------
braggflux run $D/refined.expt $D/refined.refl --model $D/9b7c.pdb --d-min 2.0 --out twin
python benchmarks/peaks_and_map.py twin --reference $D/dials_merged.mtz \
    --model $D/9b7c.pdb --figure docs/figures/peaks_and_map.svg
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import gemmi
import matplotlib
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.cell import inv_d2
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines.maps.anomalous_peaks import AnomalousModel, amplitudes
from braggflux.pipelines.maps.difference_map import DifferenceMap

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Array = NDArray[np.float64]
COLOURS = ("#0072b2", "#d55e00", "#009e73")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "braggflux",
}
LEVELS = np.r_[3, 4, 5, 6, 8, 12, 16, 20, 24]


def read_map(path: Path, model: AnomalousModel) -> DifferenceMap:
    """Compute the map of F(+) - F(-) of a merged MTZ file, in units of its rms."""
    table = read_merged_mtz(path).table
    return model.difference_map(table.miller_index, *amplitudes(table), d_min=model.d_min)


def heights_by_epoch(path: Path, residue: str) -> tuple[list[int], dict[str, list[float]]]:
    """Read epochs, and of each site ("IOD 204") the heights of F(+) - F(-), from peaks.csv."""
    epochs: set[int] = set()
    heights: dict[str, list[float]] = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["residue"] == residue and row["epoch"].isdigit() and row["epoch"] != "0":
                epochs.add(int(row["epoch"]))
                height = float(row["peak_sigma_own"])
                heights.setdefault(f"{residue} {row['seqid']}", []).append(height)
    return sorted(epochs), heights


def plane_through(points: Array) -> tuple[Array, Array, Array]:
    """Centre [A] and two orthogonal unit vectors of the plane through three points, (3, 3)."""
    x = points[1] - points[0]
    x /= np.linalg.norm(x)
    y = points[2] - points[0]
    y -= (y @ x) * x
    return points.mean(axis=0), x, y / np.linalg.norm(y)


def section(density: DifferenceMap, plane: tuple[Array, Array, Array], side: Array) -> Array:
    """Values on a square grid with the coordinates ``side`` [A] along both axes, (slow, fast)."""
    centre, x, y = plane
    points = centre + side[None, :, None] * x + side[:, None, None] * y
    values = [
        density.grid.tricubic_interpolation(gemmi.Position(*p)) for p in points.reshape(-1, 3)
    ]
    return np.reshape(values, points.shape[:2])


def draw_heights(axes: Axes, run: Path, reference: dict[str, float], residue: str) -> None:
    """Lines for the run after every epoch, dashed ones for the reference."""
    epochs, heights = heights_by_epoch(run / "peaks.csv", residue)
    for (site, values), colour in zip(heights.items(), COLOURS, strict=False):
        axes.plot(epochs, values, "o-", color=colour, markersize=4)
        axes.axhline(reference[site], color=colour, linestyle="--", linewidth=1.2)
        axes.annotate(site, (epochs[-1], values[-1]), (6, -3), textcoords="offset points")
    axes.plot([], [], "o-", color="#444444", markersize=4, label="braggflux")
    axes.plot([], [], "--", color="#444444", linewidth=1.2, label="DIALS")
    axes.legend(loc="lower left", ncols=2, bbox_to_anchor=(0, 1.0), borderpad=0)
    axes.set(xlabel="epoch", ylabel="anomalous peak [sigma]", xlim=(0.7, epochs[-1] + 1.3))
    axes.set_xticks(epochs)
    axes.grid(axis="y", color="#e6e6e6")


def draw_section(axes: Axes, density: DifferenceMap, atoms: dict[str, Array], title: str) -> None:
    """Density in the plane through three atoms [A]: grey, contours from 3 sigma on."""
    side = np.linspace(-14, 14, 141)
    centre, x, y = plane_through(np.array(list(atoms.values())))
    values = section(density, (centre, x, y), side)
    axes.imshow(
        values, origin="lower", extent=(side[0], side[-1]) * 2, cmap="Greys", vmin=-1, vmax=14
    )
    axes.contour(side, side, values, levels=LEVELS, colors="#0072b2", linewidths=0.9)
    for name, position in atoms.items():
        at = (float((position - centre) @ x), float((position - centre) @ y))
        axes.annotate(name, at, (0, -27), textcoords="offset points", ha="center", fontsize=9)
    axes.set(title=title, xlabel="A", xticks=[-10, 0, 10], yticks=[-10, 0, 10])


def main() -> None:
    """Read both results, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--reference", type=Path, required=True, help="merged MTZ of DIALS")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--residue", default="IOD", help="sites of the left part")
    parser.add_argument("--plane", nargs=3, default=["IOD204", "MET105", "IOD205"])
    args = parser.parse_args()

    merged = read_merged_mtz(args.run / "merged.mtz")
    d_min = float(inv_d2(merged.table.miller_index, merged.cell).max() ** -0.5)
    model = AnomalousModel(args.model, merged.cell, merged.space_group, d_min)
    ours, reference = (read_map(p, model) for p in (args.run / "merged.mtz", args.reference))
    heights = {f"{p.residue} {p.seqid}": p.peak_sigma for p in model.peaks_in(reference)}
    sites = {f"{s.residue}{s.seqid}": np.array(s.fractional[0]) for s in model.sites}
    orth = np.array(merged.cell.orth.mat.tolist())
    atoms = {f"{name[:3]} {name[3:]}": orth @ sites[name] for name in args.plane}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained")
        draw_heights(axes[0], args.run, heights, args.residue)
        draw_section(axes[1], reference, atoms, "DIALS")
        draw_section(axes[2], ours, atoms, "braggflux")
        figure.savefig(args.figure, dpi=110, metadata={"Date": None})


if __name__ == "__main__":
    main()
