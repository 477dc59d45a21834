"""Error of each observation by what a hot region puts under the spot or beside it.

    python benchmarks/hot_regions.py truth.npz ours=RUN/integrated.refl DIALS=integrated.refl ...

``truth.npz`` is the simulator's (``braggflux simulate --effects hot-regions``); tables and columns
are those of ``overlaps.py``, ``leak`` being the part of the region's photons that the error
follows.

Classes:

``under``   the region adds more than one standard error to a sum over the spot
``faint``   a tenth of it to all of it
``beside``  less, but it reaches into the box
``away``    none of these
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from overlaps import matched, row_of

Array = NDArray[np.float64]

BOX = 7.0  # pixels to either side
ALONG = 2.0  # standard deviations of the rocking curve that a sum over the spot takes


def region_photons(
    xyz: Array, regions: Array, spot: float, frame_sigma: float
) -> tuple[Array, NDArray[np.bool_]]:
    """Photons of regions in a sum over each spot (N,), and whether one reaches into its box.

    The spot is a Gaussian of ``spot`` pixels, which weights the pixels of the sum.
    """
    photons, near = np.zeros(len(xyz)), np.zeros(len(xyz), dtype=bool)
    low, high = (xyz[:, 2] + sign * ALONG * frame_sigma for sign in (-1, 1))
    for _, fast, slow, radius, first, last, counts in regions:
        away = xyz[:, :2] - (fast, slow)
        n_frames = (np.minimum(high, last) - np.maximum(low, first)).clip(0)
        both = radius**2 + spot**2
        overlap = np.exp(-0.5 * (away**2).sum(1) / both) * 4 * np.pi * (radius * spot) ** 2 / both
        photons += counts * n_frames * overlap
        near |= (n_frames > 0) & (np.abs(away).max(1) < BOX + 2 * radius)
    return photons, near


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("truth", type=Path)
    parser.add_argument("tables", nargs="+", metavar="NAME=TABLE.refl")
    parser.add_argument("--d-min", type=float, default=0.0)
    parser.add_argument("--spot", type=float, default=0.8, help="standard deviation [pixels]")
    parser.add_argument("--sigma-m", type=float, default=0.14, help="rocking curve [deg]")
    parser.add_argument("--width", type=float, default=0.5, help="of a frame [deg]")
    arguments = parser.parse_args()
    with np.load(arguments.truth) as file:
        names = ("miller_index", "xyz_px", "photons", "recorded", "d", "hot_regions")
        truth = {k: file[k] for k in names}
    frame_sigma = float(np.hypot(arguments.sigma_m / arguments.width, 12**-0.5))
    spot = float(np.hypot(arguments.spot, 12**-0.5))
    put, near = region_photons(truth["xyz_px"], truth["hot_regions"], spot, frame_sigma)
    tables = dict(given.split("=", 1) for given in arguments.tables)
    found = {name: matched(truth, Path(path)) for name, path in tables.items()}
    common = (truth["recorded"] > 0.98) & (truth["d"] >= arguments.d_min)
    for name, (value, _) in found.items():
        print(f"{name}: {np.isfinite(value).sum()} of {len(value)} observations")
        common &= np.isfinite(value)
    # a sum over the spot on a background of .3 photons a pixel
    error = np.sqrt(truth["photons"] + 0.3 * 4 * np.pi * spot**2 * 4 * frame_sigma + 1)
    classes = {
        "under": put > error,
        "faint": (put > 0.1 * error) & (put <= error),
        "beside": (put <= 0.1 * error) & near,
        "away": (put <= 0.1 * error) & ~near,
    }
    print("class        table      n      rms   (spread)   bias  leak %      z  rms z")
    for label, members in classes.items():
        rows = common & members
        for name, (value, sigma) in found.items():
            error_of = value[rows] - truth["photons"][rows]
            print(f"{label:>7} {name:>10} {row_of(error_of, sigma[rows], put[rows])}")


if __name__ == "__main__":
    main()
