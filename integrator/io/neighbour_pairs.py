"""Which spots overlap, as a shoebox store has it: pairs of a box and a neighbour."""

from __future__ import annotations

from dataclasses import dataclass

import h5py
import numpy as np
import torch
from torch import Tensor

from braggflux.integrator.io.hdf5.columns import read_columns
from braggflux.integrator.types import Neighbours

#: Columns, and whether they hold numbers that are no integers.
_IS_REAL = {"row": False, "offset": True, "zeta": True, "experiment": False, "store_row": False}


@dataclass(frozen=True)
class NeighbourPairs:
    """Overlapping spots of every box, those of a box in consecutive rows.

    ``start`` (N + 1,) is where the pairs of each row of the store begin; ``pairs`` has M rows.
    """

    start: Tensor
    pairs: dict[str, Tensor]

    @classmethod
    def read(cls, handle: h5py.File, n_rows: int) -> NeighbourPairs | None:
        """Read those of a store of ``n_rows`` boxes; None of a store that masks neighbours."""
        if "neighbours" not in handle:
            return None
        group = handle["neighbours"]
        found = read_columns(group)
        if {name: values.dtype.kind == "f" for name, values in found.items()} != _IS_REAL:
            raise ValueError(f"neighbours have the columns {', '.join(sorted(found))}, or types")
        columns = {
            name: torch.from_numpy(values.astype(np.float32 if _IS_REAL[name] else np.int64))
            for name, values in found.items()
        }
        row = columns.pop("row")
        if len(row) and not (0 <= int(row[0]) and int(row[-1]) < n_rows):
            raise ValueError(f"neighbours are of rows {int(row[0])} to {int(row[-1])} of {n_rows}")
        if bool((row.diff() < 0).any()):
            raise ValueError("neighbours are not in the order of their boxes")
        return cls(torch.searchsorted(row, torch.arange(n_rows + 1)), columns)

    def check(self, n_sweeps: int) -> None:
        """Refuse pairs that no extraction writes, of a store of so many sweeps.

        Raises
        ------
        ValueError
        """
        limits = {
            "offset": (-1e5, 1e5),
            "zeta": (1e-7, 1e4),  # of one that grazes the axis near 0
            "experiment": (0, n_sweeps - 1),
            "store_row": (-1, len(self.start) - 2),
        }
        for name, (low, high) in limits.items():
            values = self.pairs[name]
            if len(values) and not (values.min() >= low and values.max() <= high):
                raise ValueError(
                    f"{name} of neighbours is {values.min()} to {values.max()}, {low:g} to "
                    f"{high:g} are possible"
                )

    def of(self, rows: Tensor | slice) -> Neighbours | None:
        """Neighbours of some boxes; None where none has any."""
        most = self.most(rows)
        return self.first(rows, most) if most else None

    def most(self, rows: Tensor | slice) -> int:
        """Largest number of neighbours of any of some boxes."""
        n = self.start[1:][rows] - self.start[:-1][rows]
        return int(n.max()) if len(n) else 0

    def to(self, device: torch.device) -> NeighbourPairs:
        """Copy to a device."""
        pairs = {name: values.to(device) for name, values in self.pairs.items()}
        return NeighbourPairs(self.start.to(device), pairs)

    def first(self, rows: Tensor | slice, most: int) -> Neighbours:
        """Neighbours of some boxes, of which none has more than ``most``."""
        first = self.start[:-1][rows]
        n = self.start[1:][rows] - first
        place = torch.arange(most, device=n.device)
        is_present = place < n[:, None]
        index = torch.where(is_present, first[:, None] + place, 0)
        return Neighbours(is_present, **{k: v[index] for k, v in self.pairs.items()})
