"""Indexing ambiguity in the files of a merge: the reference, the table of images, the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from integrator.crystal.ambiguity import IndexingOperators, indexing_operators
from merge.intensities.ambiguity_choice import Ambiguity
from merge.intensities.build import MergeProblem
from merge.intensities.config import IntensityMergeConfig
from merge.io.observations import UnmergedData
from pipelines.reference_amplitudes import reference_intensities
from pipelines.rundir import write_rows

logger = logging.getLogger(__name__)

#: An image is called sure from this probability on.
SURE = 0.99


def ambiguous_operators(
    data: Sequence[UnmergedData], config: IntensityMergeConfig
) -> IndexingOperators | None:
    """Ways in which the images can be indexed; None where there is but one, or none is wanted."""
    if not config.stills or config.resolve_ambiguity == "none":
        return None
    operators = indexing_operators(data[0].cell, data[0].space_group, config.ambiguity_tolerance)
    return operators if len(operators) > 1 else None


def wanted_indexing(
    config: IntensityMergeConfig, problem: MergeProblem, f_calc: Tensor | None
) -> Tensor | None:
    """F^2 of the rows of the first dataset under the wanted indexing, (R0,); NaN for none.

    That of ``reference_intensities``, else of the amplitudes ``f_calc`` (R,) of a reference.

    Raises
    ------
    UserError
        The reference cannot be used.
    """
    path = config.reference_intensities
    if path is not None:
        known = torch.as_tensor(reference_intensities(path, problem.unique.asus[0]))
        if problem.ambiguity is not None:
            return known
        logger.warning("%s is not used: there is but one way to index these stills", path)
    if problem.ambiguity is None or f_calc is None:
        return None
    return f_calc[problem.unique.rows(0)] ** 2


def summary(ambiguity: Ambiguity) -> dict[str, Any]:
    """Operators with their shares, and how sure the choices are, for metrics.json."""
    return {
        "operators": dict(zip(ambiguity.operators.names, ambiguity.share.tolist(), strict=True)),
        "mean_confidence": float(ambiguity.confidence.mean()),
        "share_sure": float((ambiguity.confidence > SURE).double().mean()),
        "changed_by_round": list(ambiguity.changed),
    }


def write_choices(problem: MergeProblem, data: Sequence[UnmergedData], path: Path) -> None:
    """Write the operator of each image and log the shares."""
    ambiguity = problem.ambiguity
    o = problem.table.observations
    image, first = np.unique(o.image.numpy(), return_index=True)
    numbers = np.concatenate([d.metadata.get("BATCH", d.image) for d in data])
    number, dataset = numbers[problem.source[first]], o.dataset.numpy()[first]
    confidence = ambiguity.confidence.numpy()
    rows = [
        {
            "dataset": problem.names[k],
            "image": int(n),
            "operator": ambiguity.operators.names[a],
            "confidence": f"{c:.4f}",
        }
        for k, n, a, c in zip(
            dataset, number, ambiguity.choice.numpy()[image], confidence[image], strict=True
        )
    ]
    write_rows(path, rows, rows[0])
    said = summary(ambiguity)
    logger.info(
        "indexing: %s; mean confidence %.3f, %.1f %% of the images above %.2f",
        ", ".join(f"{name} {100 * s:.1f} %" for name, s in said["operators"].items()),
        said["mean_confidence"],
        100 * said["share_sure"],
        SURE,
    )
