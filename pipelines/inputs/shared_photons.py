"""Inputs that hold the same photons: refused where they would count twice, said otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from braggflux.integrator.errors import UserError
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.shared_photons import shared_photons
from braggflux.merge.rows import check_parents
from braggflux.pipelines.inputs.grouping import complete_groups

logger = logging.getLogger(__name__)

#: Experiments that several tables may share.
SHARED_SUFFIX = ".expt"
EQUAL = 1e-6


def check_paths(paths: Sequence[Path]) -> None:
    """Refuse a file that is given twice.

    Raises
    ------
    UserError
    """
    seen: set[Path] = set()
    for path in paths:
        real = path.resolve()
        if real in seen and path.suffix != SHARED_SUFFIX:
            raise UserError(
                f"{path} is given twice: the same photons would count twice; give once"
            )
        seen.add(real)


def check_shared_photons(
    data: Sequence[UnmergedData],
    groups: Sequence[tuple[int, ...] | None],
    parents: Sequence[int | None] | None,
) -> None:
    """Compare all datasets; before they are grouped.

    Copies within a group are left to :func:`braggflux.merge.io.screening.screened`.

    Raises
    ------
    UserError
        Datasets of one group hold the same photons.
    """
    if len(data) < 2:
        return
    whole = complete_groups(groups, len(data))
    parents = check_parents(parents or [None] * len(whole), len(whole))
    group_of = {k: number for number, group in enumerate(whole) for k in group}
    for first, second, ratio in shared_photons(data):
        names = f"{data[first].name} (dataset {first}) and {data[second].name} (dataset {second})"
        one, other = group_of[first], group_of[second]
        if one == other:
            if ratio > EQUAL:
                raise UserError(
                    f"--group: {names} hold the same photons, treated differently (scaled, or "
                    "integrated twice), which would count twice; leave one of them out"
                )
        elif other in _ancestors(one, parents) or one in _ancestors(other, parents):
            logger.warning(
                "--parents: %s hold the same photons: their noise is the same, which r takes for "
                "likeness, and both results are too sure; give independent measurements",
                names,
            )
        else:
            logger.warning(
                "%s hold the same photons: each counts in its own result, both count in the scale",
                names,
            )


def _ancestors(child: int, parents: Sequence[int | None]) -> set[int]:
    found: set[int] = set()
    parent = parents[child]
    while parent is not None:
        found.add(parent)
        parent = parents[parent]
    return found
