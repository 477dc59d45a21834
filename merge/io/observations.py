"""Unmerged observations in memory, however they came, and what is done before they are merged."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal.forms import check_one_crystal_form
from braggflux.integrator.crystal.symmetry import is_centric, to_asu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.dataset_labels import DatasetLabels
from braggflux.merge.io.missing_values import PLACES, without_missing

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: Metadata column of 1 / t: variance that every unit of expected intensity adds. The sigma of such
#: data is that of the background alone, sqrt(beta / t).
PHOTON_VARIANCE = "photon_variance"
#: Intensities and sigmas from here on are no measurement: single precision cannot square them.
LARGEST = 1e18
LARGEST_INDEX = 32767
#: [A]: from electrons of 1 MeV to cold neutrons.
WAVELENGTHS = (0.01, 200.0)
#: Columns that intensities without LP correction are unusable without.
NEEDED_RAW = ("LP", PHOTON_VARIANCE)


@dataclass(frozen=True)
class UnmergedData:
    """Observations of one dataset, one row each, sorted by image.

    Parameters
    ----------
    miller_index : (N, 3) int32
        As observed, not mapped to the asymmetric unit.
    intensity, sigma : (N,)
        Finite; sigma is positive.
    image : (N,) int64
        Number of the image (still, frame or batch), 0 .. n_images - 1, never falling.
    wavelength : (N,) or None
        [A] of each observation where the input gives one for each observation or each still.
    metadata : dict of str to (N,) float64
        Every other column under its own name.
    cell : gemmi.UnitCell
    space_group : gemmi.SpaceGroup
    name : str
        Stem of the input file.
    has_lp_applied : bool
        Intensities are already free of the Lorentz and polarization factors.
    labels : DatasetLabels
        Names, title, and the wavelength of the whole data set.
    """

    miller_index: NDArray[np.int32]
    intensity: Array
    sigma: Array
    image: NDArray[np.int64]
    wavelength: Array | None
    metadata: dict[str, Array]
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    name: str
    has_lp_applied: bool = field(default=False)
    labels: DatasetLabels = field(default=DatasetLabels())

    def __post_init__(self) -> None:
        """Refuse columns of unequal length and rows out of order."""
        columns = {"intensity": self.intensity, "sigma": self.sigma, "image": self.image}
        columns |= self.metadata
        if self.wavelength is not None:
            columns["wavelength"] = self.wavelength
        wrong = [n for n, c in columns.items() if np.shape(c) != (len(self),)]
        if wrong or self.miller_index.shape != (len(self), 3):
            raise ValueError(f"{wrong or 'miller_index'} do not have {len(self)} rows")
        if len(self) and (np.any(np.diff(self.image) < 0) or self.image[0] < 0):
            raise ValueError("rows must be sorted by image, counted from 0")

    def __len__(self) -> int:
        """Return N."""
        return len(self.intensity)

    @property
    def n_images(self) -> int:
        """One more than the largest image number."""
        return int(self.image[-1]) + 1 if len(self) else 0

    @property
    def image_starts(self) -> NDArray[np.int64]:
        """First row of each image and, at the end, N: (n_images + 1,)."""
        return np.searchsorted(self.image, np.arange(self.n_images + 1))

    @property
    def typical_wavelength(self) -> float | None:
        """Median over the observations, else that of the data set [A]; None where unknown."""
        if self.wavelength is None or not len(self):
            return self.labels.wavelength
        return float(np.median(self.wavelength))

    @property
    def is_polychromatic(self) -> bool:
        """Whether observations of one image have different wavelengths (Laue)."""
        if self.wavelength is None:
            return False
        same_image = np.diff(self.image) == 0
        return bool(np.any(np.diff(self.wavelength)[same_image] != 0.0))

    def select(self, rows: ArrayLike) -> UnmergedData:
        """Return the given rows (boolean mask or rising indices); images keep their numbers."""
        index = np.asarray(rows)
        return replace(
            self,
            miller_index=self.miller_index[index],
            intensity=self.intensity[index],
            sigma=self.sigma[index],
            image=self.image[index],
            wavelength=None if self.wavelength is None else self.wavelength[index],
            metadata={name: column[index] for name, column in self.metadata.items()},
        )


def check_possible(data: UnmergedData) -> None:
    """Refuse values that no measurement has; the readers of all formats call it.

    Parameters
    ----------
    data : UnmergedData

    Raises
    ------
    ValueError
        Says what, its value and what is allowed.
    """
    check_indices(data.miller_index)
    columns = {"intensity": data.intensity, "sigma": data.sigma}
    columns |= {name: c for name, c in data.metadata.items() if name in (*PLACES, "BATCH")}
    for name, column in columns.items():
        if not np.all(np.abs(column) < LARGEST):
            raise ValueError(f"{name} has values that are not finite or above {LARGEST:g}")
    if not np.all(data.sigma > 0.0):
        raise ValueError("sigma must be above 0")
    # rows without a wavelength of theirs are left out later, with a word
    wave, (low, high) = data.labels.wavelength, WAVELENGTHS
    if wave is not None and not low <= wave <= high:
        raise ValueError(f"the wavelength is {wave:g} A, {low:g} to {high:g} are possible")
    check_cell(data.cell)


def make_unmerged(
    *,
    source: str,
    miller_index: ArrayLike,
    intensity: ArrayLike,
    sigma: ArrayLike,
    image_label: ArrayLike,
    metadata: Mapping[str, ArrayLike],
    wavelength: ArrayLike | None,
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    name: str,
    has_lp_applied: bool,
    labels: DatasetLabels = DatasetLabels(),  # noqa: B008 - immutable
) -> UnmergedData:
    """Drop rows without a usable intensity or place, sort by image, number the images from 0.

    Parameters
    ----------
    source : str
        The input, for messages.
    image_label : array_like, (N,)
        Any numbers that tell images apart (batch numbers); they are numbered in rising order.
    metadata : mapping of str to (N,)
        Gaps are dealt with as :mod:`braggflux.merge.io.missing_values` says.
    wavelength : array_like, (N,), or None
        Rows without theirs are left out.
    miller_index, intensity, sigma, cell, space_group, name, has_lp_applied, labels
        As :class:`UnmergedData` has them.

    Raises
    ------
    UserError
        No row has a finite intensity and a positive finite sigma.
    """
    intensity, sigma = np.asarray(intensity, float), np.asarray(sigma, float)
    with np.errstate(invalid="ignore"):
        usable = (np.abs(intensity) < LARGEST) & (sigma < LARGEST) & (sigma > 0.0)
    if not usable.any():
        raise UserError(_why_unusable(source, intensity, sigma))
    if not usable.all():
        log.info(
            "%s: %d of %d observations lack a finite intensity and a sigma above 0: left out",
            source,
            np.sum(~usable),
            len(usable),
        )
    columns = {key: np.asarray(column, dtype=float) for key, column in metadata.items()}
    if wavelength is not None and not np.isfinite(np.asarray(wavelength, float)[usable]).any():
        wavelength = None
    essential = {} if has_lp_applied else {n: columns[n] for n in NEEDED_RAW if n in columns}
    essential |= {"the image number": np.asarray(image_label, dtype=float)}
    if wavelength is not None:
        essential["the wavelength"] = np.asarray(wavelength, dtype=float)
    usable = _with_all(essential, usable, source)
    columns, usable = without_missing(columns, usable, source)
    _, number = np.unique(np.asarray(image_label)[usable], return_inverse=True)
    order = np.argsort(number, kind="stable")
    rows = np.flatnonzero(usable)[order]

    def take(column: ArrayLike) -> Array:
        return np.asarray(column)[rows].astype(np.float64)

    return UnmergedData(
        miller_index=np.asarray(miller_index)[rows].astype(np.int32),
        intensity=intensity[rows],
        sigma=sigma[rows],
        image=number[order].astype(np.int64),
        wavelength=None if wavelength is None else take(wavelength),
        metadata={key: take(column) for key, column in columns.items()},
        cell=cell,
        space_group=space_group,
        name=name,
        has_lp_applied=has_lp_applied,
        labels=labels,
    )


def _with_all(
    essential: Mapping[str, Array], usable: NDArray[np.bool_], source: str
) -> NDArray[np.bool_]:
    """Rows that have all of these columns, (N,)."""
    for name, column in essential.items():
        lacks = usable & ~np.isfinite(column)
        if not lacks.any():
            continue
        log.warning("%s: %d observations without %s are left out", source, lacks.sum(), name)
        usable = usable & ~lacks
        if not usable.any():
            raise UserError(
                f"{source}: no observation has {name}; give the column, or a file that has it"
            )
    return usable


def _why_unusable(source: str, intensity: Array, sigma: Array) -> str:
    if len(sigma) and np.all(sigma == 0.0):
        what = f"all {len(sigma)} sigmas are 0"
    elif len(sigma) and not np.isfinite(sigma).any():
        what = f"none of the {len(sigma)} sigmas is finite"
    else:
        what = f"none of {len(intensity)} observations has a finite intensity and a sigma above 0"
    return f"{source}: {what}; merging needs sigma > 0: integrate again or give another file"


def combine_friedel(plus: UnmergedData, minus: UnmergedData) -> UnmergedData:
    """Join the Friedel halves of one crystal form that are kept in two files.

    The indices come out as observed: rows of ``minus`` that are stored as their mates are negated.
    Images with the same BATCH (without it, the same number) are one image.

    Parameters
    ----------
    plus, minus : UnmergedData
        Centric reflections may be in either.

    Returns
    -------
    UnmergedData
        With the columns that both have.

    Raises
    ------
    UserError
        The crystal forms differ, or a file holds both mates.
    """
    check_one_crystal_form([plus, minus])
    return join_halves(_as_half(plus, +1), _as_half(minus, -1))


def join_halves(*halves: UnmergedData) -> UnmergedData:
    """Join Friedel halves whose indices are as observed; see :func:`combine_friedel`."""
    plus, minus = halves
    has_batch = all("BATCH" in half.metadata for half in halves)
    waves = [half.wavelength for half in halves if half.wavelength is not None]
    shared = [key for key in plus.metadata if key in minus.metadata]

    def joined(column: Callable[[UnmergedData], NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([column(half) for half in halves])

    return make_unmerged(
        source=f"{plus.name} and {minus.name}",
        miller_index=joined(lambda half: half.miller_index),
        intensity=joined(lambda half: half.intensity),
        sigma=joined(lambda half: half.sigma),
        image_label=joined(lambda half: half.metadata["BATCH"] if has_batch else half.image),
        metadata={key: np.concatenate([h.metadata[key] for h in halves]) for key in shared},
        wavelength=np.concatenate(waves) if len(waves) == len(halves) else None,
        cell=plus.cell,
        space_group=plus.space_group,
        name=common_name(plus.name, minus.name),
        has_lp_applied=plus.has_lp_applied and minus.has_lp_applied,
        labels=plus.labels,
    )


def _as_half(data: UnmergedData, sign: int) -> UnmergedData:
    """Return ``data`` with all acentric indices on the side ``sign`` of Friedel's law."""
    if is_other_half(data.miller_index, data.space_group, sign, data.name):
        return replace(data, miller_index=-data.miller_index)
    return data


