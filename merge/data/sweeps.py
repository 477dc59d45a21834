"""Where the observations of rotation data lie on their sweeps: what their scale depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.records import TensorRecord
from braggflux.merge.data.columns import Columns
from braggflux.merge.io.sweep_columns import BEAMS, FRAME, FRAME_WIDTH, SWEEP, ZETA

Array = NDArray[np.float64]

MIN_ZETA = 0.05


@dataclass(frozen=True)
class SweepTable(TensorRecord):
    """Places of all observations of a table, in its order, (N,) or (N, 3) each.

    Parameters
    ----------
    experiment : Tensor, int64
        Sweep, counted through all datasets.
    xyz_px, xyz_mm : Tensor
        (fast, slow, frame) from the start of the sweep; in pixels both.
    degrees : Tensor
        Rotation across one frame times ``|zeta|`` [deg]: a mosaic spread of so much is one frame.
    s0_crystal, s1_crystal : Tensor
    d : Tensor
        [A]
    n_frames : tuple of int
        Of each sweep.
    frame_width_deg : tuple of float
        [deg]
    has_beams : bool
        Directions of the beams are known; ``s0_crystal`` and ``s1_crystal`` are 0 otherwise.
    """

    experiment: Tensor
    xyz_px: Tensor
    xyz_mm: Tensor
    degrees: Tensor
    s0_crystal: Tensor
    s1_crystal: Tensor
    d: Tensor
    n_frames: tuple[int, ...]
    frame_width_deg: tuple[float, ...]
    has_beams: bool = True

    @property
    def has_positions(self) -> bool:
        """The file says where on the detector observations lie."""
        return bool((self.xyz_px[:, :2] != 0).any())

    @property
    def lp(self) -> Tensor:
        """1: what is known of the scale is known already."""
        return torch.ones_like(self.d)

    @property
    def frame_sigma(self) -> Tensor:
        """Of a rocking curve within one frame."""
        return torch.full_like(self.d, 12**-0.5)


def sweep_table(
    metadata: Sequence[Mapping[str, Array]],
    position: Array,
    inv_d2: Array,
    order: NDArray[np.int64],
) -> SweepTable:
    """Take the places from the metadata of all datasets.

    Parameters
    ----------
    metadata : sequence of mapping
        With :data:`~braggflux.merge.io.sweep_columns.SWEEP_COLUMNS`.
    position : (N0, 2)
        Of the spots on the detector [px].
    inv_d2 : (N0,)
        [1/A^2]
    order : (N,)
        Observations of the table.
    """

    def joined(name: str) -> Array:
        return np.concatenate([np.asarray(d[name], float) for d in metadata])[order]

    dataset = np.repeat(np.arange(len(metadata)), [len(d[SWEEP]) for d in metadata])[order]
    pair = np.stack([dataset, joined(SWEEP).astype(np.int64)])
    experiment = np.unique(pair, axis=1, return_inverse=True)[1].ravel()
    frame, width = joined(FRAME), joined(FRAME_WIDTH)
    n_sweeps = int(experiment.max()) + 1
    last = np.zeros(n_sweeps)
    np.maximum.at(last, experiment, frame)
    widths = np.zeros(n_sweeps)
    widths[experiment] = width
    xyz = torch.as_tensor(np.column_stack([position[order], frame]))
    beams = torch.as_tensor(np.stack([joined(name) for name in BEAMS], axis=1))
    return SweepTable(
        torch.as_tensor(experiment),
        xyz,
        xyz,
        torch.as_tensor(width * np.maximum(np.abs(joined(ZETA)), MIN_ZETA)),
        beams[:, :3],
        beams[:, 3:],
        torch.as_tensor(inv_d2[order] ** -0.5),
        tuple(int(n) for n in np.floor(last) + 1),
        tuple(widths.tolist()),
    )


#: Missing batches that a sweep may have where nothing says how the crystal was turned.
MAX_GAP = 100
#: Rotation of such a sweep [deg], at most.
USUAL_SPAN = 180.0


def plain_sweep_table(columns: Columns, rotation: Array | None, order: NDArray) -> SweepTable:
    """Take the places from batch numbers, and from the rotation where a file has it.

    Batches follow each other on the scan; where they do not, another sweep begins.

    Parameters
    ----------
    columns : Columns
    rotation : (N0,) or None
        [deg]
    order : (N,)
        Observations of the table.
    """
    image, first = np.unique(columns.image, return_index=True)
    batch, dataset = columns.frame[first], columns.dataset[first]
    step = np.maximum(np.diff(batch), 1)
    begins = (np.diff(dataset) != 0) | (np.diff(batch) > MAX_GAP)
    begins |= np.diff(columns.member[first]) != 0
    width = np.full(len(image), np.nan)
    if rotation is not None:
        which = np.searchsorted(image, columns.image)
        mean = np.bincount(which, rotation) / np.bincount(which)
        turn = np.diff(mean) / step
        width[:] = np.median(turn) if len(turn) else 1.0
        # centroids scatter within their images
        begins |= np.abs(np.diff(mean) - width[0] * step) > 2 * abs(width[0]) + 0.1
    sweep = np.concatenate([[0], np.cumsum(begins)])
    start = np.flatnonzero(np.concatenate([[True], begins]))
    frame = (batch - batch[start][sweep]).clip(0) + 0.5
    n_frames = np.zeros(len(start))
    np.maximum.at(n_frames, sweep, np.ceil(frame))
    if rotation is None or not width[0]:
        widths = np.minimum(1.0, USUAL_SPAN / n_frames)
    else:
        widths = np.full(len(start), width[0])
    own = np.searchsorted(image, columns.image[order])
    position = columns.position
    if position is None:
        position = np.zeros((len(columns.image), 2))
    xyz = torch.as_tensor(np.column_stack([position[order], frame[own]]))
    nowhere = torch.zeros(len(order), 3, dtype=torch.float64)
    return SweepTable(
        torch.as_tensor(sweep[own]),
        xyz,
        xyz,
        torch.as_tensor(np.abs(widths)[sweep[own]]),
        nowhere,
        nowhere,
        torch.as_tensor(columns.inv_d2[order] ** -0.5),
        tuple(int(n) for n in n_frames),
        tuple(widths.tolist()),
        has_beams=False,
    )
