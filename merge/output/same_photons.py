"""Intensities from the same photons: they agree better than their errors allow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Reflections of neighbouring resolution that share a scale, and the least of them all.
PER_SHELL, MIN_REFLECTIONS = 100, 50
MEDIAN_CHI2 = 0.4549
#: Squared residual over the variance of one of both below which the other is not independent. An
#: errorless model has 1, other data of the same quality 2; other programs' merges of the same
#: observations had 0.1 to 0.3, and sigmas may be too large by a third.
SAME_PHOTONS = 0.4


def residual_over_noise(intensity: Array, sigma: Array, other: Array, inv_d2: Array) -> float:
    """Median of ``(I - c I_other)^2 / sigma^2``, over that of a Normal; c is one in each shell.

    Parameters
    ----------
    intensity, sigma, other, inv_d2 : (R,)
        ``other`` is on any scale; NaN where there is none.

    Returns
    -------
    float
        Infinite where too few reflections have both.
    """
    usable = np.isfinite(intensity) & (sigma > 0) & np.isfinite(other) & (other > 0)
    # below one sigma the other may be a prior's mean
    strength = np.where(usable, intensity / np.where(usable, sigma, 1.0), 0.0)
    usable &= strength > 1.0
    rows = np.flatnonzero(usable)
    if len(rows) < MIN_REFLECTIONS:
        return float("inf")
    rows = rows[np.argsort(inv_d2[rows])]
    z = []
    for part in np.array_split(rows, max(1, len(rows) // PER_SHELL)):
        i, s, o = intensity[part], sigma[part], other[part]
        scale = np.sum(i * o / s**2) / np.sum(o**2 / s**2)
        z.append((i - scale * o) / s)
    return float(np.median(np.concatenate(z) ** 2)) / MEDIAN_CHI2
