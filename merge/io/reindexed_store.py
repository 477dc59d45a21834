"""A store whose images are read under other indices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merge.io.observations import UnmergedData
from merge.io.unmerged_store import UnmergedStore


class ReindexedStore(UnmergedStore):
    """Read images with an operator for each.

    Parameters
    ----------
    path : str or Path
    matrices : ndarray, (A, 3, 3) int
        Operators: ``h' = h R``.
    choice : ndarray, (n_images,) int
        Operator of each image.
    """

    def __init__(
        self, path: str | Path, matrices: NDArray[np.int32], choice: NDArray[np.int64]
    ) -> None:
        super().__init__(path)
        self._matrices, self._choice = matrices, choice

    def read(self, first: int = 0, last: int | None = None) -> UnmergedData:
        """Read images ``first`` to ``last`` - 1, as :meth:`UnmergedStore.read`."""
        data = super().read(first, last)
        return replace(
            data, miller_index=self._turned(data.miller_index, self._choice[first + data.image])
        )

    def column(self, name: str, rows: slice) -> NDArray:
        """Read some rows of a column, as :meth:`UnmergedStore.column`."""
        values = super().column(name, rows)
        if name != "miller_index":
            return values
        image = np.searchsorted(self.image_starts, np.arange(rows.start, rows.stop), "right") - 1
        return self._turned(values.astype(np.int32), self._choice[image])

    def _turned(self, index: NDArray[np.int32], choice: NDArray[np.int64]) -> NDArray[np.int32]:
        return np.einsum("ni,nij->nj", index, self._matrices[choice]).astype(np.int32)
