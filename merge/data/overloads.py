"""Overloaded spots: where a file's intensities stop being proportional to photons.

A detector saturates. Integration programs that keep such a spot fit its profile to the pixels that
are left, or extrapolate: the intensity then no longer follows the beam and its sigma is several
times what it is for spots a little weaker. Counting makes sigma / I fall with I, an error of the
instrument makes it level off; neither lets it rise. A level above which it does is therefore the
detector's, and what lies above says only that the reflection is strong. Such observations are few
but those of the strongest amplitudes, often the only ones of low angles.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from braggflux.merge.io.observations import UnmergedData

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

#: Rise of the median sigma / I over its least value among weaker spots that counting forbids.
RISE = 2.0
#: Spots in a step of I, and in the least group of overloads that is believed.
PER_STEP = 25
#: Width of a step of log I.
STEP = 0.2
#: Overloads are looked for among the brightest spots only.
MAX_SHARE = 0.05


def is_overloaded(data: Sequence[UnmergedData]) -> NDArray[np.bool_]:
    """Observations above the level of their file, (N,), file after file."""
    found = []
    for d in data:
        level = overload_level(np.asarray(d.intensity), np.asarray(d.sigma))
        found.append(d.intensity > level)
        if found[-1].any():
            logger.info(
                "%s: %d spots above %.4g are overloaded (sigma / I rises there) and left out",
                *(d.name, found[-1].sum(), level),
            )
    return np.concatenate(found)


def overload_level(intensity: Array, sigma: Array) -> float:
    """Intensity above which spots are overloaded; infinity where none are.

    Parameters
    ----------
    intensity, sigma : (N,)
        As the file has them, before any scale: saturation belongs to the raw intensity.
    """
    usable = np.isfinite(intensity) & (sigma > 0) & (intensity > 3 * sigma)
    n_top = int(MAX_SHARE * usable.sum())
    if n_top < 3 * PER_STEP:
        return np.inf
    value, error = intensity[usable], sigma[usable]
    order = np.argsort(value)[-n_top:]
    value, relative = value[order], error[order] / value[order]
    step = np.floor(np.log(value / value[0]) / STEP).astype(int)
    edges = _steps_of_enough(step)
    medians = np.array([np.median(relative[a:b]) for a, b in pairwise(edges)])
    least = np.minimum.accumulate(medians)
    risen = medians > RISE * least
    if not risen[-1]:
        return np.inf
    # the last run of steps that all stand above: one odd step in between is not the detector
    first = len(risen) - int(np.argmin(risen[::-1])) if not risen.all() else 0
    return float(value[edges[first]])


def _steps_of_enough(step: NDArray[np.int64]) -> list[int]:
    """First spot of each step, steps joined until each has ``PER_STEP`` spots; then the end."""
    bounds = [0, *(np.flatnonzero(np.diff(step)) + 1).tolist(), len(step)]
    edges = [0]
    for bound in bounds[1:]:
        if bound - edges[-1] >= PER_STEP:
            edges.append(bound)
    edges[-1] = len(step)
    return edges
