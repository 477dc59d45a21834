"""Indexing of the stills of a store: one choice for each image, made before they are merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.intensities.ambiguity_choice import Ambiguity
from merge.intensities.ambiguity_store import resolve_store
from merge.intensities.build import MergeProblem
from merge.intensities.config import IntensityMergeConfig
from merge.io.reindexed_store import ReindexedStore
from merge.io.unmerged_store import UnmergedStore
from pipelines import log
from pipelines.ambiguity import ambiguous_operators, wanted_indexing
from pipelines.merge_inputs import MergeInputs
from pipelines.reference_amplitudes import reference_amplitudes


@dataclass(frozen=True)
class StoreIndexing:
    """Operator of each image, and the number that it has in its file, (n_images,)."""

    ambiguity: Ambiguity
    number: NDArray[np.int64]


def resolve_indexing(
    inputs: MergeInputs, config: IntensityMergeConfig, store: UnmergedStore
) -> StoreIndexing | None:
    """Choose the operator of each image; None where there is no choice."""
    operators = ambiguous_operators([store], config)
    if operators is None:
        return None

    def wanted(problem: MergeProblem) -> Tensor | None:
        f_calc = None
        if inputs.reference is not None:
            f_calc = torch.as_tensor(reference_amplitudes(inputs.reference, problem.unique.asus))
        return wanted_indexing(config, problem, f_calc)

    with log.progress("indexing") as advance:
        return StoreIndexing(*resolve_store(store, config, operators, wanted, advance))


def open_indexed(path: Path, indexing: StoreIndexing | None) -> UnmergedStore:
    """Open a store under the indices that were chosen."""
    if indexing is None:
        return UnmergedStore(path)
    chosen = indexing.ambiguity
    return ReindexedStore(path, chosen.operators.matrices, chosen.choice.numpy())
