"""Minibatches of shoeboxes, and the split that keeps some images for validation.

Reflections of one image share its beam and its background; a held-out set must therefore be
chosen by image, not by reflection. Blocks of consecutive frames are held out, since a reflection
spreads over several.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.processes import ALONE, Processes
from braggflux.integrator.types import Flag, ShoeboxBatch

POOL_CHUNKS = 32
"""Chunks of the file that are shuffled together in a large store."""
POOLED_BYTES = 1 << 30
"""Size of a large store. Not whether it is held in memory: all processes of a run, and one that
resumes it beside other programs, must take the same order."""


class ShoeboxDataset:
    """Rows of a store in shuffled or natural order.

    Parameters
    ----------
    store : ShoeboxStore
    rows : Tensor, (N,) int64, optional
        A subset, increasing; by default every reflection that is not rejected.
    byte_limit : int
        The store is held in memory if it needs no more.
    """

    def __init__(
        self, store: ShoeboxStore, rows: Tensor | None = None, *, byte_limit: int = 4 << 30
    ) -> None:
        self.store = store
        if rows is None:
            rows = torch.nonzero(store.flags & Flag.REJECTED == 0)[:, 0]
        self.rows = rows
        store.cache_in_memory(byte_limit)

    def __len__(self) -> int:
        """Return the number of reflections."""
        return len(self.rows)

    def n_batches(self, batch_size: int) -> int:
        """Batches in one epoch."""
        return -(-len(self) // batch_size)

    def batches(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        processes: Processes = ALONE,
    ) -> Iterator[ShoeboxBatch]:
        """One epoch; every row once.

        Parameters
        ----------
        batch_size : int
            The last batch may be smaller.
        generator : torch.Generator, optional
            Shuffles; the same state gives the same batches.
        processes : Processes
            Each gets its share of every batch; it may be empty.
        """
        for rows in self.rows_of_batches(batch_size, generator, processes):
            yield self.store.read(rows)

    def rows_of_batches(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        processes: Processes = ALONE,
    ) -> list[Tensor]:
        """Rows of each of :meth:`batches`, of an epoch."""
        order = self.rows if generator is None else self._shuffled(generator)
        return [rows[processes.share(len(rows))] for rows in order.split(batch_size)]

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        if self.store.n_bytes <= POOLED_BYTES:
            return self.rows[torch.randperm(len(self.rows), generator=generator)]
        # From disk, rows of a chunk cost one read together: chunks are shuffled, then rows inside
        # pools of chunks.
        chunk = self.rows // self.store.chunk_rows
        numbers, member = torch.unique(chunk, return_inverse=True)
        rank = torch.randperm(len(numbers), generator=generator)
        pool = rank[member] // POOL_CHUNKS
        shuffled = torch.randperm(len(self.rows), generator=generator)
        return self.rows[shuffled[torch.argsort(pool[shuffled], stable=True)]]
