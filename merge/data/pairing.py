"""Exposures of the same crystal orientations: which observations belong together.

In pump-probe series every orientation is recorded dark and light. What a reflection suffers on its
way (absorption, position on the crystal, the beam's spectrum there) is then the same in all
datasets. Two observations are paired when image number and indices agree and their spots lie at
one place: nearest to each other, mutually, within a tolerance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Spots further apart than this share of the detector are different ones.
TOLERANCE = 0.005


def paired_clusters(
    dataset: NDArray[np.int64],
    frame: NDArray[np.int64],
    miller_index: NDArray[np.int32],
    position: Array,
) -> NDArray[np.int64]:
    """Cluster of each observation, (N,): the row of its partner in dataset 0, or its own.

    Parameters
    ----------
    dataset, frame : (N,)
        ``frame``: image number within the dataset.
    miller_index : (N, 3)
    position : (N, 2)
        Of the spot on the detector, any unit.
    """
    # 14 MiB that most merges do without
    from scipy.spatial import cKDTree

    span = np.ptp(position, axis=0).max() or 1.0
    # other images and other indices are out of reach whatever their spots
    apart = np.column_stack([frame, miller_index]).astype(float)
    points = np.column_stack([position / (span * TOLERANCE), 10.0 * apart])
    cluster = np.arange(len(dataset))
    reference = np.flatnonzero(dataset == 0)
    tree = cKDTree(points[reference])
    for k in range(1, int(dataset.max()) + 1):
        own = np.flatnonzero(dataset == k)
        distance, nearest = tree.query(points[own], distance_upper_bound=1.0)
        found = np.isfinite(distance)
        back = cKDTree(points[own]).query(points[reference[nearest[found]]])[1]
        mutual = back == np.flatnonzero(found)
        cluster[own[found][mutual]] = reference[nearest[found][mutual]]
    return cluster
