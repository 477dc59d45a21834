"""One sweep as extraction sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from integrator.crystal.geometry import Experiment
from integrator.errors import UserError
from integrator.shoebox.predict import Prediction, require_rotation

if TYPE_CHECKING:
    from integrator.io.images import FrameSource


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


def sweeps_of(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Members of an experiment list that can be integrated, in its order.

    Raises
    ------
    UserError
        There is none; the message says what the first one lacks.
    """
    if not experiments:
        raise UserError("the EXPT file holds no experiment: give an indexed or refined one")
    sweeps = [e for e in experiments if e.can_be_integrated]
    if not sweeps:
        require_rotation(experiments[0])
    return sweeps


def describe_experiment(experiment: Experiment) -> dict[str, object]:
    """Summarise a sweep for the header of the store, as JSON values."""
    crystal, scan = experiment.crystal, experiment.scan
    images = experiment.images
    return {
        "identifier": experiment.identifier,
        "wavelength": experiment.beam.wavelength,
        "n_images": scan.n_images,
        "image_range": list(scan.image_range),
        "oscillation_deg": list(scan.oscillation),
        "unit_cell": list(crystal.unit_cell.parameters),
        "space_group": crystal.space_group.xhm(),
        "panel_shapes": [list(panel.shape) for panel in experiment.panels],
        "pixel_size_mm": [list(panel.pixel_size) for panel in experiment.panels],
        "images": list(images.paths) if images else [],
    }
