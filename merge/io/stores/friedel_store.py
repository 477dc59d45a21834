"""Two stores that hold the Friedel halves of one dataset, read as one.

Memory is that of the range that is read, and some bytes per image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.forms import check_one_crystal_form
from braggflux.integrator.errors import UserError
from braggflux.merge.io.observations import UnmergedData, common_name, is_other_half, join_halves
from braggflux.merge.io.stores.observation_store import ObservationStore, StoreView

ROWS_AT_A_TIME = 1 << 20
HALF = 1 << 17  # of the range of an index


class FriedelStore(StoreView):
    """Join the halves as :func:`braggflux.merge.io.observations.combine_friedel` does.

    Parameters
    ----------
    plus, minus : ObservationStore
        Closed with this one. Images of the same BATCH (without it, of the same number) are one
        image.

    Raises
    ------
    UserError
        The crystal forms differ, a store holds both mates, or its images are not in the order of
        their BATCH.
    """

    def __init__(self, plus: ObservationStore, minus: ObservationStore) -> None:
        super().__init__(plus)
        check_one_crystal_form([plus, minus])
        self.name = common_name(plus.name, minus.name)
        self.metadata_names = tuple(n for n in plus.metadata_names if n in minus.metadata_names)
        self.has_wavelength = plus.has_wavelength and minus.has_wavelength
        self.has_lp_applied = plus.has_lp_applied and minus.has_lp_applied
        has_batch = "BATCH" in self.metadata_names
        labels = [_labels(half, has_batch) for half in (plus, minus)]
        known = np.unique(np.concatenate([label for label, _ in labels]))
        signs = ((plus, +1), (minus, -1))
        self._halves = [
            _Half(half, is_other_half(_indices(half), half.space_group, sign, half.name), *own)
            for (half, sign), own in zip(
                signs, ((np.searchsorted(known, n), image) for n, image in labels), strict=True
            )
        ]
        count = sum(half.count(len(known)) for half in self._halves)
        self.image_starts = np.concatenate([[0], np.cumsum(count)])

    def close(self) -> None:
        """Close both."""
        for half in self._halves:
            half.store.close()

    def read(self, first: int = 0, last: int | None = None) -> UnmergedData:
        """Read images of both, as :meth:`ObservationStore.read`."""
        last = self.n_images if last is None else last
        if not 0 <= first <= last <= self.n_images:
            raise IndexError(f"images {first} to {last} of {self.n_images}")
        return join_halves(*(half.read(first, last) for half in self._halves))

    def column(self, name: str, rows: slice) -> NDArray[Any]:
        """Read some rows of a column of both, as :meth:`ObservationStore.column`."""
        first = int(np.searchsorted(self.image_starts, rows.start, "right")) - 1
        last = int(np.searchsorted(self.image_starts, rows.stop))
        parts = [half.column(name, first, last) for half in self._halves]
        order = np.argsort(np.concatenate([image for image, _ in parts]), kind="stable")
        start = int(self.image_starts[first])
        chosen = order[rows.start - start : rows.stop - start]
        return np.concatenate([values for _, values in parts])[chosen]


class _Half:
    """One store, its images numbered as those of both.

    Parameters
    ----------
    store : ObservationStore
    is_mate : bool
        Its indices are those of the other half.
    number, image : (G,) int64
        Number that each image with observations has among those of both, and in the store.
    """

    def __init__(
        self,
        store: ObservationStore,
        is_mate: bool,
        number: NDArray[np.int64],
        image: NDArray[np.int64],
    ) -> None:
        self.store, self.is_mate, self.number, self.image = store, is_mate, number, image

    def count(self, n_images: int) -> NDArray[np.int64]:
        """Count the observations of each image of both, (n_images,)."""
        total = np.zeros(n_images, dtype=np.int64)
        total[self.number] = np.diff(self.store.image_starts)[self.image]
        return total

    def read(self, first: int, last: int) -> UnmergedData:
        """Read images ``first`` to ``last`` - 1 of both, numbered from there."""
        low, high = self._range(first, last)
        data = self.store.read(low, high)
        image = self._number(low + data.image) - first
        index = -data.miller_index if self.is_mate else data.miller_index
        return replace(data, miller_index=index, image=image)

    def column(self, name: str, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Read a column of the same images, with the number of each row's image among both."""
        low, high = self._range(first, last)
        starts = self.store.image_starts
        values = self.store.column(name, slice(int(starts[low]), int(starts[high])))
        own = np.repeat(np.arange(low, high), np.diff(starts[low : high + 1]))
        turned = -values if self.is_mate and name == "miller_index" else values
        return self._number(own), turned

    def _range(self, first: int, last: int) -> tuple[int, int]:
        """Images of the store that are some of both: the first, and one behind the last."""
        a, b = np.searchsorted(self.number, [first, last])
        return (int(self.image[a]), int(self.image[b - 1]) + 1) if b > a else (0, 0)

    def _number(self, image: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.number[np.searchsorted(self.image, image)]


def _labels(
    store: ObservationStore, has_batch: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Label of each image with observations, rising, and its number in the store, (G,) each."""
    image = np.flatnonzero(np.diff(store.image_starts))
    if not has_batch:
        return image.astype(float), image
    label = np.empty(len(image))
    first = store.image_starts[:-1][image]
    for rows in store.row_blocks(ROWS_AT_A_TIME):
        inside = (first >= rows.start) & (first < rows.stop)
        label[inside] = store.column("metadata/BATCH", rows)[first[inside] - rows.start]
    if np.any(np.diff(label) <= 0):
        raise UserError(
            f"the images of {store.path} are not in the order of their BATCH, by which --friedel "
            "finds the same image in both stores; convert the reflections again from MTZ files"
        )
    return label, image


def _indices(store: ObservationStore) -> NDArray[np.int32]:
    """Every index of the store once, (M, 3)."""
    found = np.empty(0, dtype=np.int64)  # one number each: rows of three sort ten times slower
    for rows in store.row_blocks(ROWS_AT_A_TIME):
        h, k, l = store.column("miller_index", rows).astype(np.int64).T + HALF
        found = np.union1d(found, (h * 2 * HALF + k) * 2 * HALF + l)
    hk, l = np.divmod(found, 2 * HALF)
    return (np.column_stack([*np.divmod(hk, 2 * HALF), l]) - HALF).astype(np.int32)
