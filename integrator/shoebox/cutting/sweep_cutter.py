"""Fills the boxes of a sweep frame by frame, or those that begin in a range of its frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.integrator.io.shoebox_store import ShoeboxWriter
from braggflux.integrator.prediction.rocking import frame_sigma, frames_per_layer, min_zeta
from braggflux.integrator.shoebox.background import BackgroundAccumulator, where_spots_are_known
from braggflux.integrator.shoebox.canvas import SPIKE, FrameCanvas
from braggflux.integrator.shoebox.cutting.open_boxes import OpenBoxes
from braggflux.integrator.shoebox.defects import ROWS, BoxGeometry, remove_from_boxes, report
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
from braggflux.integrator.shoebox.sweep import Sweep, highest_count
from braggflux.integrator.types import Flag, ReflectionMetadata

MIN_RECORDED = 0.1
"""Share of a Gaussian spot that must be recorded for a reflection to be usable."""


class SweepCutter:
    """Fills the boxes of one sweep frame by frame.

    Either :meth:`cut` takes all frames, or several cutters, in processes of their own, take a
    range each, and one more :meth:`add_part` of what each has found. Boxes that begin in a range
    belong to it, and are filled from the frames after it too.

    Parameters
    ----------
    sweep : Sweep
    extent : SpotExtent
    settings : MaskSettings
    writer : ShoeboxWriter
    first_row : int
        Of the sweep in the store.
    find_defects : bool
    frames : range, optional
        That :meth:`cut` takes; all by default.
    """

    def __init__(
        self, sweep: Sweep, extent: SpotExtent, settings: MaskSettings, writer: ShoeboxWriter,
        first_row: int, find_defects: bool, frames: range | None = None,
    ) -> None:  # fmt: skip
        self._experiment = sweep.experiment
        self._settings, self._writer, self.first_row = settings, writer, first_row
        self._n_images = sweep.frames.n_images
        self._box = box = extent.box
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
            self._spots = known[: len(corner)]  # not held twice
        self._known = known
        self._map = SpotMap(self._canvas, known, settings.foreground, self._n_images)
        rocking = extent.sigma_m_deg / abs(sweep.experiment.rotation.scan.oscillation[1])
        self._find_defects = find_defects
        self._n_struck = 0  # voxels that zingers took
        self._frames = frames or range(self._n_images)
        self.rows, self._end = self._own_rows(layer[order] * box[0])
        sigmas, span = (extent.sigma_x_px, extent.sigma_y_px, rocking), (self._frames, self._end)
        self._source = SpikeFilter(
            sweep.frames, self._canvas, sigmas, span, is_active=find_defects
        )
        self._background = BackgroundAccumulator(
            self._canvas, self._n_images, where_spots_are_known(sweep), highest_count([sweep])
        )
        self._open = OpenBoxes(
            writer, first_row, self._corner[:, 0], self._per_layer, box, self._n_images
        )
        self._n_frames = self._per_layer * box[0]
        self._recorded = np.zeros(len(corner))
        self._flags = edge_flags(
            self._corner, self._n_frames, self._prediction.panel.numpy(), sweep.frames, box
        )

    @property
    def max_count(self) -> int:
        """Largest count written so far [photons]."""
        return self._open.max_count

    def _own_rows(self, n_frames: NDArray[np.int64]) -> tuple[slice, int]:
        """Rows whose boxes, of ``n_frames`` each, begin in the range; the end of their frames."""
        first, frames = self._corner[:, 0], self._frames
        begin = np.searchsorted(first, frames.start) if frames.start else 0  # some begin before
        own = slice(int(begin), int(np.searchsorted(first, frames.stop)))
        last = int((first + n_frames)[own].max(initial=frames.stop))
        return own, min(last, self._n_images)

    def cut(self, tick: Callable[[], None]) -> None:
        """Read the frames, put their voxels into the boxes, and write these.

        ``tick`` is called after each frame of the range.
        """
        self._open.start_at(self.rows.start)
        for frame in range(self._frames.start, self._end):
            self._add_frame(frame)
            if frame in self._frames:
                tick()
        self._open.flush(self.rows.stop)

    def _add_frame(self, frame: int) -> None:
        boxes, own = self._open, self.rows
        self._source.load(frame)
        self._map.update(frame)
        if frame in self._frames:
            odd = self._source.odd
            odd = odd[np.isinf(self._map.nearest[odd])]
            self._background.add(frame, np.concatenate([self._map.touched, odd]))
        begin = max(int(boxes.begin[frame]), own.start)
        # before the rows that begin here: the buffer has no room for more than are open
        boxes.flush_whole_chunks(min(begin, own.stop))
        rows = np.arange(begin, min(boxes.end[frame], own.stop))
        rows = rows[frame - self._corner[rows, 0] < self._n_frames[rows]]
        if len(rows):
            self._fill(frame, rows)

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
        spots, (_, height, width) = self._spots, self._box
        fast = spots.axis_terms(0, rows, corner[:, 2], width)
        slow = spots.axis_terms(1, rows, corner[:, 1], height)
        along = spots.axis_terms(2, rows, np.full(len(rows), frame), 1).ravel()
        recorded, is_found, n_spikes = fill_boxes(
            canvas.counts,
            self._map.nearest,
            canvas.first(spots.panel[rows], corner[:, 1], corner[:, 2]),
            (boxes.slots(rows), layer, in_layer == 0, is_recorded),
            (fast, slow, along),
            (np.exp(-0.5 * fast), np.exp(-0.5 * slow), np.exp(-0.5 * along)),
            (foreground, overlap, core, shared),
            (MaskBit.VALID, MaskBit.BACKGROUND, MaskBit.FOREGROUND, MaskBit.OVERLAPPED),
            SPIKE,
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
        self._map.close()

    def part(self) -> dict[str, NDArray[Any]]:
        """All that a range of frames says beside its boxes, for :meth:`add_part`."""
        numbers = (self._source.n_spikes, self._n_struck, self._open.n_valid, self._open.max_count)
        return {
            "recorded": self._recorded[self.rows],
            "flags": self._flags[self.rows],
            "sharp": self._source.sharp,
            "numbers": np.array(numbers),
            **self._background.sums(self._frames),
        }

    def add_part(self, frames: range, rows: slice, part: Mapping[str, NDArray[Any]]) -> None:
        """Take over the :meth:`part` of a range of frames, whose boxes are written."""
        self._recorded[rows] = part["recorded"]
        self._flags[rows] = part["flags"]
        n_spikes, n_struck, n_valid, max_count = map(int, part["numbers"])
        self._source.add_sharp(part["sharp"], n_spikes)
        self._n_struck += n_struck
        self._open.n_valid += n_valid
        self._open.max_count = max(self._open.max_count, max_count)
        self._background.add_sums(frames, part)

    def finish(self, experiment: int) -> dict[str, NDArray[Any]]:
        """Take defects out of boxes and background; return the columns of the sweep."""
        self.close()
        if self._find_defects:
            self._remove_defects()
        self._writer.write_background(experiment, self._background.result())
        recorded = (self._recorded / self._whole()).clip(0, 1)
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
        place, reach = (experiment, self.first_row), self._settings.shared
        return neighbour_columns(
            self._known, self._prediction, self._sweep, place, reach, self._rocking
        )

    def _remove_defects(self) -> None:
        """Take what the whole scan has shown to be bad out of the background and the boxes."""
        defects = self._background.find_defects(self._source.hot_pixels())
        boxes = BoxGeometry(
            self._box, self._spots.panel, self._per_layer, self._corner, self._terms
        )
        lost, flags, n_gone = remove_from_boxes(
            self._writer, self.first_row, boxes, defects, self._canvas, self._settings
        )
        self._recorded -= lost
        self._flags |= flags
        n_struck, first = self._n_struck, self._experiment.rotation.scan.image_range[0]
        n_valid = self._open.n_valid + n_struck
        report(defects, self._source.n_spikes, n_gone + n_struck, n_valid, first)

    def _terms(self, rows: slice) -> list[NDArray[np.float32]]:
        """Squared distances of the pixels of some boxes along fast and slow, and of their frames.

        Made when they are asked for: of all boxes they would take more than all else known.
        """
        corner, n_frames = self._corner[rows], self._n_frames[rows, None]
        lengths = (self._box[2], self._box[1], int(self._n_frames.max()))
        terms = [
            self._spots.axis_terms(axis, rows, corner[:, 2 - axis], length)
            for axis, length in enumerate(lengths)
        ]
        terms[2][np.arange(lengths[2]) >= n_frames] = np.inf
        return terms

    def _whole(self) -> NDArray[np.float64]:
        """Sum of a Gaussian spot's weights, 1 at its centre, over all voxels of each box, (N,)."""
        whole = np.ones(len(self._corner))
        for first in range(0, len(whole), ROWS):
            rows = slice(first, first + ROWS)
            for terms in self._terms(rows):
                whole[rows] *= np.exp(-0.5 * terms).sum(axis=1, dtype=np.float64)
        return whole

    def _metadata_columns(self, experiment: int) -> dict[str, NDArray[Any]]:
        n = len(self._corner)
        known = {
            "refl_row": np.arange(self.first_row, self.first_row + n),
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
