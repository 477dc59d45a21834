"""Groups of the command line: which inputs are one data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from braggflux.integrator.errors import UserError
from braggflux.merge.data.grouping import BATCH, batch_step
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.stores.observation_store import ObservationStore
from braggflux.pipelines.inputs.reindexing import Dataset

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 1 << 20
ALL = "all"


def parse_groups(texts: Sequence[str]) -> tuple[tuple[int, ...] | None, ...]:
    """Read ``0,1`` and ``all`` (None), one of each occurrence of the flag.

    Raises
    ------
    UserError
    """
    groups: list[tuple[int, ...] | None] = []
    for text in texts:
        words = [word.strip() for word in text.split(",")]
        if words == [ALL]:
            groups.append(None)
        elif len(words) > 1 and all(word.isdigit() for word in words):
            groups.append(tuple(int(word) for word in words))
        else:
            raise UserError(
                f"--group {text}: give the numbers of two or more datasets, counted from 0, like "
                f"0,1, or {ALL}"
            )
    return tuple(groups)


def complete_groups(
    groups: Sequence[tuple[int, ...] | None], n_datasets: int
) -> list[tuple[int, ...]]:
    """Members of each group of datasets, in the order of their first members.

    Raises
    ------
    UserError
        A dataset does not exist, or is in two groups.
    """
    members = [g if g is not None else tuple(range(n_datasets)) for g in groups]
    named = [k for group in members for k in group]
    if beyond := [k for k in named if k >= n_datasets]:
        raise UserError(
            f"--group: dataset {beyond[0]} does not exist; allowed are 0 to {n_datasets - 1}"
        )
    if twice := [k for k in named if named.count(k) > 1]:
        raise UserError(f"--group: dataset {twice[0]} is named twice; it can be in one group only")
    alone = [(k,) for k in range(n_datasets) if k not in named]
    return sorted([tuple(sorted(group)) for group in members] + alone)


def apply_groups(
    data: Sequence[Dataset],
    groups: Sequence[tuple[int, ...] | None],
    combine: Callable[[Sequence[Dataset], int], Dataset],
) -> list[Dataset]:
    """Join the members of each group, in memory or on disk; the others stay as they are.

    Raises
    ------
    UserError
        As :func:`complete_groups`, or the members are no single data set.
    """
    if not groups:
        return list(data)
    whole = complete_groups(groups, len(data))
    step = batch_step(whole, [_batch_range(d) for d in data])
    joined = []
    for number, group in enumerate(whole):
        members = [data[k] for k in group]
        joined.append(members[0] if len(members) == 1 else combine(members, step))
        logger.info(
            "dataset %d: %s, of %s%s",
            *(number, joined[-1].name, " ".join(d.name for d in members)),
            f"; batch numbers of each raised by {step} more" if step and len(group) > 1 else "",
        )
    return joined


def _batch_range(data: UnmergedData | ObservationStore) -> tuple[float, float] | None:
    """Least and largest batch number; None where there is none."""
    if isinstance(data, UnmergedData):
        batch = data.metadata.get(BATCH)
        return None if batch is None else (float(batch.min()), float(batch.max()))
    if BATCH not in data.metadata_names:
        return None
    parts = [data.column(f"metadata/{BATCH}", rows) for rows in data.row_blocks(ROWS_AT_A_TIME)]
    return float(min(np.min(p) for p in parts)), float(max(np.max(p) for p in parts))
