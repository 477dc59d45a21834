"""Indexing ambiguity in the files of a merge: the reference, the table of images, the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.crystal.ambiguity import IndexingOperators, indexing_operators
from braggflux.integrator.crystal.forms import CrystalForm
from braggflux.merge.config import MergeConfig
from braggflux.merge.indexing.operators import Ambiguity
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.problem import MergeProblem
from braggflux.pipelines.maps.reference_amplitudes import reference_intensities
from braggflux.pipelines.workspace.rundir import write_rows

logger = logging.getLogger(__name__)

#: An image is called sure from this probability on.
SURE = 0.99


def ambiguous_operators(
    data: Sequence[CrystalForm], config: MergeConfig
) -> IndexingOperators | None:
    """Ways in which the images can be indexed; None where there is but one, or none is wanted."""
    if not config.stills or config.resolve_ambiguity == "none":
        return None
    operators = indexing_operators(data[0].cell, data[0].space_group, config.ambiguity_tolerance)
    if len(operators) == 1:
        return None
    names = ", ".join(operators.names)
    logger.info("each image chooses among %d ways to index it: %s", len(operators), names)
    return operators


def wanted_indexing(
    config: MergeConfig, problem: MergeProblem, f_calc: Tensor | None
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


def image_numbers(problem: MergeProblem, data: Sequence[UnmergedData]) -> NDArray:
    """Return the number of each image in its file, (G,)."""
    first = np.unique(problem.table.observations.image.numpy(), return_index=True)[1]
    numbers = np.concatenate([d.metadata.get("BATCH", d.image) for d in data])
    return numbers[problem.source[first]]


def write_choices(problem: MergeProblem, number: NDArray, path: Path) -> None:
    """Write the operator of each image, ``number`` (G,) in its file, and log the shares."""
    o = problem.table.observations
    first = np.unique(o.image.numpy(), return_index=True)[1]
    names = [problem.names[k] for k in o.dataset.numpy()[first]]
    write_indexing(path, problem.ambiguity, number, names)


def write_indexing(
    path: Path, ambiguity: Ambiguity, number: NDArray, names: Sequence[str]
) -> None:
    """Write the operator of each image with its number and the name of its dataset, (G,) each."""
    rows = [
        {
            "dataset": name,
            "image": int(n),
            "operator": ambiguity.operators.names[a],
            "confidence": f"{c:.4f}",
        }
        for name, n, a, c in zip(
            names, number, ambiguity.choice.tolist(), ambiguity.confidence.tolist(), strict=True
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
