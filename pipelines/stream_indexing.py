"""Indexing of the stills of stores: one choice for each image, made before they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.intensities.ambiguity_choice import Ambiguity
from merge.intensities.ambiguity_store import resolve_stores
from merge.intensities.build import MergeProblem
from merge.intensities.config import IntensityMergeConfig
from merge.io.observation_store import ObservationStore
from merge.io.reindexed_store import ReindexedStore
from pipelines import log
from pipelines.ambiguity import ambiguous_operators, wanted_indexing
from pipelines.merge_inputs import MergeInputs
from pipelines.reference_amplitudes import reference_amplitudes


@dataclass(frozen=True)
class StoreIndexing:
    """Operator of each image, and the number that it has in its file, (n_images,).

    Images are counted through all stores.
    """

    ambiguity: Ambiguity
    number: NDArray[np.int64]


def resolve_indexing(
    inputs: MergeInputs, config: IntensityMergeConfig, stores: Sequence[ObservationStore]
) -> StoreIndexing | None:
    """Choose the operator of each image; None where there is no choice."""
    operators = ambiguous_operators(stores, config)
    if operators is None:
        return None

    def wanted(problem: MergeProblem) -> Tensor | None:
        f_calc = None
        if inputs.prior_model is not None:
            f_calc = torch.as_tensor(reference_amplitudes(inputs.prior_model, problem.unique.asus))
        return wanted_indexing(config, problem, f_calc)

    with log.progress("indexing") as advance:
        return StoreIndexing(*resolve_stores(stores, config, operators, wanted, advance))


def indexed(
    stores: Sequence[ObservationStore], indexing: StoreIndexing | None
) -> list[ObservationStore]:
    """Read stores under the indices that were chosen."""
    if indexing is None:
        return list(stores)
    chosen = indexing.ambiguity
    edges = np.cumsum([store.n_images for store in stores])[:-1]
    choices = np.split(chosen.choice.numpy(), edges)
    matrices = chosen.operators.matrices
    return [ReindexedStore(s, matrices, choice) for s, choice in zip(stores, choices, strict=True)]
