"""Batches of shoeboxes on the device of the arithmetic.

On the CPU they are read as they are needed. On a GPU all boxes are resident where they fit into
half of its free memory: a batch is then picked out there, and nothing is copied. Where they do not
fit, a thread reads the next batch into pinned memory while the present one is worked on, and the
copy runs beside the arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from braggflux.integrator.io.boxes_in_memory import BoxesInMemory
from braggflux.integrator.memory import available_bytes
from braggflux.integrator.processes import ALONE, Processes
from braggflux.integrator.shoebox.dataset import ShoeboxDataset
from braggflux.integrator.types import ShoeboxBatch
from braggflux.merge.stream.prefetch import read_ahead

#: Share of a GPU's free memory that boxes may take.
RESIDENT_SHARE = 0.5
#: Boxes that are held in the host's memory where they fit in half of what is free [bytes].
HOST_BYTES = 4 << 30
#: Gives one epoch: batches of a size, shuffled by a generator or in the order of the store.
Batches = Callable[..., Iterator[ShoeboxBatch]]


def device_batches(
    dataset: ShoeboxDataset, device: torch.device, *, is_resident: bool | None = None
) -> Batches:
    """Choose how batches come to a device.

    Parameters
    ----------
    dataset : ShoeboxDataset
    device : torch.device
    is_resident : bool, optional
        Whether all boxes are held on the device; by default where they fit. On the CPU no matter.

    Returns
    -------
    callable
        With the parameters of :meth:`ShoeboxDataset.batches`.
    """
    if device.type == "cpu":
        return dataset.batches
    boxes = dataset.store.in_memory
    if boxes is not None and (_fits(boxes, device) if is_resident is None else is_resident):
        return _Resident(dataset, boxes.to(device), device)
    return _Prefetched(dataset, device)


def byte_limit(device: torch.device) -> int:
    """Largest size of boxes that a run holds in memory [bytes].

    On the host, and for a GPU what it can hold, as far as the host can hand it over.
    """
    at_hand = min(HOST_BYTES, available_bytes() / 2)
    if device.type != "cuda":
        return int(at_hand)
    free, _ = torch.cuda.mem_get_info(device)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(int(at_hand), int(RESIDENT_SHARE * min(free, host)))


def _fits(boxes: BoxesInMemory, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return boxes.n_bytes < RESIDENT_SHARE * free


class _Resident:
    """Batches of boxes that lie on the device."""

    def __init__(
        self, dataset: ShoeboxDataset, boxes: BoxesInMemory, device: torch.device
    ) -> None:
        self.dataset, self.boxes, self.device = dataset, boxes, device
        self.pairs = dataset.store.pairs  # on the host

    def __call__(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        processes: Processes = ALONE,
    ) -> Iterator[ShoeboxBatch]:
        here, pairs = self.dataset.rows_of_batches(batch_size, generator, processes), self.pairs
        there = torch.cat(here).to(self.device).split([len(rows) for rows in here])
        for rows, rows_there in zip(here, there, strict=True):
            yield self.boxes.read(rows_there, 0 if pairs is None else pairs.most(rows))


class _Prefetched:
    """Batches that are read and pinned while the one before is worked on."""

    def __init__(self, dataset: ShoeboxDataset, device: torch.device) -> None:
        self.dataset, self.device = dataset, device

    def __call__(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        processes: Processes = ALONE,
    ) -> Iterator[ShoeboxBatch]:
        keys = self.dataset.rows_of_batches(batch_size, generator, processes)
        for _, batch in read_ahead(self._read, keys):
            yield batch.to(self.device, non_blocking=True)

    def _read(self, rows: Tensor) -> ShoeboxBatch:
        batch = self.dataset.store.read(rows)
        return batch.pin_memory() if self.device.type == "cuda" else batch
