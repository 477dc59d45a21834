"""DIALS files, read and written without DIALS: experiment lists and reflection tables."""

from integrator.io.dials_experiments import read_experiments, write_experiments
from integrator.io.dials_frames import place_on_scans, to_array_index
from integrator.io.dials_reflections import (
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
