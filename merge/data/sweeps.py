"""Places of rotation data on their sweeps, on which their scale depends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.records import TensorRecord
from braggflux.merge.data.columns import Columns
from braggflux.merge.io.sweep_columns import BEAMS, FRAME, FRAME_WIDTH, ROCKING, SWEEP, ZETA

Array = NDArray[np.float64]

MIN_ZETA = 0.05
MIN_ROCKING = 0.01  # [frames]


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
    rocking : Tensor or None
        Standard deviation of the rocking curve [frames], without the frame's own width, where
        it is known.
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
    rocking: Tensor | None = None

    @property
    def has_positions(self) -> bool:
        """The file says where on the detector observations lie."""
        return bool((self.xyz_px[:, :2] != 0).any())

    @property
    def n_frames_each(self) -> Tensor:
        """Frames of the sweep of each observation, (N,)."""
        return torch.as_tensor(self.n_frames)[self.experiment]

    @property
    def spans_deg(self) -> tuple[float, ...]:
        """Rotation of each sweep [deg]."""
        both = zip(self.n_frames, self.frame_width_deg, strict=True)
        return tuple(abs(n * width) for n, width in both)

    @property
    def angle_deg(self) -> Tensor:
        """Rotation of each observation from the start of its sweep, (N,) [deg]."""
        widths = torch.as_tensor(self.frame_width_deg, dtype=torch.float64)
        return (self.xyz_px[:, 2].double() * widths[self.experiment]).abs()

    def knots_along(self, spacing_deg: float) -> tuple[int, ...]:
        """Count knots from end to end of each sweep, about so far apart; at least 2."""
        return tuple(max(2, round(span / spacing_deg) + 1) for span in self.spans_deg)

    def detector_centre(self) -> tuple[Tensor, Tensor]:
        """Middle of the spots on the detector, and half of the width that they cover, (2,)."""
        xy = self.xyz_mm[:, :2].double()
        low, high = xy.min(0).values, xy.max(0).values
        return (high + low) / 2, ((high - low) / 2).clamp_min(1e-6)

    def scaled_position(self, centre: Tensor, half_width: Tensor) -> Tensor:
        """Return places on the detector, (N, 2), in units of :meth:`detector_centre`."""
        return (self.xyz_mm[:, :2].double() - centre) / half_width


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
        With :data:`~braggflux.merge.io.sweep_columns.SWEEP_COLUMNS`; ``ROCKING`` is used where
        all have it.
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
    rocking = None
    if all(ROCKING in d for d in metadata):
        rocking = torch.as_tensor(np.maximum(joined(ROCKING) / np.abs(width), MIN_ROCKING))
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
        rocking=rocking,
    )


#: Missing batches that a sweep may have where nothing says how the crystal was turned.
MAX_GAP = 100
#: Rotation of such a sweep [deg], at most.
USUAL_SPAN = 180.0


def plain_sweep_table(
    columns: Columns, rotation: Array | None, order: NDArray[np.int64]
) -> SweepTable:
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
