"""All shoeboxes of a store as tensors, on the CPU or resident on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from braggflux.integrator.io.neighbour_pairs import NeighbourPairs
from braggflux.integrator.shoebox.mask import MaskBit
from braggflux.integrator.types import Neighbours, ReflectionMetadata, ShoeboxBatch


def shoebox_batch(
    counts: Tensor,
    mask: Tensor,
    metadata: ReflectionMetadata,
    neighbours: Neighbours | None,
    exclude: int = MaskBit.OVERLAPPED,
) -> ShoeboxBatch:
    """Put together what was read of some boxes.

    Parameters
    ----------
    counts, mask : Tensor, (B, D, H, W)
        Of :meth:`BoxesInMemory.read_raw`.
    metadata : ReflectionMetadata
    neighbours : Neighbours or None
    exclude : int
        Mask bits that make a recorded voxel invalid; 0 keeps voxels of neighbours.
    """
    is_valid = (mask & MaskBit.VALID).bool() & (mask & exclude == 0)
    return ShoeboxBatch(counts.float() * is_valid, is_valid, metadata, neighbours)


@dataclass(frozen=True)
class BoxesInMemory:
    """Boxes, what is known of their reflections, and which overlap.

    Parameters
    ----------
    counts : Tensor, (N, D, H, W)
        int32, or int16 whose bits are those of an unsigned count.
    mask : Tensor, (N, D, H, W) uint8
        Bits of :class:`MaskBit`.
    metadata : ReflectionMetadata
    pairs : NeighbourPairs, optional
    """

    counts: Tensor
    mask: Tensor
    metadata: ReflectionMetadata
    pairs: NeighbourPairs | None

    @property
    def n_bytes(self) -> int:
        """Memory of all."""
        columns = [self.counts, self.mask, *self.metadata.columns().values()]
        if self.pairs is not None:
            columns += self.pairs.pairs.values()
        return sum(column.numel() * column.element_size() for column in columns)

    def to(self, device: torch.device) -> BoxesInMemory:
        """Copy to a device."""
        return replace(
            self,
            counts=self.counts.to(device),
            mask=self.mask.to(device),
            metadata=self.metadata.to(device),
            pairs=None if self.pairs is None else self.pairs.to(device),
        )

    def read_raw(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Read counts (B, D, H, W) int32 and mask bits (B, D, H, W) uint8, rows in any order."""
        counts = self.counts[rows].to(torch.int32)
        if self.counts.dtype == torch.int16:
            counts = counts & 0xFFFF  # the sign bit of the stored 16 bits is a count
        return counts, self.mask[rows]

    def read(self, rows: Tensor, n_neighbours: int) -> ShoeboxBatch:
        """Shoeboxes of some rows, (B,), on the same device.

        ``n_neighbours`` is the largest number of any box of them: it is known on the host, so
        that nothing waits for a GPU.
        """
        counts, mask = self.read_raw(rows)
        neighbours = None
        if self.pairs is not None and n_neighbours:
            neighbours = self.pairs.first(rows, n_neighbours)
        return shoebox_batch(counts, mask, self.metadata[rows], neighbours)
