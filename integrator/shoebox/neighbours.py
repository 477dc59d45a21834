"""Which spots reach into which: the pairs of a box and a neighbour that the model solves together.

Two spots are neighbours when their ellipsoids touch, in rotation angle too: their centroids are
nearer than ``reach`` sums of their standard deviations. So every voxel of a spot's own ellipsoid
that another spot claims belongs to one of its neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from braggflux.integrator.prediction.predict import Prediction
from braggflux.integrator.prediction.rocking import RockingWidth
from braggflux.integrator.shoebox.mask import Spots
from braggflux.integrator.shoebox.sweep import Sweep

IntArray = NDArray[np.int64]

MAX_NEIGHBOURS = 24
"""Of one box, the nearest: bounds the memory where rocking curves are very wide."""
CHUNK = 2048
"""Boxes whose neighbours are searched at a time: bounds the memory too."""


def find_neighbours(spots: Spots, n_boxes: int, reach: float) -> tuple[IntArray, IntArray]:
    """Find the neighbours of the first ``n_boxes`` spots among all.

    Parameters
    ----------
    spots : Spots
    n_boxes : int
    reach : float
        Standard deviations that each ellipsoid extends to; 0 finds none.

    Returns
    -------
    box, neighbour : ndarray, (M,)
        Rows of ``spots``, sorted by box and by distance.
    """
    if reach <= 0:  # all neighbours are masked
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    row, place = _places(spots, reach)
    tree = cKDTree(place)
    found = []
    for first in range(0, n_boxes, CHUNK):
        owns = (row >= first) & (row < min(first + CHUNK, n_boxes))
        pairs = cKDTree(place[owns]).sparse_distance_matrix(
            tree, 1.0, p=np.inf, output_type="ndarray"
        )
        both = np.column_stack([row[owns][pairs["i"]], row[pairs["j"]]])
        box, neighbour = np.unique(both, axis=0).T
        found.append(_touching(spots, box, neighbour, reach))
    box, neighbour = np.concatenate(found, 1)
    return box, neighbour


def _places(spots: Spots, reach: float) -> tuple[IntArray, NDArray[np.float64]]:
    """Places of the spots for a search within a radius of 1, (M, 4), and their rows (M,).

    Rocking curves differ in length, so that no single radius fits: a spot is entered once for
    each block of frames that it reaches into. Other blocks and panels are out of reach.
    """
    extent = reach * spots.sigma[:, 2]
    block = max(2.0 * float(np.median(extent)), 1.0)
    first = np.floor((spots.centre[:, 2] - extent) / block).astype(np.int64)
    n_blocks = np.floor((spots.centre[:, 2] + extent) / block).astype(np.int64) - first + 1
    row = np.repeat(np.arange(len(first)), n_blocks)
    step = np.arange(len(row)) - np.repeat(np.cumsum(n_blocks) - n_blocks, n_blocks)
    plane = spots.centre[row, :2] / (2 * reach * spots.sigma[:, :2].max(0))
    apart = np.column_stack([first[row] + step, spots.panel[row]])
    return row, np.column_stack([plane, 3.0 * apart])


def _touching(
    spots: Spots, box: IntArray, neighbour: IntArray, reach: float
) -> tuple[IntArray, IntArray]:
    """Pairs whose ellipsoids touch, by box and distance, the nearest of each box."""
    apart = spots.centre[box] - spots.centre[neighbour]
    distance = ((apart / (spots.sigma[box] + spots.sigma[neighbour])) ** 2).sum(1)
    kept = (distance < reach**2) & (box != neighbour)
    box, neighbour, distance = box[kept], neighbour[kept], distance[kept]
    order = np.lexsort((distance, box))
    box, neighbour = box[order], neighbour[order]
    is_near = np.arange(len(box)) - np.searchsorted(box, box) < MAX_NEIGHBOURS
    return box[is_near], neighbour[is_near]


def neighbour_columns(
    spots: Spots,
    listed: Prediction,
    sweep: Sweep,
    place: tuple[int, int],
    reach: float,
    rocking: RockingWidth,
) -> dict[str, NDArray[Any]]:
    """Columns of the pairs of a sweep, as the store has them.

    Parameters
    ----------
    spots : Spots
        Those with boxes, in the order of their rows, before the sweep's neighbours.
    listed : Prediction
        Of the spots with boxes.
    sweep : Sweep
    place : (int, int)
        Number of the sweep, and row of its first box in the store.
    reach : float
    rocking : RockingWidth

    Returns
    -------
    dict
        ``row`` of the box, and the fields of :class:`~braggflux.integrator.types.Neighbours`.
    """
    n_boxes, (experiment, first_row) = len(listed), place
    box, neighbour = find_neighbours(spots, n_boxes, reach)
    lattice = np.full(len(spots.centre), experiment)
    known = [listed] if sweep.neighbours is None else [listed, sweep.neighbours]
    zeta, d = (np.concatenate([getattr(k, c).numpy() for k in known]) for c in ("zeta", "d"))
    width = rocking.at(d.astype(np.float64))
    if sweep.neighbour_experiment is not None:
        lattice[n_boxes:] = sweep.neighbour_experiment
    moved = [(c[neighbour] - c[box]).astype(np.float32) for c in spots.centre.T]
    return {
        "row": box + first_row,
        "offset": np.column_stack(moved),
        "zeta": (zeta[neighbour] * width[box] / width[neighbour]).astype(np.float32),
        "experiment": lattice[neighbour],
        "store_row": np.where(neighbour < n_boxes, neighbour + first_row, -1),
    }
