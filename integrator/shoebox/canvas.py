"""One frame of all panels as a single padded array, from which windows are gathered at once.

Padding around each panel lets a window reach over the edge: what lies outside reads as invalid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

INVALID = -1
"""In place of the photons of a pixel that was not recorded, is masked or overloaded."""

IntArray = NDArray[np.int64]


class FrameCanvas:
    """Flat buffer of a frame's photons.

    Parameters
    ----------
    panel_shapes : sequence of (int, int)
        (slow, fast) of each panel.
    margin : int
        Pixels of padding on every side: the farthest that a window may start outside.

    Attributes
    ----------
    counts : ndarray, (size,) int32
        Photons of the loaded frame; :data:`INVALID` in the padding and where not usable.
    """

    def __init__(self, panel_shapes: Sequence[tuple[int, int]], margin: int) -> None:
        self.panel_shapes = tuple((int(slow), int(fast)) for slow, fast in panel_shapes)
        self.margin = margin
        padded = [(slow + 2 * margin, fast + 2 * margin) for slow, fast in self.panel_shapes]
        self._stride = np.array([fast for _, fast in padded], dtype=np.int64)
        starts = np.cumsum([0, *(slow * fast for slow, fast in padded)])
        self._base = starts[:-1].astype(np.int64)
        self.size = int(starts[-1])
        self.counts = np.full(self.size, INVALID, dtype=np.int32)

    def panel_view(self, flat: NDArray[Any], panel: int) -> NDArray[Any]:
        """View of a panel's pixels, (slow, fast), in an array of the canvas' size."""
        slow, fast = self.panel_shapes[panel]
        m, stride, base = self.margin, self._stride[panel], self._base[panel]
        padded = flat[base : base + (slow + 2 * m) * stride].reshape(slow + 2 * m, stride)
        return padded[m : m + slow, m : m + fast]

    def load(
        self,
        images: Sequence[NDArray[np.int32]],
        usable: Sequence[NDArray[np.bool_]],
    ) -> None:
        """Take over a frame.

        Parameters
        ----------
        images : sequence of ndarray, (slow, fast)
            Photons per panel, negative where there is no count.
        usable : sequence of ndarray, (slow, fast) bool
            Static mask per panel.
        """
        for panel, image in enumerate(images):
            good = usable[panel] & (image >= 0)
            self.panel_view(self.counts, panel)[...] = np.where(good, image, INVALID)

    def windows(
        self, panel: IntArray, slow: IntArray, fast: IntArray, shape: tuple[int, int]
    ) -> IntArray:
        """Flat indices of windows.

        Parameters
        ----------
        panel, slow, fast : ndarray, (K,)
            Panel and first pixel of each window; at most ``margin`` outside of the panel.
        shape : (int, int)
            (slow, fast) size of the windows.

        Returns
        -------
        ndarray, (K, slow, fast) int64
        """
        stride = self._stride[panel]
        first = self._base[panel] + (slow + self.margin) * stride + fast + self.margin
        rows = first[:, None] + np.arange(shape[0]) * stride[:, None]
        return rows[:, :, None] + np.arange(shape[1])

    def around(self, index: IntArray) -> IntArray:
        """Flat indices of the 3 x 3 pixels around pixels of the panels, (K, 9).

        By slow, then fast: the pixel itself is in the middle.
        """
        stride = self._stride[np.searchsorted(self._base, index, side="right") - 1]
        rows = index[:, None] + np.array([-1, 0, 1]) * stride[:, None]
        return (rows[:, :, None] + np.array([-1, 0, 1])).reshape(len(index), 9)
