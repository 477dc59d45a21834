"""Data sets of a run: sweeps that measure the same amplitudes, with their own DIALS files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    ReflectionTable,
    match_experiments,
    read_experiments,
    read_reflections,
)
from braggflux.integrator.shoebox.extraction import is_full_set
from braggflux.pipelines.config.run import RunConfig


def read_sweeps(config: RunConfig) -> list[Experiment]:
    """Experiments of all data sets, each with the name of its own."""
    return [
        replace(experiment, dataset=files.name)
        for files in config.data_sets
        for experiment in read_experiments(files.expt)
    ]


def read_tables(config: RunConfig) -> ReflectionTable:
    """Reflections of all data sets as one table, which belongs to :func:`read_sweeps`.

    Raises
    ------
    UserError
        A table does not belong to its experiments, or one is predicted or integrated and another
        is not.
    """
    if len(config.data_sets) == 1:
        return read_reflections(config.data_sets[0].refl)
    tables, n_before = [], 0
    for files in config.data_sets:
        experiments, table = read_experiments(files.expt), read_reflections(files.refl)
        number = match_experiments(table, experiments)
        own = np.where(number >= 0, number + n_before, -1).astype(np.int32)
        tables.append(ReflectionTable(table.columns | {"id": own}, source=table.source))
        n_before += len(experiments)
    return _joined(tables)


def _joined(tables: Sequence[ReflectionTable]) -> ReflectionTable:
    """Rows of all tables, with the columns that they have in common."""
    full = [is_full_set(table) for table in tables]
    if any(full) and not all(full):
        raise UserError(
            f"{tables[full.index(True)].source} holds all reflections (predicted or integrated), "
            f"{tables[full.index(False)].source} the observed ones alone: give the tables of the "
            "same DIALS step for every data set"
        )
    shared = set.intersection(*(set(table.columns) for table in tables))
    columns = {name: np.concatenate([t.columns[name] for t in tables]) for name in shared}
    return ReflectionTable(columns, source=" ".join(table.source for table in tables))


def names_of(experiments: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the data sets of a store's sweeps, in their order."""
    return tuple(dict.fromkeys(str(e.get("dataset", "")) for e in experiments))


def sweeps_of_set(experiments: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """Numbers of the sweeps of one data set."""
    return [k for k, e in enumerate(experiments) if e.get("dataset", "") == name]
