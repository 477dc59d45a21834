"""Indexing ambiguity of stills in a store: some images agree, all are compared with them.

The first choice (:mod:`merge.intensities.ambiguity_seed`) is made for a sample of images in
memory; then one pass over the store compares every image with what the sample agreed on. Memory is
that of the sample, one block, and a few bytes per image. The choice is not revised in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from integrator.crystal.ambiguity import IndexingOperators
from integrator.errors import UserError
from merge.intensities.ambiguity import seeded, standard_intensities
from merge.intensities.ambiguity_choice import Ambiguity
from merge.intensities.ambiguity_seed import agreement
from merge.intensities.build import MergeProblem, build_problem
from merge.intensities.config import IntensityMergeConfig
from merge.intensities.held_out import Split
from merge.intensities.stream import joined
from merge.io.observations import UnmergedData
from merge.io.unmerged_store import UnmergedStore

SAMPLE = 4000  # images
PIECE = 50  # images of the sample that are read together
BLOCK = 2000  # images

Progress = Callable[[int, int], None]


def resolve_store(
    store: UnmergedStore,
    config: IntensityMergeConfig,
    operators: IndexingOperators,
    wanted: Callable[[MergeProblem], Tensor | None],
    progress: Progress | None = None,
) -> tuple[Ambiguity, NDArray[np.int64]]:
    """Choose the operator of each image of a store.

    Parameters
    ----------
    store : UnmergedStore
    config : IntensityMergeConfig
    operators : IndexingOperators
    wanted : callable
        Reference of :func:`merge.intensities.ambiguity.seeded` for the problem of the sample.
    progress : callable, optional
        Called with the number of images done and that of all.

    Returns
    -------
    Ambiguity
        Without ``rows``.
    ndarray, (n_images,)
        Number of each image as its file has it.
    """
    config = replace(config, overloads="keep", metadata=None)
    problem = build_problem([_sample(store, config.seed)], config, operators=operators)
    problem = seeded(problem, _no_masks(problem), config, wanted(problem))
    n, n_operators = store.n_images, len(operators)
    agreed = agreement(
        standard_intensities(problem, _no_masks(problem)),
        torch.nn.functional.one_hot(problem.ambiguity.choice, n_operators).double(),
    )
    choice, number = np.zeros(n, dtype=np.int64), np.arange(n)
    confidence = np.full(n, 1.0 / n_operators)
    for first, block in store.blocks(BLOCK):
        images = slice(first, first + block.n_images)
        if "BATCH" in block.metadata:
            rows = np.minimum(block.image_starts[:-1], len(block) - 1)
            number[images] = block.metadata["BATCH"][rows]
        try:
            part = build_problem([block], config, operators=operators, unique=problem.unique)
        except UserError:  # nothing of these images is inside the resolution limit
            continue
        probability = agreed.compare(standard_intensities(part, _no_masks(part)))
        best, chosen = probability.max(1)
        present = first + np.unique(block.image[part.source])
        choice[present], confidence[present] = chosen.numpy(), best.numpy()
        if progress is not None:
            progress(images.stop, n)
    found = replace(
        problem.ambiguity,
        rows=problem.ambiguity.rows[:0],
        choice=torch.as_tensor(choice),
        confidence=torch.as_tensor(confidence),
    )
    return found, number


def _sample(store: UnmergedStore, seed: int) -> UnmergedData:
    """Read random pieces of the store."""
    starts = np.arange(0, store.n_images, PIECE)
    chosen = np.random.default_rng(seed).permutation(starts)[: -(-SAMPLE // PIECE)]
    pieces = [store.read(k, min(k + PIECE, store.n_images)) for k in np.sort(chosen)]
    return joined([p for p in pieces if len(p)])


def _no_masks(problem: MergeProblem) -> Split:
    nothing = torch.zeros(len(problem.table.observations), dtype=torch.bool)
    return Split(nothing, nothing, ~nothing)
