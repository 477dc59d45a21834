"""DIALS files, read and written without DIALS: experiment lists and reflection tables."""

from braggflux.integrator.io.dials.experiments import read_experiments, write_experiments
from braggflux.integrator.io.dials.frames import place_on_scans, to_array_index
from braggflux.integrator.io.dials.reflections import (
    DialsFlag,
    ReflectionTable,
    match_experiments,
    read_reflections,
    write_reflections,
)

__all__ = [
    "DialsFlag",
    "ReflectionTable",
    "match_experiments",
    "place_on_scans",
    "read_experiments",
    "read_reflections",
    "to_array_index",
    "write_experiments",
    "write_reflections",
]
