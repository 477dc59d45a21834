"""Stills of stores, batch after batch: data larger than memory.

Each store is a dataset. A batch is a contiguous range of images of each, one piece of a file, so
that every batch holds all datasets in their proportion; batches come in random order.
What the model needs to know of all data beforehand comes from a first look through the indices
(resolution, observations of each unique reflection) and from a sample of the batches (units of the
metadata, starting values). In memory are the rows of unique reflections, the sample, one batch,
and 8 bytes per image that say where it begins.

Images and observations are held out in a few random batches only (*holdout batches*): enough to
predict, and quick to read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.integrator.crystal.cell import inv_d2
from braggflux.integrator.crystal.forms import check_one_crystal_form
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.integrator.processes import Processes
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.columns import is_kept
from braggflux.merge.data.feature_scaling import FeatureScaling
from braggflux.merge.data.resolution_limit import end_of_data
from braggflux.merge.data.table import MIN_BATCHES, Batch, ObservationTable
from braggflux.merge.fit.held_out import Split, split
from braggflux.merge.io.dataset_labels import DatasetLabels
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.stores.observation_store import ObservationStore
from braggflux.merge.problem import build_problem
from braggflux.merge.rows import UniqueRows

MAX_HOLDOUT_BATCHES = 64
SAMPLE = 250_000  # observations
ROWS_AT_A_TIME = 1 << 20  # of the first look
LARGEST_BATCH = 1 << 17


class ObservationStream:
    """Batches of stores.

    Parameters
    ----------
    stores : sequence of ObservationStore
        One per dataset.
    config : MergeConfig
    feature_scaling : FeatureScaling, optional
        Of a scale model that is used again.
    parents : sequence of int or None, optional
        Of each dataset.

    Attributes
    ----------
    edges : ndarray, (n_batches + 1, n_datasets) int64
        First image of each batch in each store.
    unique : UniqueRows
    sample : ObservationTable
        Some of the observations, in memory.
    feature_scaling : FeatureScaling
    holdout_batches : tuple of int
        Batches with held-out observations.
    n_obs : ndarray, (R,) int64
        Observations of each unique reflection that train.
    filled : ndarray, (n_batches,) bool
        Batches with any observation inside the resolution limit.
    """

    def __init__(
        self,
        stores: Sequence[ObservationStore],
        config: MergeConfig,
        feature_scaling: FeatureScaling | None = None,
        parents: Sequence[int | None] | None = None,
    ) -> None:
        if not config.stills:
            raise UserError(
                "data are read batch by batch only with --stills: scans have parameters of each "
                "image; raise stream_above to hold them in memory"
            )
        check_one_crystal_form(stores)
        self.stores = tuple(stores)
        # a batch alone is too little to tell a level of saturation by
        self.config = replace(config, overloads="keep")
        self.edges = _edges(self.stores, config.batch_size or LARGEST_BATCH)
        asus = [
            ReciprocalAsu(s.cell, s.space_group, self._d_min(s), config.anomalous) for s in stores
        ]
        couple = config.prior != "wilson" and asus[0].anomalous
        self.unique = UniqueRows(asus, parents, couple)
        order = np.random.default_rng(config.seed).permutation(self.n_batches)
        self.holdout_batches = (
            tuple(order[:MAX_HOLDOUT_BATCHES].tolist()) if config.held_out else ()
        )
        self.sample = self._sample(order, feature_scaling)
        self.feature_scaling = self.sample.feature_scaling
        self.n_obs, self.filled = self._count()

    def __len__(self) -> int:
        """Return the number of observations, held-out ones included."""
        return sum(len(store) for store in self.stores)

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return len(self.edges) - 1

    @property
    def n_used(self) -> int:
        """Number of observations that train."""
        return int(self.n_obs.sum())

    def batch(self, number: int) -> Batch:
        """Read one batch; its share is that of the training observations it holds."""
        return self.masked(*self.split(number))

    def part(self, number: int, processes: Processes) -> Batch | None:
        """Read a batch and take the images that one process computes; None where there is none."""
        if processes.is_alone:
            return self.batch(number)
        table, masks = self.split(number)  # what is held out, is drawn from the whole batch
        if masks is not None:
            table = table.with_masks(masks.is_used, masks.is_seen)
        batch = table.part(torch.arange(table.n_units), processes.share(table.n_units))
        return None if batch is None else self._with_share(batch)

    def masked(self, table: ObservationTable, masks: Split | None) -> Batch:
        """Mark what is held out in a batch."""
        if masks is not None:
            table = table.with_masks(masks.is_used, masks.is_seen)
        return self._with_share(table.everything())

    def _with_share(self, batch: Batch) -> Batch:
        used = batch.observations.is_used.sum().double()
        return replace(batch, share=used / max(self.n_used, 1))

    def split(self, number: int) -> tuple[ObservationTable, Split | None]:
        """Read one batch, and what is held out in it if it is a holdout batch."""
        if number in self.holdout_batches:
            return self.split_holdout(number)
        return self._table(number), None

    def split_holdout(self, number: int) -> tuple[ObservationTable, Split]:
        """Read one of the holdout batches, and what is held out in it."""
        table = self._table(number)
        return table, split(table, self.config.held_out, True, [self.config.seed, number])

    def _table(self, number: int) -> ObservationTable:
        data = self._read(number)
        return build_problem(
            data, self.config, feature_scaling=self.feature_scaling, unique=self.unique
        ).table

    def numbers(self, generator: torch.Generator) -> Iterator[int]:
        """Batch numbers in random order, pass after pass, without end."""
        filled = torch.as_tensor(np.flatnonzero(self.filled))
        while True:
            yield from filled[torch.randperm(len(filled), generator=generator)].tolist()

    def labels(self, dataset: int) -> DatasetLabels:
        """Names and wavelength: of stills with one each, the median of the first."""
        store = self.stores[dataset]
        if not store.has_wavelength:
            return store.labels
        first = store.read(0, max(1, int(self.edges[1, dataset])))
        return store.labels._replace(wavelength=first.typical_wavelength)

    def _read(self, number: int) -> list[UnmergedData]:
        ranges = zip(self.stores, self.edges[number], self.edges[number + 1], strict=True)
        return [store.read(int(first), int(last)) for store, first, last in ranges]

    def _d_min(self, store: ObservationStore) -> float:
        """Resolution limit: as configured, or that of the data."""
        values = (
            inv_d2(store.column("miller_index", rows), store.cell)
            for rows in store.row_blocks(ROWS_AT_A_TIME)
        )
        return end_of_data(values, len(store), self.config.d_min, store.name)

    def _sample(
        self, order: NDArray[np.int64], feature_scaling: FeatureScaling | None
    ) -> ObservationTable:
        """Read some batches as one table, not the holdout batches while there are others."""
        n = max(1, round(SAMPLE * self.n_batches / len(self)))
        chosen = np.sort(order[::-1][:n])
        parts = zip(*(self._read(k) for k in chosen), strict=True)
        data = [joined(of_store) for of_store in parts]
        return build_problem(
            data, self.config, feature_scaling=feature_scaling, unique=self.unique
        ).table

    def _count(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Training observations of each unique reflection, and which batches have any."""
        n_obs = np.zeros(len(self.unique), dtype=np.int64)
        n_kept = np.zeros(self.n_batches, dtype=np.int64)
        for k, store in enumerate(self.stores):
            own = n_obs[self.unique.rows(k)]
            first = store.image_starts[self.edges[:, k]]
            for rows in store.row_blocks(ROWS_AT_A_TIME):
                row = self.unique.asus[k].refl_id(store.column("miller_index", rows))
                kept = is_kept(row, store.column("intensity", rows), store.column("sigma", rows))
                own += np.bincount(row[kept], minlength=len(own))
                batch = np.searchsorted(first, np.arange(rows.start, rows.stop)[kept], "right")
                n_kept += np.bincount(batch - 1, minlength=self.n_batches)
        for k in self.holdout_batches:
            if n_kept[k]:
                table, masks = self.split_holdout(k)
                row = table.terms.row[~masks.is_used].numpy()
                n_obs -= np.bincount(row, minlength=len(n_obs))
        return n_obs, n_kept > 0


