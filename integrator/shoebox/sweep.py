"""One sweep as extraction sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.prediction.predict import Prediction

if TYPE_CHECKING:
    from braggflux.integrator.io.images import FrameSource


@dataclass(frozen=True)
class Sweep:
    """One experiment with its frames and the reflections to cut.

    Parameters
    ----------
    experiment : Experiment
    frames : FrameSource
    prediction : Prediction
        Reflections to cut, centroids on the frames.
    neighbours : Prediction, optional
        Further spots that reach the frames: before and after the scan, beyond the resolution
        limit. They overlap boxes and are no background.
    """

    experiment: Experiment
    frames: FrameSource
    prediction: Prediction
    neighbours: Prediction | None = None
