"""One sweep as extraction sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.prediction.predict import Prediction


class Frames(Protocol):
    """Photons of a sweep, frame by frame: from files, or without what spoils them."""

    n_images: int
    panel_shapes: list[tuple[int, int]]

    def static_mask(self) -> list[NDArray[np.bool_]]:
        """Return pixels usable on every frame, one (slow, fast) array per panel."""

    def read(self, frame: int) -> list[NDArray[np.signedinteger[Any]]]:
        """Return the photons of a frame (0-based), per panel; -1 where there is no count."""


@dataclass(frozen=True)
class Sweep:
    """One experiment with its frames and the reflections to cut.

    Parameters
    ----------
    experiment : Experiment
    frames : Frames
    prediction : Prediction
        Reflections to cut, centroids on the frames.
    neighbours : Prediction, optional
        Further spots that reach the frames: before and after the scan, beyond the resolution
        limit, of other lattices. They overlap boxes and are no background.
    neighbour_experiment : ndarray, (M,), optional
        Experiment whose lattice each of these belongs to; without it the sweep's own.
    """

    experiment: Experiment
    frames: Frames
    prediction: Prediction
    neighbours: Prediction | None = None
    neighbour_experiment: NDArray[np.int64] | None = None


def highest_count(sweeps: Sequence[Sweep]) -> float:
    """Largest number of photons that a frame can hold in a pixel."""
    lookups = [sweep.experiment.images.lookup for sweep in sweeps if sweep.experiment.images]
    if any(lookup.gain or lookup.pedestal for lookup in lookups):
        return float(np.iinfo(np.int32).max)
    panels = [panel for sweep in sweeps for panel in sweep.experiment.panels]
    return max((panel.trusted_range[1] - panel.pedestal) / panel.gain for panel in panels)
