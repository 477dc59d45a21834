"""Sweeps of an experiment list: which can be integrated, and which share their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any

import gemmi
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials.blocks import Degrees, PanelSize, PixelSize
from braggflux.integrator.io.schema import CellParameters, ImageNumber, Wavelength, converted

SAME_LATTICE = 0.01
"""Two lattices are one where the indices of one are those of the other to within this share.

DIALS indexes lattices of one image apart from five degrees on, which is 0.09.
"""


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
        _ = experiments[0].rotation  # raises, with the reason
    return sweeps


@dataclass(frozen=True)
class SharedImages:
    """Two sweeps of one lattice that have images in common.

    Parameters
    ----------
    first, second : int
        Their positions.
    images : frozenset of (str, int)
        Files and numbers in them.
    change : ndarray, (3, 3) int
        Indices of the first from those of the second.
    """

    first: int
    second: int
    images: frozenset[tuple[str, int]]
    change: NDArray[np.int64]


def shared_images(sweeps: Sequence[Experiment]) -> list[SharedImages]:
    """Find the sweeps of one lattice that have images in common.

    Several lattices on the same images are what ``dials.index`` makes of split crystals, and
    not among them.

    Parameters
    ----------
    sweeps : sequence of Experiment
    """
    frames = [frozenset(images_of(sweep)) for sweep in sweeps]
    by_file: dict[str, list[int]] = {}
    for number, found in enumerate(frames):
        for path in {path for path, _ in found}:
            by_file.setdefault(path, []).append(number)
    pairs = {pair for numbers in by_file.values() for pair in combinations(numbers, 2)}
    shared = []
    for first, second in sorted(pairs):
        common = frames[first] & frames[second]
        change = _change_of_index(sweeps[first], sweeps[second]) if common else None
        if change is not None:
            shared.append(SharedImages(first, second, common, change))
    return shared


def require_distinct(sweeps: Sequence[Experiment]) -> None:
    """Refuse sweeps of one lattice that have images in common: their photons would count twice.

    Raises
    ------
    UserError
    """
    for shared in shared_images(sweeps):
        first, second = shared.first, shared.second
        one, other = (
            "{}-{}".format(*sweeps[i].rotation.scan.image_range) for i in (first, second)
        )
        raise UserError(
            f"experiments {first} (images {one}) and {second} (images {other}) of the .expt are "
            f"the same lattice and have {len(shared.images)} images of {min(shared.images)[0]} in "
            "common, whose photons would count twice: leave one of them out "
            "(dials.split_experiments), or cut the scans so that they do not overlap "
            "(dials.slice_sequence)"
        )


def images_of(experiment: Experiment) -> list[tuple[str, int]]:
    """File of each image of a sweep and its number in the file, in their order."""
    images = experiment.images
    if images is None:
        return []
    if len(images.paths) == 1:
        return [(images.paths[0], index) for index in images.indices]
    return [(path, 0) for path in images.paths]


def _change_of_index(first: Experiment, second: Experiment) -> NDArray[np.int64] | None:
    """Give the indices of the first from the second's; None where they are no whole numbers."""
    one, other = (
        sweep.rotation.goniometer.fixed_rotation @ sweep.rotation.crystal.A
        for sweep in (first, second)
    )
    change = np.linalg.solve(one, other)
    whole = np.rint(change)
    is_near = np.abs(change - whole).max() < SAME_LATTICE
    if not is_near or round(abs(np.linalg.det(whole))) != 1:
        return None
    return whole.astype(np.int64)


def describe_experiment(experiment: Experiment) -> dict[str, object]:
    """Summarise a sweep for the header of the store, as JSON values."""
    _, scan, crystal = experiment.rotation
    images = experiment.images
    of_several = {"dataset": experiment.dataset} if experiment.dataset else {}
    return of_several | {
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


NARROWEST_DEG = 1e-6
"""Of frames; narrower ones turn by less than any goniometer does."""


class SweepRecord(Struct):
    """Schema of :func:`describe_experiment`; files of earlier versions lack some of it.

    What is there is a value: null is none.
    """

    identifier: str = ""
    dataset: str = ""
    wavelength: Wavelength | UnsetType = UNSET
    n_images: ImageNumber | UnsetType = UNSET
    image_range: tuple[ImageNumber, ImageNumber] | UnsetType = UNSET
    oscillation_deg: tuple[Degrees, Degrees] | UnsetType = UNSET
    unit_cell: CellParameters | UnsetType = UNSET
    space_group: str | UnsetType = UNSET
    panel_shapes: list[tuple[PanelSize, PanelSize]] | UnsetType = UNSET
    pixel_size_mm: list[tuple[PixelSize, PixelSize]] | UnsetType = UNSET
    images: list[str] | UnsetType = UNSET


class CompleteRecord(Struct):
    """What every file of today has of a sweep."""

    wavelength: Wavelength
    image_range: tuple[ImageNumber, ImageNumber]
    oscillation_deg: tuple[Degrees, Degrees]
    unit_cell: CellParameters
    space_group: str
    panel_shapes: Annotated[list[tuple[PanelSize, PanelSize]], Meta(min_length=1)]
    pixel_size_mm: Annotated[list[tuple[PixelSize, PixelSize]], Meta(min_length=1)]


def check_complete(records: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that a run finds what it needs of each sweep.

    Raises
    ------
    ValueError
    """
    for number, record in enumerate(converted(list(records), list[CompleteRecord])):
        if len(record.pixel_size_mm) != len(record.panel_shapes):
            raise ValueError(f"sweep {number} has pixel sizes of other panels than it has")


def checked_records(found: Any) -> list[dict[str, Any]]:
    """Return the records of :func:`describe_experiment` of a file, checked.

    Raises
    ------
    ValueError
        One holds what cannot be.
    """
    for number, record in enumerate(converted(found, list[SweepRecord])):
        name = record.space_group
        if name is not UNSET and gemmi.find_spacegroup_by_name(name) is None:
            raise ValueError(f"sweep {number} has the unknown space group {name!r}")
        if record.image_range is not UNSET and record.image_range[0] > record.image_range[1]:
            raise ValueError(f"sweep {number} has the image range {record.image_range}")
        if record.oscillation_deg is not UNSET and abs(record.oscillation_deg[1]) < NARROWEST_DEG:
            raise ValueError(f"sweep {number} has frames of {record.oscillation_deg[1]} deg")
    records: list[dict[str, Any]] = found
    return records