def is_other_half(
    miller_index: NDArray[np.int32], space_group: gemmi.SpaceGroup, sign: int, name: str
) -> bool:
    """Whether all acentric indices, (N, 3), are on the other side of Friedel's law than ``sign``.

    Raises
    ------
    UserError
        Some are, some are not.
    """
    acentric = ~is_centric(miller_index, space_group)
    found = to_asu(miller_index, space_group).friedel_sign[acentric]
    n_right = int(np.count_nonzero(found == sign))
    if n_right == len(found):
        return False
    if n_right == 0:
        return True
    raise UserError(
        f"{name} holds {n_right} observations of F({'+' if sign > 0 else '-'}) and "
        f"{len(found) - n_right} of its Friedel mate; --friedel takes two files of one mate each: "
        "give a file with both as one input, without --friedel"
    )


def common_name(first: str, second: str) -> str:
    """Return the words that two names share; the first name when they share none."""
    words = [re.split(r"[_\-.]+", name) for name in (first, second)]
    if len(words[0]) != len(words[1]):
        return first
    return "_".join(a for a, b in zip(*words, strict=True) if a == b) or first


def check_indices(index: NDArray[np.integer[Any]]) -> None:
    """Refuse Miller indices (N, 3) that no crystal has.

    Raises
    ------
    ValueError
    """
    if len(index) and (index.min() < -LARGEST_INDEX or index.max() > LARGEST_INDEX):
        raise ValueError(
            f"indices are from {index.min()} to {index.max()}, {LARGEST_INDEX} is the most"
        )


def check_cell(cell: gemmi.UnitCell) -> None:
    """Refuse sides outside of 1 to 10^5 A, angles outside of 1 to 179 degrees, and no volume.

    Raises
    ------
    ValueError
    """
    a, b, c, *angles = cell.parameters
    if not (1.0 <= min(a, b, c) <= max(a, b, c) <= 1e5 and 1.0 <= min(angles)):
        raise ValueError(f"the cell is {cell.parameters}")
    if not (max(angles) <= 179.0 and cell.volume > 1e-3 * a * b * c):
        raise ValueError(f"the cell {cell.parameters} has no volume")
