"""Indexing operator of each image, and the rows of its observations under any operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.crystal.ambiguity import IndexingOperators
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.rows import UniqueRows


@dataclass(frozen=True)
class Ambiguity:
    """Indexing operators and the choice among them.

    Parameters
    ----------
    operators : IndexingOperators
    rows : Tensor, (N, A) int64
        Unique reflection of each observation of the table under each operator.
    choice : Tensor, (G,) int64
        Operator of each image.
    confidence : Tensor, (G,)
        Its probability.
    changed : tuple of float
        Share of the images that changed their operator, in each round of the training.
    """

    operators: IndexingOperators
    rows: Tensor
    choice: Tensor
    confidence: Tensor
    changed: tuple[float, ...] = ()

    @classmethod
    def of(
        cls, operators: IndexingOperators, rows: NDArray[np.int64], table: ObservationTable
    ) -> Ambiguity:
        """Begin with the indices as they are."""
        n_images = int(table.observations.image.max()) + 1
        return cls(
            operators,
            torch.as_tensor(rows),
            torch.zeros(n_images, dtype=torch.int64),
            torch.full((n_images,), 1.0 / len(operators), dtype=torch.float64),
        )

    @property
    def share(self) -> Tensor:
        """Share of the images that each operator has, (A,)."""
        count = torch.bincount(self.choice, minlength=len(self.operators)).double()
        return count / len(self.choice)

    @property
    def identity(self) -> int:
        """Operator that most images have among those that all together could have."""
        share = self.share * torch.as_tensor(self.operators.is_symmetric)
        return int(share.argmax())


def alternative_rows(
    index: NDArray[np.int32],
    dataset: NDArray[np.int64],
    unique: UniqueRows,
    operators: IndexingOperators,
) -> NDArray[np.int64]:
    """Find the unique reflection of each observation under each operator, (N, A); -1 for none.

    Parameters
    ----------
    index : (N, 3)
        As observed.
    dataset : (N,)
    unique : UniqueRows
    operators : IndexingOperators
    """
    rows = np.full((len(index), len(operators)), -1)
    for k, asu in enumerate(unique.asus):
        own = dataset == k
        for a, matrix in enumerate(operators.matrices):
            found = asu.refl_id(index[own] @ matrix)
            rows[own, a] = np.where(found >= 0, found + unique.first[k], -1)
    return rows
