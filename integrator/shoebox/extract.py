"""Cut shoeboxes out of the frames in one pass.

Rows are sorted by their first frame, so that the boxes open on a frame are consecutive rows, all
are filled with one gather, and finished ones leave for the file in order. Memory holds one frame,
the open boxes, and images of the background statistic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials.sweeps import describe_experiment
from braggflux.integrator.io.shoebox_store import ShoeboxStore, ShoeboxWriter, writing_store
from braggflux.integrator.prediction.rocking import frame_sigma, frames_per_layer, min_zeta
from braggflux.integrator.shoebox.background import BackgroundAccumulator, where_spots_are_known
from braggflux.integrator.shoebox.canvas import FrameCanvas
from braggflux.integrator.shoebox.defects import BoxGeometry, remove_from_boxes, report
from braggflux.integrator.shoebox.extent import SpotExtent
from braggflux.integrator.shoebox.kernels.boxes import fill_boxes
from braggflux.integrator.shoebox.mask import (
    MaskBit,
    MaskSettings,
    SpotMap,
    edge_flags,
    predicted_spots,
    window_half,
)
from braggflux.integrator.shoebox.neighbours import neighbour_columns
from braggflux.integrator.shoebox.spikes import SpikeFilter
from braggflux.integrator.shoebox.sweep import Sweep
from braggflux.integrator.types import Flag, ReflectionMetadata

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MIN_RECORDED = 0.1
"""Share of a Gaussian spot that must be recorded for a reflection to be usable."""


def extract_shoeboxes(
    sweeps: Sequence[Sweep],
    extent: SpotExtent,
    store_path: str | Path,
    *,
    settings: MaskSettings | None = None,
    attributes: dict[str, object] | None = None,
    find_defects: bool = True,
    progress: Progress | None = None,
) -> ShoeboxStore:
    """Write the shoeboxes of all sweeps to a store; every frame is read once.

    Parameters
    ----------
    sweeps : sequence of Sweep
    extent : SpotExtent
        Shared by all sweeps, which share the box.
    store_path : str or Path
    settings : MaskSettings, optional
    attributes : dict, optional
        Further attributes of the file (software version, d_min ...).
    find_defects : bool
        Leave out zingers, hot pixels and shadows that the masks of the frames do not know.
    progress : callable, optional
        Called with (frames done, frames in all).

    Returns
    -------
    ShoeboxStore
        Opened.

    Raises
    ------
    UserError
        Without reflections, or when no voxel of any box was recorded.
    """
    settings = settings or MaskSettings()
    n_rows = sum(len(sweep.prediction) for sweep in sweeps)
    if n_rows == 0:
        raise UserError(
            "no reflection falls on the frames: check that the EXPT and REFL files belong "
            "together, or give a smaller --d-min"
        )
    total = sum(sweep.frames.n_images for sweep in sweeps)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with writing_store(store_path, n_rows, extent.box, _count_type(sweeps)) as writer:
        columns, pairs, first, max_count = [], [], 0, 0
        for number, sweep in enumerate(sweeps):
            cutter = _SweepCutter(sweep, extent, settings, writer, first, find_defects)
            with closing(cutter):
                for frame in range(sweep.frames.n_images):
                    cutter.add_frame(frame)
                    tick()
                columns.append(cutter.finish(number))
            pairs.append(cutter.neighbours(number))
            max_count = max(max_count, cutter.max_count)
            first += len(sweep.prediction)
        merged = {k: np.concatenate([c[k] for c in columns]) for k in columns[0]}
        if not merged["recorded_fraction"].any():
            raise UserError(
                "no pixel of any shoebox was recorded: all are masked, overloaded or outside of "
                "the frames; check the pixel mask and the trusted range of the images"
            )
        writer.write_columns(merged)
        writer.write_neighbours({k: np.concatenate([p[k] for p in pairs]) for k in pairs[0]})
        writer.write_header(
            {
                "extent": np.array([extent.sigma_x_px, extent.sigma_y_px, extent.sigma_m_deg]),
                "extent_units": "pixels, pixels, degrees",
                "rocking": np.array(astuple(extent.rocking_width)),
                "box": np.array(extent.box),
                "max_count": max_count,
                **{f"mask_{name}_sigma": value for name, value in asdict(settings).items()},
                **(attributes or {}),
            },
            [describe_experiment(sweep.experiment) for sweep in sweeps],
        )
    return ShoeboxStore.open(store_path)


def _count_type(sweeps: Sequence[Sweep]) -> np.dtype[Any]:
    """Choose the smallest integer that holds the photons of every trusted value."""
    fits = _highest_count(sweeps) <= np.iinfo(np.uint16).max
    return np.dtype(np.uint16 if fits else np.int32)


def _highest_count(sweeps: Sequence[Sweep]) -> float:
    """Largest number of photons that a frame can hold in a pixel."""
    lookups = [sweep.experiment.images.lookup for sweep in sweeps if sweep.experiment.images]
    if any(lookup.gain or lookup.pedestal for lookup in lookups):
        return float(np.iinfo(np.int32).max)
    panels = [panel for sweep in sweeps for panel in sweep.experiment.panels]
    return max((panel.trusted_range[1] - panel.pedestal) / panel.gain for panel in panels)


class _OpenBoxes:
    """Ring buffer of the rows that are not yet complete, written out in order.

    A row lasts for ``per_layer * box[0]`` frames; it counts as open as long as the longest does.
    """

    def __init__(
        self, writer: ShoeboxWriter, first_row: int, first_frame: NDArray[np.int64],
        per_layer: NDArray[np.int64], box: tuple[int, int, int], n_images: int,
    ) -> None:  # fmt: skip
        self._writer, self._first_row, self._per_layer = writer, first_row, per_layer
        frames = np.arange(n_images)
        longest = int(per_layer.max()) * box[0]
        self.begin = np.searchsorted(first_frame, frames - longest + 1)  # still open on a frame
        self.end = np.searchsorted(first_frame, frames, side="right")  # opened by then
        open_rows = int((self.end - self.begin).max())
        self._chunk = writer.chunk_rows
        # rows wait until a whole chunk of the file is complete, also those opened later
        self._size = open_rows + 2 * self._chunk + 1
        self.counts = np.zeros((self._size, *box), dtype=np.int32)
        self.mask = np.zeros((self._size, *box), dtype=np.uint8)
        self._written = 0
        self.max_count = self.n_valid = 0

    def slots(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows lie in the buffers."""
        return rows % self._size

    def _close(self, slots: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Return counts and mask of complete rows; a sum too large for the file is no count."""
        counts, mask = self.counts[slots], self.mask[slots]
        mask[counts > np.iinfo(self._writer.dtype).max] &= ~np.uint8(MaskBit.VALID)
        is_valid = (mask & MaskBit.VALID) > 0
        counts[~is_valid] = 0
        self.n_valid += int(np.count_nonzero(is_valid))
        self.max_count = max(self.max_count, int(counts.max(initial=0)))
        return counts.astype(self._writer.dtype), mask

    def flush(self, complete: int) -> None:
        """Write rows below ``complete`` and free their slots."""
        for first in range(self._written, complete, self._chunk):
            slots = self.slots(np.arange(first, min(first + self._chunk, complete)))
            self._writer.write_boxes(self._first_row + first, *self._close(slots))
            self.counts[slots] = 0
            self.mask[slots] = 0
        self._written = complete

    def flush_whole_chunks(self, complete: int) -> None:
        """Write as many complete rows as fill chunks of the file."""
        # the first row of a later sweep need not start a chunk
        end = (self._first_row + complete) // self._chunk * self._chunk - self._first_row
        if end > self._written:
            self.flush(end)


class _SweepCutter:
    """Fills the boxes of one sweep frame by frame."""

    def __init__(
        self, sweep: Sweep, extent: SpotExtent, settings: MaskSettings,
        writer: ShoeboxWriter, first_row: int, find_defects: bool,
    ) -> None:  # fmt: skip
        self._experiment = sweep.experiment
        self._settings, self._writer, self._first_row = settings, writer, first_row
        self._n_images = sweep.frames.n_images
        box = extent.box
        centre = sweep.prediction.xyz_px.numpy()[:, ::-1].astype(np.float64)
        d, zeta = (getattr(sweep.prediction, k).numpy().astype(np.float64) for k in ("d", "zeta"))
        self._rocking = extent.rocking_width
        rocking = self._rocking.at(d)
        # those nearer to the axis are rejected: no need to wait for the end of their boxes
        longest = np.maximum(zeta, min_zeta(rocking))
        spread = frame_sigma(rocking, longest, sweep.experiment.rotation.scan.oscillation[1])
        layer = frames_per_layer(spread, box[0])
        half = np.array(box) // 2
        corner = np.floor(centre).astype(np.int64) - half
        corner[:, 0] = np.floor(centre[:, 0] - (layer * box[0] - 1) / 2)
        order = np.lexsort((corner[:, 2], corner[:, 1], sweep.prediction.panel, corner[:, 0]))
        self._corner, self._per_layer = corner[order], layer[order]
        self._is_grazing = (zeta < longest)[order]
        self._prediction = sweep.prediction[torch.from_numpy(order)]
        self._spots = predicted_spots(self._prediction, extent, sweep.experiment)
        margin = max(*box[1:], *(2 * h for h in window_half(self._spots, settings.foreground))) + 3
        self._canvas = FrameCanvas(sweep.frames.panel_shapes, margin)
        known, self._sweep = self._spots, sweep
        if sweep.neighbours is not None:
            known = known.join(predicted_spots(sweep.neighbours, extent, sweep.experiment))
        self._known = known
        self._map = SpotMap(self._canvas, known, settings.foreground, self._n_images)
        rocking = extent.sigma_m_deg / abs(sweep.experiment.rotation.scan.oscillation[1])
        self._find_defects = find_defects
        self._n_struck = 0  # voxels that zingers took
        self._source = SpikeFilter(
            sweep.frames,
            self._canvas,
            (extent.sigma_x_px, extent.sigma_y_px, rocking),
            is_active=find_defects,
        )
        self._background = BackgroundAccumulator(
            self._canvas, self._n_images, where_spots_are_known(sweep), _highest_count([sweep])
        )
        self._open = _OpenBoxes(
            writer, first_row, self._corner[:, 0], self._per_layer, box, self._n_images
        )
        # squared distances of the pixels of each box along fast and slow, and of its frames
        self._n_frames = self._per_layer * box[0]
        lengths = (box[2], box[1], int(self._n_frames.max()))
        self._terms = [
            self._spots.axis_terms(axis, self._corner[:, 2 - axis], lengths[axis])
            for axis in range(3)
        ]
        self._terms[2][np.arange(lengths[2]) >= self._n_frames[:, None]] = np.inf
        self._weights = [np.exp(-0.5 * terms) for terms in self._terms]
        self._recorded = np.zeros(len(corner))
        self._flags = edge_flags(
            self._corner, self._n_frames, self._prediction.panel.numpy(), sweep.frames, box
        )

    @property
    def max_count(self) -> int:
        """Largest count written so far [photons]."""
        return self._open.max_count

    def add_frame(self, frame: int) -> None:
        """Read a frame and put its voxels into the open boxes."""
        boxes = self._open
        self._source.load(frame)
        self._map.update(frame)
        near = self._map.touched
        odd = self._source.odd
        self._background.add(frame, np.concatenate([near, odd[np.isinf(self._map.nearest[odd])]]))
        rows = np.arange(boxes.begin[frame], boxes.end[frame])
        rows = rows[frame - self._corner[rows, 0] < self._n_frames[rows]]
        if len(rows):
            self._fill(frame, rows)
        boxes.flush_whole_chunks(int(boxes.begin[frame]))

    def _fill(self, frame: int, rows: NDArray[np.int64]) -> None:
        corner, boxes = self._corner[rows], self._open
        step, per_layer = frame - corner[:, 0], self._per_layer[rows]
        layer, in_layer = np.divmod(step, per_layer)
        # a layer that the scan cuts is not recorded: its share of the profile would be unknown
        starts = corner[:, 0] + layer * per_layer
        is_recorded = (starts >= 0) & (starts + per_layer <= self._n_images)
        canvas, settings = self._canvas, self._settings
        distances = (settings.foreground, settings.overlap, settings.core, settings.shared)
        foreground, overlap, core, shared = (np.float32(d**2) for d in distances)
        recorded, is_found, n_spikes = fill_boxes(
            canvas.counts,
            self._map.nearest,
            self._source.is_spike,
            canvas.first(self._spots.panel[rows], corner[:, 1], corner[:, 2]),
            (boxes.slots(rows), layer, in_layer == 0, is_recorded),
            (self._terms[0][rows], self._terms[1][rows], self._terms[2][rows, step]),
            (self._weights[0][rows], self._weights[1][rows], self._weights[2][rows, step]),
            (foreground, overlap, core, shared),
            (MaskBit.VALID, MaskBit.BACKGROUND, MaskBit.FOREGROUND, MaskBit.OVERLAPPED),
            boxes.counts,
            boxes.mask,
        )
        self._recorded[rows] += recorded
        self._n_struck += n_spikes
        for column, flag in enumerate((Flag.DEFECT, Flag.MASKED_CORE, Flag.OVERLAPPED)):
            self._flags[rows[is_found[:, column]]] |= flag

    def close(self) -> None:
        """Stop reading, and let go of what only frames need."""
        self._source.close()

    def finish(self, experiment: int) -> dict[str, NDArray[Any]]:
        """Write what is left and return the columns of the sweep."""
        self._open.flush(len(self._corner))
        self.close()
        if self._find_defects:
            self._remove_defects()
        self._writer.write_background(experiment, self._background.result())
        whole = np.ones(len(self._corner))
        for weights in self._weights:
            whole *= weights.sum(axis=1, dtype=np.float64)
        recorded = (self._recorded / whole).clip(0, 1)
        self._flags[(recorded < MIN_RECORDED) | self._is_grazing] |= Flag.REJECTED
        core = self._settings.core * self._spots.sigma[:, 2]
        z = self._spots.centre[:, 2]
        # voxel centres of frames that were never exposed
        outside = (np.ceil(z - core - 0.5) < 0) | (np.floor(z + core - 0.5) >= self._n_images)
        self._flags[outside] |= Flag.MASKED_CORE
        return {
            **self._metadata_columns(experiment),
            "flags": self._flags,
            "entering": self._prediction.entering.numpy(),
            "recorded_fraction": recorded,
        }

    def neighbours(self, experiment: int) -> dict[str, NDArray[Any]]:
        """Columns of the pairs of overlapping spots."""
        place, reach = (experiment, self._first_row), self._settings.shared
        return neighbour_columns(
            self._known, self._prediction, self._sweep, place, reach, self._rocking
        )

    def _remove_defects(self) -> None:
        """Take what the whole scan has shown to be bad out of the background and the boxes."""
        defects = self._background.find_defects(self._source.hot_pixels())
        depth, height, width = self._open.counts.shape[1:]
        boxes = BoxGeometry(
            (depth, height, width),
            self._spots.panel,
            self._per_layer,
            self._corner,
            self._terms,
        )
        lost, flags, n_gone = remove_from_boxes(
            self._writer, self._first_row, boxes, defects, self._canvas, self._settings
        )
        self._recorded -= lost
        self._flags |= flags
        n_struck, first = self._n_struck, self._experiment.rotation.scan.image_range[0]
        n_valid = self._open.n_valid + n_struck
        report(defects, self._source.n_spikes, n_gone + n_struck, n_valid, first)

    def _metadata_columns(self, experiment: int) -> dict[str, NDArray[Any]]:
        n = len(self._corner)
        known = {
            "refl_row": np.arange(self._first_row, self._first_row + n),
            "experiment": np.full(n, experiment),
            "frame_sigma": self._spots.sigma[:, 2],
            "corner": self._corner,
            "frames_per_layer": self._per_layer,
        }
        names = (f.name for f in fields(ReflectionMetadata))
        return {
            name: known[name] if name in known else getattr(self._prediction, name).numpy()
            for name in names
        }
