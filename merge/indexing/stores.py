"""Indexing ambiguity of stills in stores: some images agree, all are compared with them.

The first choice (:mod:`braggflux.merge.indexing.seed`) is made for a sample of images in
memory; then one pass over the stores compares every image with what it agreed on. Memory is
that of the sample, one block, and a few bytes per image. The choice is not revised in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.crystal.ambiguity import IndexingOperators
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.held_out import Split
from braggflux.merge.indexing.operators import Ambiguity
from braggflux.merge.indexing.refine import seeded, standard_intensities
from braggflux.merge.indexing.seed import agreement
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.stores.observation_store import ObservationStore
from braggflux.merge.problem import MergeProblem, build_problem
from braggflux.merge.stream.batches import joined

SAMPLE = 4000  # images
PIECE = 50  # images of the sample that are read together
BLOCK = 2000  # images

Progress = Callable[[int, int], None]


def resolve_stores(
    stores: Sequence[ObservationStore],
    config: MergeConfig,
    operators: IndexingOperators,
    wanted: Callable[[MergeProblem], Tensor | None],
    progress: Progress | None = None,
) -> tuple[Ambiguity, NDArray[np.int64]]:
    """Choose the operator of each image, counted through all stores.

    Parameters
    ----------
    stores : sequence of ObservationStore
    config : MergeConfig
    operators : IndexingOperators
    wanted : callable
        Reference of :func:`braggflux.merge.indexing.refine.seeded` for the problem of the sample.
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
    edges = np.concatenate([[0], np.cumsum([store.n_images for store in stores])])
    n, n_operators = int(edges[-1]), len(operators)
    sample = [_sample(s, config.seed, round(SAMPLE * s.n_images / n)) for s in stores]
    problem = build_problem(sample, config, operators=operators)
    problem = seeded(problem, _no_masks(problem), config, wanted(problem))
    agreed = agreement(
        standard_intensities(problem, _no_masks(problem)),
        torch.nn.functional.one_hot(problem.indexing.choice, n_operators).double(),
    )
    choice = np.zeros(n, dtype=np.int64)
    number = np.concatenate([np.arange(store.n_images) for store in stores])
    confidence = np.full(n, 1.0 / n_operators)
    step = max(1, BLOCK // len(stores))
    for first in range(0, max(store.n_images for store in stores), step):
        ranges = [(min(first, s.n_images), min(first + step, s.n_images)) for s in stores]
        data = [store.read(*part) for store, part in zip(stores, ranges, strict=True)]
        images = [
            d.image + low + edge for d, (low, _), edge in zip(data, ranges, edges, strict=False)
        ]
        for own, d in zip(images, data, strict=True):
            number[own] = d.metadata.get("BATCH", number[own])
        try:
            part = build_problem(data, config, operators=operators, unique=problem.unique)
        except UserError:  # nothing of these images is inside the resolution limit
            continue
        probability = agreed.compare(standard_intensities(part, _no_masks(part)))
        best, chosen = probability.max(1)
        present = np.unique(np.concatenate(images)[part.source])
        choice[present], confidence[present] = chosen.numpy(), best.numpy()
        if progress is not None:
            progress(sum(high for _, high in ranges), n)
    found = replace(
        problem.indexing,
        rows=problem.indexing.rows[:0],
        choice=torch.as_tensor(choice),
        confidence=torch.as_tensor(confidence),
    )
    return found, number


def _sample(store: ObservationStore, seed: int, n_images: int) -> UnmergedData:
    """Read random pieces of the store, about ``n_images`` in all."""
    starts = np.arange(0, store.n_images, PIECE)
    chosen = np.random.default_rng(seed).permutation(starts)[: -(-n_images // PIECE)]
    pieces = [store.read(k, min(k + PIECE, store.n_images)) for k in np.sort(chosen)]
    return joined([p for p in pieces if len(p)])


def _no_masks(problem: MergeProblem) -> Split:
    nothing = torch.zeros(len(problem.table.observations), dtype=torch.bool)
    return Split(nothing, nothing, ~nothing)
