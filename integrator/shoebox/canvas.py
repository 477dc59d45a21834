"""One frame of all panels as a single padded array, from which windows are gathered at once.

Padding around each panel lets a window reach over the edge: what lies outside reads as invalid.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.shoebox.kernels.frames import load_panel

if TYPE_CHECKING:
    from braggflux.integrator.shoebox.sweep import Frames

INVALID = -1
"""In place of the photons of a pixel that was not recorded, is masked or overloaded."""
SPIKE = -2
"""In place of those of a zinger that is taken out."""

WORD = 8
"""The buffer is a whole number of words of so many bytes, whatever the type of its counts."""

IntArray = NDArray[np.int64]
Counts = NDArray[np.signedinteger[Any]]


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
    base, stride : ndarray, (n_panels,) int64
        First pixel of each panel in the flat array, without its padding, and length of its rows.
    counts : ndarray, (size,) int16 or int32
        Photons of the loaded frame; :data:`INVALID` in the padding and where not usable. Before
        the first, not to be written to.
    """

    def __init__(self, panel_shapes: Sequence[tuple[int, int]], margin: int) -> None:
        self.panel_shapes = tuple((int(slow), int(fast)) for slow, fast in panel_shapes)
        self.margin = margin
        padded = [(slow + 2 * margin, fast + 2 * margin) for slow, fast in self.panel_shapes]
        self.stride = np.array([fast for _, fast in padded], dtype=np.int64)
        starts = np.cumsum([0, *(slow * fast for slow, fast in padded)])
        self._start = starts[:-1].astype(np.int64)
        self.base = self._start + margin * (self.stride + 1)
        self.size = -(-int(starts[-1]) // WORD) * WORD
        self.counts: Counts = np.broadcast_to(np.int16(INVALID), self.size)

    def empty(self) -> Counts:
        """Give a buffer without a count, (size,)."""
        return np.full(self.size, INVALID, dtype=np.int16)

    def panel_view(self, flat: NDArray[Any], panel: int) -> NDArray[Any]:
        """View of a panel's pixels, (slow, fast), in an array of the canvas' size."""
        slow, fast = self.panel_shapes[panel]
        m, stride, base = self.margin, self.stride[panel], self._start[panel]
        padded = flat[base : base + (slow + 2 * m) * stride].reshape(slow + 2 * m, stride)
        return padded[m : m + slow, m : m + fast]

    def load(self, images: Sequence[Counts], usable: Sequence[NDArray[np.bool_]]) -> None:
        """Take over a frame; see :meth:`loaded`."""
        self.counts = self.loaded(images, usable, self.counts)

    def loaded(
        self, images: Sequence[Counts], usable: Sequence[NDArray[np.bool_]], into: Counts
    ) -> Counts:
        """Lay a frame out as this canvas has it.

        Parameters
        ----------
        images : sequence of ndarray, (slow, fast) int16 or int32
            Photons per panel, negative where there is no count.
        usable : sequence of ndarray, (slow, fast) bool
            Static mask per panel.
        into : ndarray, (size,)
            :attr:`counts` of an earlier frame, written over if of the frame's type and there.

        Returns
        -------
        ndarray, (size,)
        """
        dtype = np.result_type(*images)
        if into.dtype != dtype or not into.flags.writeable:
            into = np.full(self.size, INVALID, dtype)
        for panel, image in enumerate(images):
            base, stride = int(self.base[panel]), int(self.stride[panel])
            load_panel(image, usable[panel], into, base, stride, INVALID)
        return into

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
        first, stride = self.first(panel, slow, fast)
        rows = first[:, None] + np.arange(shape[0]) * stride[:, None]
        return rows[:, :, None] + np.arange(shape[1])

    def first(self, panel: IntArray, slow: IntArray, fast: IntArray) -> tuple[IntArray, IntArray]:
        """Flat indices of pixels (K,), and the length of the rows there."""
        stride = self.stride[panel]
        return self.base[panel] + slow * stride + fast, stride

    def flags_at(self, flags: Sequence[NDArray[np.bool_]], index: IntArray) -> NDArray[np.bool_]:
        """Give flags of the panels' pixels, (slow, fast) each, at flat indices; False beyond."""
        found = np.zeros(index.shape, dtype=bool)
        of_panel = np.searchsorted(self._start, index, side="right") - 1
        for panel in np.unique(of_panel):
            here = of_panel == panel
            slow, fast = np.divmod(index[here] - self._start[panel], self.stride[panel])
            slow, fast = slow - self.margin, fast - self.margin
            rows, columns = self.panel_shapes[panel]
            inside = (slow >= 0) & (slow < rows) & (fast >= 0) & (fast < columns)
            own = np.zeros(len(slow), dtype=bool)
            own[inside] = flags[panel][slow[inside], fast[inside]]
            found[here] = own
        return found

    def around(self, index: IntArray) -> IntArray:
        """Flat indices of the 3 x 3 pixels around pixels of the panels, (K, 9).

        By slow, then fast: the pixel itself is in the middle.
        """
        stride = self.stride[np.searchsorted(self._start, index, side="right") - 1]
        rows = index[:, None] + np.array([-1, 0, 1]) * stride[:, None]
        return (rows[:, :, None] + np.array([-1, 0, 1])).reshape(len(index), 9)


def read_ahead(
    frames: Frames, numbers: Iterable[int], canvas: FrameCanvas, *, keep: int = 1
) -> Generator[tuple[int, Counts], None, None]:
    """Read frames onto buffers of a canvas' layout, the next one in a thread meanwhile.

    A second thread would mostly wait, as HDF5 decompresses one frame at a time, and needs buffers
    of its own: new memory costs more time than all else that is done with a frame.

    Parameters
    ----------
    frames : Frames
    numbers : iterable of int
        In this order.
    canvas : FrameCanvas
        Its layout is used, not its counts.
    keep : int
        The counts of so many frames stay valid, the last one included.

    Yields
    ------
    frame : int
    counts : ndarray, (canvas.size,)
        As :attr:`FrameCanvas.counts`.
    """
    usable = frames.static_mask()  # before the thread asks for it
    spare: deque[Counts] = deque(canvas.empty() for _ in range(keep + 1))
    held: deque[Counts] = deque()
    coming: deque[tuple[int, Future[Counts]]] = deque()
    waiting = iter(numbers)
    pool = ThreadPoolExecutor(1, thread_name_prefix="frames")
    try:
        while True:
            while spare and (number := next(waiting, None)) is not None:
                into = spare.popleft()
                coming.append((number, pool.submit(_read, frames, number, canvas, usable, into)))
            if not coming:
                return
            number, future = coming.popleft()
            held.append(future.result())
            yield number, held[-1]
            if len(held) == keep:
                spare.append(held.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _read(
    frames: Frames,
    number: int,
    canvas: FrameCanvas,
    usable: Sequence[NDArray[np.bool_]],
    into: Counts,
) -> Counts:
    return canvas.loaded(frames.read(number), usable, into)
