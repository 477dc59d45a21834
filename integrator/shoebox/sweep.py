"""One sweep as extraction sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from integrator.crystal.geometry import Experiment
from integrator.errors import UserError
from integrator.shoebox.predict import Prediction, require_rotation

if TYPE_CHECKING:
    from integrator.io.images import FrameSource

SAME_LATTICE = 0.01
"""Two lattices are one where the indices of one are those of the other to within this share.

DIALS indexes lattices of one image apart from five degrees on, which is 0.09.
"""


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


def require_distinct(sweeps: Sequence[Experiment]) -> None:
    """Refuse sweeps of one lattice that have images in common: their photons would count twice.

    Several lattices on the same images are what ``dials.index`` makes of split crystals, and
    welcome.

    Parameters
    ----------
    sweeps : sequence of Experiment

    Raises
    ------
    UserError
    """
    frames = [_frames_of(sweep) for sweep in sweeps]
    by_file: dict[str, list[int]] = {}
    for number, found in enumerate(frames):
        for path in {path for path, _ in found}:
            by_file.setdefault(path, []).append(number)
    pairs = {pair for numbers in by_file.values() for pair in combinations(numbers, 2)}
    for first, second in sorted(pairs):
        common = frames[first] & frames[second]
        if common and _is_same_lattice(sweeps[first], sweeps[second]):
            one, other = ("{}-{}".format(*sweeps[i].scan.image_range) for i in (first, second))
            raise UserError(
                f"experiments {first} (images {one}) and {second} (images {other}) of the .expt "
                f"are the same lattice and have {len(common)} images of "
                f"{min(common)[0]} in common, whose photons would count twice: leave one of them "
                "out (dials.split_experiments), or cut the scans so that they do not overlap "
                "(dials.slice_sequence)"
            )


def _frames_of(experiment: Experiment) -> set[tuple[str, int]]:
    """File of each image, and its number in the file."""
    images = experiment.images
    if images is None:
        return set()
    if len(images.paths) == 1:
        return {(images.paths[0], index) for index in images.indices}
    return {(path, 0) for path in images.paths}


def _is_same_lattice(first: Experiment, second: Experiment) -> bool:
    """Whether the indices of one are whole numbers for the other, whatever the choice of axes."""
    one, other = (e.goniometer.fixed_rotation @ e.crystal.A for e in (first, second))
    change = np.linalg.solve(one, other)
    whole = np.rint(change)
    is_near = np.abs(change - whole).max() < SAME_LATTICE
    return bool(is_near and round(abs(np.linalg.det(whole))) == 1)


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
