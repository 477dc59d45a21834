"""Units in which the model sees intensities and metadata: part of every fitted scale model.

The networks are trained on standardised columns. A scale model used again, and every block of data
streamed from disk, must standardise with the same numbers, not with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: What :mod:`braggflux.merge.data.metadata` adds to the metadata of the files.
LOW_ANGLE = "log d"


@dataclass(frozen=True)
class FeatureScaling:
    """Mean and spread of everything the networks see.

    Parameters
    ----------
    unit_intensity : float
        Intensities of the files are divided by it.
    columns : dict of str to (float, float)
        Mean and spread by name, in the order of the features.
    """

    unit_intensity: float
    columns: dict[str, tuple[float, float]]

    def __call__(self, name: str, values: Array) -> Array:
        """Standardise one column."""
        mean, spread = self.columns[name]
        return (values - mean) / spread

    @property
    def names(self) -> tuple[str, ...]:
        """Metadata, resolution first."""
        return tuple(name for name in self.columns if name != LOW_ANGLE)

    @property
    def mapping(self) -> dict[str, Any]:
        """Plain values for a file."""
        columns = {name: list(pair) for name, pair in self.columns.items()}
        return {"unit_intensity": self.unit_intensity, "columns": columns}

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> FeatureScaling:
        """From :attr:`mapping`."""
        columns = {name: (float(m), float(s)) for name, (m, s) in mapping["columns"].items()}
        return cls(float(mapping["unit_intensity"]), columns)


def mean_and_spread(values: Array) -> tuple[float, float]:
    """Mean and standard deviation, 1 for a constant."""
    return float(values.mean()), float(values.std()) or 1.0
