"""Indexing ambiguity in the files of a merge: the reference, the table of images, the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import torch
from torch import Tensor

from integrator.crystal.ambiguity import IndexingOperators, indexing_operators
from integrator.errors import UserError
from merge.intensities.ambiguity_choice import Ambiguity
from merge.intensities.build import MergeProblem
from merge.intensities.config import IntensityMergeConfig
from merge.io.observations import CELL_TOLERANCE, UnmergedData
from merge.io.unmerged_mtz import load_mtz
from pipelines.rundir import write_rows

logger = logging.getLogger(__name__)

#: Column types of merged files in the order of preference; of the last two the square counts.
_KINDS = ("J", "K", "F", "G")
#: An image is called sure from this probability on.
SURE = 0.99


@dataclass(frozen=True)
class Reference:
    """Merged intensities of known indexing: indices (M, 3) and values (M,)."""

    miller_index: np.ndarray
    intensity: np.ndarray

    def on_rows(self, problem: MergeProblem) -> Tensor:
        """Mean value of each row of the first dataset, NaN where there is none, (R0,)."""
        asu = problem.unique.asus[0]
        row = asu.refl_id(self.miller_index)
        value = self.intensity[row >= 0]
        row = asu.refl_id(asu.asu_index)[row[row >= 0]]  # Friedel mates together
        count = np.bincount(row, minlength=len(asu))
        with np.errstate(invalid="ignore"):
            return torch.as_tensor(np.bincount(row, value, minlength=len(asu)) / count)


def ambiguous_operators(
    data: Sequence[UnmergedData], config: IntensityMergeConfig
) -> IndexingOperators | None:
    """Ways in which the images can be indexed; None where there is but one, or none is wanted."""
    if not config.stills or config.resolve_ambiguity == "none":
        return None
    operators = indexing_operators(data[0].cell, data[0].space_group, config.ambiguity_tolerance)
    return operators if len(operators) > 1 else None


def read_reference(
    config: IntensityMergeConfig, data: Sequence[UnmergedData], is_needed: bool
) -> Reference | None:
    """Read the reference, where one is given.

    Raises
    ------
    UserError
        Not a merged MTZ file with intensities or amplitudes of this crystal form.
    """
    path = config.reference_intensities
    if path is None:
        return None
    mtz = load_mtz(path)
    own = data[0]
    _check_reference(mtz, path, own)
    kind = next((k for k in _KINDS if len(mtz.columns_with_type(k))), None)
    if kind is None:
        raise UserError(
            f"{path} has neither intensities nor amplitudes (columns of type J, K, F or G; found "
            f"{' '.join(mtz.column_labels())}); give a merged file that has"
        )
    value = np.array(mtz.columns_with_type(kind)[0], dtype=float)
    known = np.isfinite(value)
    if not is_needed:
        logger.warning(
            "%s is not used: %s", path, "no still has a choice of indexing, or --stills is missing"
        )
        return None
    value = value[known] ** (2 if kind in "FG" else 1)
    return Reference(mtz.make_miller_array()[known].astype(np.int32), value)


def _check_reference(mtz: gemmi.Mtz, path: Path, own: UnmergedData) -> None:
    if len(mtz.columns_with_type("B")):
        raise UserError(f"the reference {path} is unmerged; give a merged MTZ file")
    if mtz.spacegroup.point_group_hm() != own.space_group.point_group_hm():
        raise UserError(
            f"the reference {path} is in {mtz.spacegroup.xhm()}, {own.name} in "
            f"{own.space_group.xhm()}; give one of the same crystal form"
        )
    if not own.cell.is_similar(mtz.cell, CELL_TOLERANCE, float(np.degrees(CELL_TOLERANCE))):
        cells = ["{:.2f} {:.2f} {:.2f}".format(*c.parameters) for c in (mtz.cell, own.cell)]
        raise UserError(
            f"the cell of the reference {path} ({cells[0]}) is not that of {own.name} "
            f"({cells[1]}); give one of the same crystal form"
        )


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
