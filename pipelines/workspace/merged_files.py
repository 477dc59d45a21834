"""Files of one merged dataset: amplitudes, half sets, statistics; the same from every command."""

from __future__ import annotations

import logging
from datetime import date
from pathlib import Path

from braggflux.merge.io.dataset_labels import DatasetLabels
from braggflux.merge.io.mtz import write_half_sets_mtz, write_merged_mtz
from braggflux.merge.output.datasets import MergedDataset
from braggflux.merge.output.free_flags import FreeFlags
from braggflux.pipelines.workspace.provenance import package_version

logger = logging.getLogger(__name__)

HALF_SETS = "half_sets.mtz"


def write_merged(
    path: Path,
    dataset: MergedDataset,
    labels: DatasetLabels,
    made_by: str,
    free: FreeFlags,
) -> None:
    """Write the merged MTZ.

    Parameters
    ----------
    path : Path
    dataset : MergedDataset
    labels : DatasetLabels
        Of the input.
    made_by : str
        First line of the history, after program and version.
    free : FreeFlags
        How the test set is chosen.
    """
    if labels.wavelength is None:
        logger.warning(
            "%s: the input does not know its wavelength; 0 is written, which MTZ has for unknown",
            path.name,
        )
    write_merged_mtz(
        path,
        dataset.table,
        dataset.asu.cell,
        dataset.asu.space_group,
        labels.wavelength or 0.0,
        history=[first_line(made_by), *dataset.history, *free.history],
        names=labels.names,
        title=labels.title,
        free_flag=free.numbers(
            dataset.table.miller_index, dataset.asu.cell, dataset.asu.space_group
        ),
    )


def write_half_sets(
    path: Path, dataset: MergedDataset, labels: DatasetLabels, made_by: str
) -> None:
    """Write the amplitudes of the random halves; parameters as :func:`write_merged`."""
    write_half_sets_mtz(
        path,
        dataset.asu,
        dataset.half_sets,
        labels.wavelength or 0.0,
        history=[
            first_line(made_by),
            "F1 F2: random halves of the observations, scales of all, Wilson's prior alone;",
            "  F3 F4 of the next split",
        ],
        names=labels.names,
        title=labels.title,
    )


def first_line(made_by: str) -> str:
    """Say program, version and day, as MTZ has no other place for a date."""
    return f"braggflux {package_version()}, {date.today():%Y-%m-%d}, {made_by}"
