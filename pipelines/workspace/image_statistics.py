"""Statistics of each image: what scaling made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import reading
from braggflux.pipelines.workspace.records.readers import REMEDY, read_table
from braggflux.pipelines.workspace.rundir import write_rows

Array = NDArray[np.float64]

COLUMNS = ("dataset", "image", "n_obs", "scale", "b_factor", "r", "i_over_sigma", "chi2")
#: Fewer observations, or a narrower range of resolution, give no B.
MIN_OBSERVATIONS = 20
#: Median of the chi-square distribution with one degree of freedom.
MEDIAN_CHI2 = 0.45493642311957283


@dataclass(frozen=True)
class ImageStatistics:
    """One entry for each image, (G,); NaN where there is none.

    Parameters
    ----------
    image : (G,) int
    n_obs : (G,) int
    scale : (G,)
        Median of K in I_observed = K I, relative to the median image.
    b_factor : (G,)
        B [A^2] of K ~ exp(-B / (2 d^2)), less that of the median image: positive where an image
        falls off faster.
    r : (G,)
        sum |I - <I>| / sum <I>, of single observations.
    i_over_sigma : (G,)
        Mean over the observations.
    chi2 : (G,)
        Median squared residual over its variance, 1 where sigmas are right.
    """

    image: NDArray[np.int64]
    n_obs: NDArray[np.int64]
    scale: Array
    b_factor: Array
    r: Array
    i_over_sigma: Array
    chi2: Array

    @classmethod
    def of(
        cls,
        image: NDArray[np.int64],
        log_scale: Array,
        inv_d2: Array,
        intensity: Array,
        sigma: Array,
        expected: Array,
    ) -> Self:
        """Go through observations, (N,) each, in any order; what is not finite does not count."""
        known = np.isfinite(intensity) & np.isfinite(sigma) & np.isfinite(expected) & (sigma > 0)
        columns = (log_scale, inv_d2, intensity, sigma, expected)
        log_scale, inv_d2, intensity, sigma, expected = (
            np.asarray(x, dtype=float)[known] for x in columns
        )
        names, at = np.unique(np.asarray(image)[known], return_inverse=True)
        n = len(names)

        def total(values: NDArray[Any]) -> Array:
            return np.asarray(np.bincount(at, values, n), dtype=float)

        def median(values: Array) -> Array:
            order = np.argsort(at, kind="stable")
            parts = np.split(values[order], np.cumsum(np.bincount(at, minlength=n))[:-1])
            return np.array([np.median(part) for part in parts]) if n else np.empty(0)

        n_obs = np.bincount(at, minlength=n)
        level = median(log_scale)
        with np.errstate(all="ignore"):
            mean_x, mean_y = total(inv_d2) / n_obs, total(log_scale) / n_obs
            dx, dy = inv_d2 - mean_x[at], log_scale - mean_y[at]
            slope = total(dx * dy) / total(dx * dx)
            slope[n_obs < MIN_OBSERVATIONS] = np.nan
            r = total(np.abs(intensity - expected)) / total(expected)
        return cls(
            names,
            n_obs,
            np.exp(level - np.nanmedian(level)) if np.isfinite(level).any() else level,
            -2.0 * (slope - np.nanmedian(slope)) if np.isfinite(slope).any() else slope,
            r,
            total(intensity / sigma) / np.maximum(n_obs, 1),
            median((intensity - expected) ** 2 / sigma**2) / MEDIAN_CHI2,
        )


def write_image_statistics(
    path: Path, statistics: ImageStatistics, numbers: NDArray[Any], datasets: Sequence[str]
) -> None:
    """Write images.csv; ``numbers`` and ``datasets``, (G,), name image and dataset."""
    rows = [
        {"dataset": datasets[k], "image": int(numbers[k]), "n_obs": int(statistics.n_obs[k])}
        | {
            name: f"{value:.5g}" if np.isfinite(value := getattr(statistics, name)[k]) else None
            for name in COLUMNS[3:]
        }
        for k in range(len(statistics.image))
    ]
    write_rows(path, rows, COLUMNS)


def read_image_statistics(path: Path, dataset: str = "") -> ImageStatistics | None:
    """Read the images of a dataset (of all without); None where there are none."""
    found = read_table(path, COLUMNS)
    rows = [row for row in found if not dataset or row["dataset"] == dataset]
    if not rows:
        return None
    columns = [np.array([float(row[name] or "nan") for row in rows]) for name in COLUMNS[3:]]
    with reading(path, REMEDY):
        image, n_obs = (np.array([int(row[name]) for row in rows]) for name in ("image", "n_obs"))
    return ImageStatistics(image, n_obs, *columns)
