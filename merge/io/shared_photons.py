"""Datasets made of the same photons: a sweep given twice, or scaled and not scaled.

Spots of one index at one place on the detector are compared. Noise that both have in common leaves
residuals far smaller than the errors of two measurements would.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.screening import SAME_PLACE, spot_positions

Array = NDArray[np.float64]

#: Pairs for a judgement, and the share of the smaller dataset that they must be.
MIN_PAIRS, MIN_SHARE = 50, 0.1
#: Stronger spots differ by their scales.
STRONGEST = 10.0
MEDIAN_CHI2 = 0.4549
#: Squared residual over the variance of both below which they are no two measurements.
ONE_MEASUREMENT = 0.15
#: About so many spots of each dataset are enough.
SPOTS_LOOKED_AT = 20_000
#: Odd factors of a hash.
PRIMES = np.array(
    [
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
        0xFF51AFD7ED558CCD,
        0x94D049BB133111EB,
    ],
    dtype=np.uint64,
)


class Spots:
    """Some spots of a dataset, each under one number for its index and place.

    Parameters
    ----------
    data : UnmergedData
    step : float or None
        Places that agree within it are one [units of the places]; None where a dataset has none
        and batches stand for them.
    one_in : int
        Share that is looked at, the same spots of all datasets.
    """

    def __init__(self, data: UnmergedData, step: float | None, one_in: int) -> None:
        place = spot_positions(data)
        if step is None or place is None:
            label = data.metadata.get("BATCH", data.image)[:, None]
        else:
            label = np.rint(place / step)
        table = np.column_stack([data.miller_index, label]).astype(np.int64)
        with np.errstate(over="ignore"):
            key = (table.astype(np.uint64) * PRIMES[: table.shape[1]]).sum(1) * PRIMES[-1]
        key ^= key >> np.uint64(29)
        self.rows = np.flatnonzero(key % np.uint64(one_in) == 0)
        self.key, self.data = key[self.rows], data

    def __len__(self) -> int:
        """Count the spots that are looked at."""
        return len(self.rows)


def shared_photons(data: Sequence[UnmergedData]) -> list[tuple[int, int, float]]:
    """Find the pairs of datasets that hold the same photons.

    Returns
    -------
    list of (int, int, float)
        Numbers of both, and their squared residuals over those of two measurements: 0 where
        intensities and sigmas are equal.
    """
    places = [place for d in data if (place := spot_positions(d)) is not None]
    step = None
    if len(places) == len(data):
        step = max(SAME_PLACE * max(float(np.ptp(p, axis=0).max()) for p in places), 1e-6)
    one_in = max(1, int(np.mean([len(d) for d in data])) // SPOTS_LOOKED_AT)
    spots = [Spots(d, step, one_in) for d in data]
    found = []
    for first, second in combinations(range(len(data)), 2):
        ratio = residual_of_pairs(spots[first], spots[second])
        if ratio < ONE_MEASUREMENT:
            found.append((first, second, ratio))
    return found


def residual_of_pairs(first: Spots, second: Spots) -> float:
    """Median of ``(I - c I')^2 / (sigma^2 + c^2 sigma'^2)`` over that of a Normal.

    c is one for each image of ``first``. Infinite where too few spots pair.
    """
    # an index that is twice at one place pairs once
    _, i, j = np.intersect1d(first.key, second.key, return_indices=True)
    if len(i) < max(MIN_PAIRS, MIN_SHARE * min(len(first), len(second))):
        return float("inf")
    a, b, i, j = first.data, second.data, first.rows[i], second.rows[j]
    if np.array_equal(a.intensity[i], b.intensity[j]) and np.array_equal(a.sigma[i], b.sigma[j]):
        return 0.0
    scale = _image_ratio(a, b, i, j)
    variance = a.sigma[i] ** 2 + (scale * b.sigma[j]) ** 2
    chi2 = (a.intensity[i] - scale * b.intensity[j]) ** 2 / variance
    weak = np.abs(a.intensity[i]) < STRONGEST * a.sigma[i]
    if weak.sum() < MIN_PAIRS:
        weak[:] = True
    return float(np.median(chi2[weak])) / MEDIAN_CHI2


def _image_ratio(
    first: UnmergedData,
    second: UnmergedData,
    i: NDArray[np.int64],
    j: NDArray[np.int64],
) -> Array:
    """Scale of the second to the first on each image of the first, (P,): of the sums of both."""
    image = first.image[i]
    n = first.n_images
    above = np.bincount(image, np.maximum(first.intensity[i], 0), minlength=n)
    below = np.bincount(image, np.maximum(second.intensity[j], 0), minlength=n)
    return (above / np.where(below > 0, below, np.inf))[image]
