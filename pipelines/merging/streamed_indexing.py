"""Indexing of the stills of stores: one choice for each image, made before they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.merge.config import MergeConfig
from braggflux.merge.indexing.operators import Ambiguity
from braggflux.merge.indexing.stores import resolve_stores
from braggflux.merge.io.stores.observation_store import ObservationStore
from braggflux.merge.io.stores.reindexed_store import ReindexedStore
from braggflux.merge.problem import MergeProblem
from braggflux.pipelines.inputs.inputs import MergeInputs
from braggflux.pipelines.maps.reference_amplitudes import reference_amplitudes
from braggflux.pipelines.merging.indexing import ambiguous_operators, wanted_indexing
from braggflux.pipelines.workspace import log


@dataclass(frozen=True)
class StoreIndexing:
    """Operator of each image, and the number that it has in its file, (n_images,).

    Images are counted through all stores.
    """

    ambiguity: Ambiguity
    number: NDArray[np.int64]


def resolve_indexing(
    inputs: MergeInputs, config: MergeConfig, stores: Sequence[ObservationStore]
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
