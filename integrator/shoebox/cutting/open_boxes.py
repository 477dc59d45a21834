"""Boxes that are being filled: rows wait in memory until whole chunks of the file are complete."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.io.shoebox_store import ShoeboxWriter
from braggflux.integrator.shoebox.mask import MaskBit


class OpenBoxes:
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

    def start_at(self, row: int) -> None:
        """Leave the rows before ``row`` to others."""
        self._written = row

    def flush(self, complete: int) -> None:
        """Write rows below ``complete`` and free their slots."""
        while self._written < complete:
            first = self._first_row + self._written  # need not start a chunk of the file
            end = (first // self._chunk + 1) * self._chunk - self._first_row
            slots = self.slots(np.arange(self._written, min(end, complete)))
            self._writer.write_boxes(first, *self._close(slots))
            self.counts[slots] = 0
            self.mask[slots] = 0
            self._written = min(end, complete)

    def flush_whole_chunks(self, complete: int) -> None:
        """Write as many complete rows as fill chunks of the file."""
        # the first row of a later sweep need not start a chunk
        end = (self._first_row + complete) // self._chunk * self._chunk - self._first_row
        if end > self._written:
            self.flush(end)
