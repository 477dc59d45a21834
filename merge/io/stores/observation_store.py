"""Unmerged observations that are read a range of images at a time, wherever they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.merge.io.dataset_labels import DatasetLabels
from braggflux.merge.io.observations import UnmergedData

Array = NDArray[np.float64]


class ObservationStore(ABC):
    """Observations of one dataset, sorted by image.

    Attributes
    ----------
    path : Path
        The file, for messages.
    image_starts : ndarray, (n_images + 1,) int64
        First row of each image and, at the end, N.
    metadata_names : tuple of str
    has_wavelength : bool
    cell, space_group, name, has_lp_applied, labels
        As in :class:`~braggflux.merge.io.observations.UnmergedData`.
    """

    path: Path
    image_starts: NDArray[np.int64]
    metadata_names: tuple[str, ...]
    has_wavelength: bool
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    name: str
    has_lp_applied: bool
    labels: DatasetLabels

    @property
    def n_images(self) -> int:
        """Number of images."""
        return len(self.image_starts) - 1

    def __len__(self) -> int:
        """Return the number of observations, N."""
        return int(self.image_starts[-1])

    def __enter__(self) -> ObservationStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @abstractmethod
    def read(self, first: int = 0, last: int | None = None) -> UnmergedData:
        """Read images ``first`` to ``last`` - 1 (to the end when None), numbered from 0 again.

        Raises
        ------
        IndexError
            The range is not within the images of the store.
        """

    @abstractmethod
    def column(self, name: str, rows: slice) -> NDArray[Any]:
        """Read some rows of a column under its name in the file, e.g. ``metadata/BATCH``."""

    def blocks(self, n_images: int) -> Iterator[tuple[int, UnmergedData]]:
        """Go through the store ``n_images`` at a time: (number of the first image, its block)."""
        for first in range(0, self.n_images, n_images):
            yield first, self.read(first, min(first + n_images, self.n_images))

    def row_blocks(self, n_rows: int) -> Iterator[slice]:
        """Go through the rows ``n_rows`` at a time."""
        for first in range(0, len(self), n_rows):
            yield slice(first, min(first + n_rows, len(self)))


class StoreView(ObservationStore):
    """Observations of another store, changed while they are read.

    Parameters
    ----------
    source : ObservationStore
        Closed with the view.
    """

    def __init__(self, source: ObservationStore) -> None:
        self._source = source
        self.path, self.name = source.path, source.name
        self.image_starts = source.image_starts
        self.metadata_names, self.has_wavelength = source.metadata_names, source.has_wavelength
        self.cell, self.space_group = source.cell, source.space_group
        self.has_lp_applied, self.labels = source.has_lp_applied, source.labels

    def close(self) -> None:
        """Close the source."""
        self._source.close()