def _edges(stores: Sequence[ObservationStore], batch_size: int) -> NDArray[np.int64]:
    """First image of each batch and, at the end, the number of images, of each store."""
    n_obs, n_images = sum(len(s) for s in stores), max(s.n_images for s in stores)
    n = min(max(MIN_BATCHES, round(n_obs / batch_size)), n_images)
    columns = []
    for store in stores:
        inner = np.searchsorted(store.image_starts, np.linspace(0, len(store), n + 1)[1:-1])
        columns.append(np.concatenate([[0], inner, [store.n_images]]))
    return np.unique(np.stack(columns, -1), axis=0)


def joined(parts: Sequence[UnmergedData]) -> UnmergedData:
    """Put images of one store behind each other, numbered anew."""
    images, first = [], 0
    for part in parts:
        images.append(part.image + first)
        first += part.n_images

    def column(of: Callable[[UnmergedData], NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([of(part) for part in parts])

    waves = [part.wavelength for part in parts if part.wavelength is not None]
    return replace(
        parts[0],
        miller_index=column(lambda p: p.miller_index),
        intensity=column(lambda p: p.intensity),
        sigma=column(lambda p: p.sigma),
        image=np.concatenate(images),
        wavelength=np.concatenate(waves) if waves else None,
        metadata={
            name: np.concatenate([p.metadata[name] for p in parts]) for name in parts[0].metadata
        },
    )
