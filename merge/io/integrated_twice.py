"""Sweeps of one DIALS table that were integrated from the same images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import ReflectionTable
from braggflux.integrator.io.dials.sweeps import images_of, shared_images

#: Fewer spots than these on common images are no judgement.
MIN_SPOTS = 20


def check_integrated_once(
    models: Sequence[Experiment],
    number: NDArray[np.int64],
    table: ReflectionTable,
    intensity: NDArray[np.float64],
) -> None:
    """Refuse sweeps that measure the same spots of the same images with different results.

    Equal results are copies (slices that overlap), of which each counts once, and rows that a
    table has shared out between two members are no repetition.

    Parameters
    ----------
    models : sequence of Experiment
        Sweeps.
    number : ndarray, (N,) int64
        Sweep of each row.
    table : ReflectionTable
        Frames counted from the start of each scan.
    intensity : ndarray, (N,)

    Raises
    ------
    UserError
    """
    for shared in shared_images(models):
        rows = []
        for i in (shared.first, shared.second):
            is_common = np.array([image in shared.images for image in images_of(models[i])])
            of_sweep = np.flatnonzero(number == i)
            frame = np.floor(table["xyzcal.px"][of_sweep, 2]).astype(int)
            rows.append(of_sweep[is_common[frame.clip(0, len(is_common) - 1)]])
        n_equal = len(np.intersect1d(intensity[rows[0]], intensity[rows[1]]))
        one, other = (table["miller_index"][r] for r in rows)
        n_same = _n_same_index(one, other, shared.change)
        fewest = min(map(len, rows))
        if fewest >= MIN_SPOTS and n_same - n_equal > fewest / 2:
            raise UserError(
                f"{table.source}: experiments {shared.first} and {shared.second} of those with "
                f"reflections are the same lattice on the same {len(shared.images)} images, and "
                f"{n_same} reflections were integrated in both, whose photons would count twice: "
                "leave one of the experiments out (dials.split_experiments)"
            )


def _n_same_index(
    first: NDArray[np.int32], second: NDArray[np.int32], change: NDArray[np.int64]
) -> int:
    """Count the Miller indices that both have, those of the second brought to the first."""
    both = {tuple(h) for h in first.tolist()} & {tuple(h) for h in (second @ change.T).tolist()}
    return len(both)
