"""Error of each observation against the distance to the next spot, beside the truth.

    python benchmarks/overlaps.py truth.npz ours=RUN/integrated.refl DIALS=integrated.refl ...

``truth.npz`` is the simulator's (``braggflux simulate --preset crowded``); each other argument
names a table of integrated reflections with ``intensity.prf.*`` [photons]. Only observations
that all tables have are compared. The *next spot* is the nearest on the detector of those whose
rocking curves overlap with the spot's own (centres within three of their joint standard
deviations). With ``--other truth_second.npz`` (``--effects second-lattice``) it is the nearest of
the other lattice, and ``--distances`` are what suits: 1 2 3 5.

Columns, by distance and by true photons of the observation:

``n``      observations
``rms``    root mean square error, and the half width of its 68 % range in brackets [photons]
``bias``   mean error [photons], winsorised at the 1st and 99th percentile
``leak``   part of the nearest neighbour's photons that the error follows [%], a robust slope
``z``      robust spread and root mean square of error over the table's own sigma
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from braggflux.integrator.io.dials import DialsFlag, read_reflections

Array = NDArray[np.float64]

DISTANCES = (3.4, 3.8, 5.0)  # pixels
PHOTONS = (-np.inf, 30.0, 300.0, np.inf)
WITHIN = 3.0  # joint standard deviations of the rocking curves
MATCH = np.array([2.0, 2.0, 3.0])  # pixels, pixels, frames


def next_spots(
    xyz: Array, frame_sigma: float, other: Array | None = None, reach: float = 12.0
) -> tuple[Array, Array]:
    """Distance to the next spot [pixels] (N,), and its row (N,); infinite and -1 without one.

    Of the same places ``xyz`` (N, 3), or of ``other`` (M, 3).
    """
    beside = xyz if other is None else other
    pairs = cKDTree(xyz[:, :2]).sparse_distance_matrix(
        cKDTree(beside[:, :2]), reach, output_type="ndarray"
    )
    first, second, distance = pairs["i"], pairs["j"], pairs["v"]
    apart = np.abs(xyz[first, 2] - beside[second, 2])
    kept = apart < WITHIN * np.sqrt(2) * frame_sigma
    if other is None:
        kept &= first != second
    first, second, distance = first[kept], second[kept], distance[kept]
    order = np.lexsort((distance, first))
    rows, where = np.unique(first[order], return_index=True)
    nearest, row = np.full(len(xyz), np.inf), np.full(len(xyz), -1)
    nearest[rows], row[rows] = distance[order][where], second[order][where]
    return nearest, row


def matched(truth: dict[str, Array], table: Path) -> tuple[Array, Array]:
    """Intensity and sigma of each true observation, (N,); NaN where the table has none."""
    found = read_reflections(table)
    usable = found.has_flag(DialsFlag.INTEGRATED_PRF) & (found["intensity.prf.variance"] > 0)
    rows = np.flatnonzero(usable)
    far = 1e3
    tree = cKDTree(
        np.hstack([found["miller_index"][rows] * far, found["xyzcal.px"][rows] / MATCH])
    )
    query = np.hstack([truth["miller_index"] * far, truth["xyz_px"] / MATCH])
    distance, at = tree.query(query, distance_upper_bound=2.0)
    known = np.isfinite(distance)
    value, sigma = np.full((2, len(query)), np.nan)
    value[known] = found["intensity.prf.value"][rows[at[known]]]
    sigma[known] = np.sqrt(found["intensity.prf.variance"][rows[at[known]]])
    return value, sigma


def row_of(error: Array, sigma: Array, neighbour: Array) -> str:
    """One row of the table, see the module."""
    low, high = np.quantile(error, [0.1587, 0.8413])
    bias = error.clip(*np.quantile(error, [0.01, 0.99])).mean()
    z = error / sigma
    spread = np.diff(np.quantile(z, [0.1587, 0.8413]))[0] / 2
    # weights fall with the expected noise, so that bright spots do not decide
    weight = 1 / (sigma**2 + 1)
    centred = neighbour - np.average(neighbour, weights=weight)
    bounded = error.clip(-4 * sigma, 4 * sigma)
    leak = (weight * centred * bounded).sum() / (weight * centred**2).sum()
    return (
        f"{len(error):6d} {np.sqrt((error**2).mean()):8.1f} ({(high - low) / 2:6.1f}) {bias:7.2f} "
        f"{100 * leak:7.2f} {spread:6.2f} {np.sqrt((z.clip(-20, 20) ** 2).mean()):6.2f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("tables", nargs="+", metavar="NAME=TABLE.refl")
    parser.add_argument("--other", type=Path, metavar="NPZ", help="truth of the other lattice")
    parser.add_argument("--distances", nargs="+", type=float, default=list(DISTANCES))
    parser.add_argument("--d-min", type=float, default=0.0)
    parser.add_argument("--sigma-m", type=float, default=0.27, help="rocking curve [deg]")
    parser.add_argument("--width", type=float, default=0.5, help="of a frame [deg]")
    arguments = parser.parse_args()
    with np.load(arguments.truth) as file:
        truth = {k: file[k] for k in ("miller_index", "xyz_px", "photons", "recorded", "d", "lp")}
    other = truth
    if arguments.other is not None:
        with np.load(arguments.other) as file:
            other = {k: file[k] for k in ("xyz_px", "photons")}
    distance, neighbour = next_spots(
        truth["xyz_px"],
        arguments.sigma_m / arguments.width,
        None if other is truth else other["xyz_px"],
    )
    beside = np.where(neighbour >= 0, other["photons"][neighbour], 0.0)
    tables = dict(given.split("=", 1) for given in arguments.tables)
    found = {name: matched(truth, Path(path)) for name, path in tables.items()}
    common = (truth["recorded"] > 0.98) & (truth["d"] >= arguments.d_min)
    for name, (value, _) in found.items():
        print(f"{name}: {np.isfinite(value).sum()} of {len(value)} observations")
        common &= np.isfinite(value)
    for low, high in itertools.pairwise(PHOTONS):
        print(f"\n{low:g} to {high:g} photons")
        print("distance        table      n      rms   (spread)   bias  leak %      z  rms z")
        for near, far in itertools.pairwise((0.0, *arguments.distances, np.inf)):
            rows = common & (distance >= near) & (distance < far)
            rows &= (truth["photons"] >= low) & (truth["photons"] < high)
            if rows.sum() < 20:
                continue
            for name, (value, sigma) in found.items():
                error = value[rows] - truth["photons"][rows]
                text = row_of(error, sigma[rows], beside[rows])
                print(f"{near:4.1f} to {far:4.1f} {name:>9} {text}")


if __name__ == "__main__":
    main()
