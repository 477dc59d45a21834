"""A store whose images are read under other indices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.reindexing import reindexed_form
from braggflux.merge.io.stores.observation_store import ObservationStore, StoreView


class ReindexedStore(StoreView):
    """Read images with an operator for each.

    Parameters
    ----------
    source : ObservationStore
        Closed with this one.
    matrices : ndarray, (A, 3, 3) int
        Operators: ``h' = h R``.
    choice : ndarray, (n_images,) int
        Operator of each image.
    """

    def __init__(
        self, source: ObservationStore, matrices: NDArray[np.int32], choice: NDArray[np.int64]
    ) -> None:
        super().__init__(source)
        self._matrices, self._choice = matrices, choice

    def read(self, first: int = 0, last: int | None = None) -> UnmergedData:
        """Read images ``first`` to ``last`` - 1, as :meth:`ObservationStore.read`."""
        data = self._source.read(first, last)
        index = self._turned(data.miller_index, self._choice[first + data.image])
        return replace(data, miller_index=index, cell=self.cell)

    def column(self, name: str, rows: slice) -> NDArray[Any]:
        """Read some rows of a column, as :meth:`ObservationStore.column`."""
        values = self._source.column(name, rows)
        if name != "miller_index":
            return values
        image = np.searchsorted(self.image_starts, np.arange(rows.start, rows.stop), "right") - 1
        return self._turned(values.astype(np.int32), self._choice[image])

    def _turned(self, index: NDArray[np.int32], choice: NDArray[np.int64]) -> NDArray[np.int32]:
        return np.einsum("ni,nij->nj", index, self._matrices[choice]).astype(np.int32)


def reindex_store(source: ObservationStore, operator: str) -> ReindexedStore:
    """Apply one operator to all images and the cell, like :func:`reindex`.

    Raises
    ------
    UserError
    """
    rotation, cell = reindexed_form(source, operator)
    store = ReindexedStore(source, rotation[None], np.zeros(source.n_images, dtype=np.int64))
    store.cell = cell
    return store
