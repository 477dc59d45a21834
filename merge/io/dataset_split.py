"""Several data sets in one input: which images belong together, and the input cut in parts.

Images of different wavelengths have different anomalous signals and share a scale, not amplitudes.
Crystals whose cells are far apart share nothing, and are refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal.forms import CELL_TOLERANCE, cell_text, typical_cell
from braggflux.integrator.errors import UserError
from braggflux.merge.io.dataset_labels import DatasetLabels
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.sweep_columns import SWEEP

Array = NDArray[np.float64]
Groups = NDArray[np.int64]

log = logging.getLogger(__name__)

#: Wavelengths that differ by less are one [A], as in dials.merge and dials.export.
WAVELENGTH_TOLERANCE = 1e-4
#: Stills vary from pulse to pulse; a relative gap in their wavelengths so wide makes two groups.
STILLS_GAP = 5e-3
#: Share of the images, and number of them, that a wavelength of single images must have.
MIN_SHARE, MIN_IMAGES = 0.05, 2
#: Cells of single images form two groups when these are so many of their own spreads apart.
CLEAR_OF_SPREAD = 6.0
#: A group of so many values has a spread that does not depend on a few strays.
ENOUGH = 20


def wavelength_groups(wavelength: ArrayLike, gap: float = WAVELENGTH_TOLERANCE) -> Groups:
    """Group of each wavelength (n,), rising; groups are more than ``gap`` [A] apart."""
    values, which = np.unique(np.asarray(wavelength, dtype=float), return_inverse=True)
    return np.concatenate([[0], np.cumsum(np.diff(values) > gap)])[which]


def image_wavelength_groups(wavelength: ArrayLike, is_still: bool) -> Groups:
    """Group single images, (n,), by their wavelength.

    Pulses of a free-electron laser, and frames whose energy is noted one by one, spread without
    being several data sets: a group is only what holds its share of the images.
    """
    values = np.asarray(wavelength, dtype=float)
    coarse = STILLS_GAP * float(np.median(values))
    for gap in (coarse,) if is_still else (WAVELENGTH_TOLERANCE, coarse):
        group = wavelength_groups(values, gap)
        if np.bincount(group).min() >= max(MIN_IMAGES, MIN_SHARE * len(values)):
            return group
    return np.zeros(len(values), dtype=np.int64)


def cell_groups(cells: ArrayLike) -> Groups:
    """Group the cells of few crystals, (n, 6) [A, degrees]: linked by :data:`CELL_TOLERANCE`."""
    place = _places(cells)
    near = np.abs(place[:, None] - place[None]).max(axis=2) <= CELL_TOLERANCE
    group = np.arange(len(place))
    for _ in range(len(place)):
        linked = np.where(near, group[None], len(group)).min(axis=1)
        if np.array_equal(linked, group):
            break
        group = linked
    return np.unique(group, return_inverse=True)[1]


def image_cell_groups(cells: ArrayLike) -> Groups:
    """Group the cells of many images, (n, 6), in two where a parameter has two clear values.

    The spread of serial data, however wide, is one group, and so are a few strays.
    """
    place = _places(cells)
    n = len(place)
    least = 1 if n <= 2 * MIN_IMAGES else max(MIN_IMAGES, MIN_SHARE * n)
    for values in place.T:
        high = values > _valley(values)
        if min(high.sum(), n - high.sum()) < least:
            continue
        centre = [np.median(values[part]) for part in (high, ~high)]
        spread = [_spread(values[part]) for part in (high, ~high)]
        if abs(centre[0] - centre[1]) > max(CELL_TOLERANCE, CLEAR_OF_SPREAD * max(spread)):
            return high.astype(np.int64)
    return np.zeros(n, dtype=np.int64)


def check_images(cells: ArrayLike, source: str, what: str) -> None:
    """Refuse the cells of many images, (n, 6), that form two groups; count the strays.

    Raises
    ------
    UserError
        As :func:`check_one_form`.
    """
    check_one_form(cells, image_cell_groups(cells), source, what)
    place = _places(cells)
    centre = np.median(place, axis=0)
    usual = np.maximum(CELL_TOLERANCE, CLEAR_OF_SPREAD * np.array([_spread(v) for v in place.T]))
    n_strays = int(np.any(np.abs(place - centre) > usual, axis=1).sum())
    if n_strays:
        log.warning(
            "%s: %d of %d %s have cells far from those of the others; they are merged with them",
            *(source, n_strays, len(place), what),
        )


def check_one_form(cells: ArrayLike, group: Groups, source: str, what: str) -> None:
    """Refuse an input with several crystal forms.

    Parameters
    ----------
    cells : array_like, (n, 6)
        [A, degrees]
    group : (n,)
        Of :func:`cell_groups` or :func:`image_cell_groups`.
    source, what : str
        The input, and what has the cells: "crystals", "images".

    Raises
    ------
    UserError
    """
    if not group.any():
        return
    cells = np.asarray(cells, dtype=float)
    forms = [
        f"{cell_text(gemmi.UnitCell(*np.median(cells[group == k], axis=0)))} "
        f"({np.sum(group == k)} {what})"
        for k in range(group.max() + 1)
    ]
    raise UserError(
        f"{source} mixes crystal forms whose cells differ by more than {CELL_TOLERANCE:.0%}: "
        f"{', '.join(forms)}; they do not share structure factors: write each form to a file of "
        "its own and merge them in separate runs"
    )


def split_data(
    data: UnmergedData,
    group: NDArray[np.integer[Any]],
    suffixes: Sequence[str],
    labels: Sequence[DatasetLabels],
    cells: Sequence[gemmi.UnitCell],
) -> list[UnmergedData]:
    """Cut an input in its data sets, each with images counted from 0.

    Parameters
    ----------
    data : UnmergedData
    group : (N,)
        Data set of each observation, from 0.
    suffixes : sequence of str
        Added to the name of each data set where there are several.
    labels, cells : sequence
        Of each data set.
    """
    if len(labels) == 1:
        return [replace(data, labels=labels[0], cell=cells[0])]
    names = [f"{data.name}_{file_word(suffix)}" for suffix in suffixes]
    parts = []
    for k, name in enumerate(names):
        part = data.select(group == k)
        if not len(part):
            continue
        image = np.unique(part.image, return_inverse=True)[1]
        parts.append(replace(part, image=image, name=name, labels=labels[k], cell=cells[k]))
    known = [part.typical_wavelength or 0.0 for part in parts]
    alike = len(parts) > 1 and len(set(wavelength_groups(known).tolist())) < len(parts)
    log.info(
        "%s holds %d data sets, which share a scale and have amplitudes of their own: %s%s",
        data.name,
        len(parts),
        ", ".join(_words(part) for part in parts),
        "; --group makes one of sweeps of one crystal" if alike else "",
    )
    return parts


def check_only_one(names: Sequence[str], path: str | Path) -> None:
    """Refuse several data sets where they would be mixed.

    Raises
    ------
    UserError
    """
    if len(names) > 1:
        raise UserError(
            f"{path} holds {len(names)} data sets ({', '.join(names)}) and one is needed here; "
            "give a file of one data set, or merge this one as it is"
        )


def split_by_wavelength(data: UnmergedData) -> list[UnmergedData]:
    """Cut stills of two or more wavelengths; the spread of the pulses of one beam is one."""
    if data.wavelength is None or data.is_polychromatic:
        return [data]
    first = np.unique(data.image, return_index=True)[1]
    group = image_wavelength_groups(data.wavelength[first], is_still=True)
    if not group.any():
        return [data]
    of_row = group[np.searchsorted(first, np.arange(len(data)), "right") - 1]
    n = int(group.max()) + 1
    return split_data(data, of_row, *_waves(data, [None] * n), [data.cell] * n)


def check_one_beam(wavelength: ArrayLike, source: str) -> None:
    """Refuse stills of two or more wavelengths [A], one each, where they would be mixed.

    Raises
    ------
    UserError
    """
    values = np.asarray(wavelength, dtype=float)
    group = image_wavelength_groups(values, is_still=True)
    if group.any():
        known = [float(np.median(values[group == k])) for k in range(group.max() + 1)]
        raise UserError(
            f"{source} has stills of {len(known)} wavelengths "
            f"({', '.join(f'{value:.4f}' for value in known)} A) and one is needed here; write "
            "each to a file of its own, or merge this one as it is"
        )


def split_by_sweep(
    data: UnmergedData,
    wavelength: ArrayLike,
    cells: ArrayLike,
    names: Sequence[str] = (),
) -> list[UnmergedData]:
    """Cut sweeps of different data sets; where these have no names, of different wavelengths.

    Parameters
    ----------
    data : UnmergedData
        With the number of the sweep of each observation.
    wavelength, cells : array_like, (n,) and (n, 6)
        Of each sweep; the cells are of one form.
    names : sequence of str, (n,)
        Name of the data set of each sweep, of which each has one wavelength.
    """
    is_named = len(set(names)) > 1
    if not is_named and not wavelength_groups(wavelength).any():
        value = float(np.median(np.asarray(wavelength))) or None
        return [replace(data, labels=data.labels._replace(wavelength=value))]
    sweep = data.metadata[SWEEP].astype(np.int64)
    wavelength, cells = np.asarray(wavelength, dtype=float), np.asarray(cells, dtype=float)
    used = np.unique(sweep)
    near = np.zeros(len(wavelength), dtype=np.int64)
    if is_named:
        near[used] = np.unique(np.asarray(names)[used], return_inverse=True)[1]
    else:
        near[used] = wavelength_groups(wavelength[used])
    # numbered as they come, like those of dials.merge
    first = np.unique(near[used], return_index=True)[1]
    near = np.argsort(np.argsort(first))[near]
    members = [used[near[used] == k] for k in range(near.max() + 1)]
    known = [float(np.median(wavelength[own])) or None for own in members]  # 0 is unknown
    forms = [typical_cell(cells[own], data.space_group) for own in members]
    suffixes, labels = _waves(data, known)
    if is_named:
        suffixes = [names[own[0]] for own in members]
        labels = [data.labels._replace(wavelength=value) for value in known]
    return split_data(data, near[sweep], suffixes, labels, forms)


def split_sets(
    data: UnmergedData,
    batch: ArrayLike,
    iset: ArrayLike,
    wavelengths: Mapping[int, float],
    cells: Mapping[int, gemmi.UnitCell],
) -> list[UnmergedData]:
    """Cut an input whose observations belong to numbered sets: those of one wavelength are one.

    Parameters
    ----------
    data : UnmergedData
        With ``BATCH``; the numbers of no two sets are the same.
    batch, iset : array_like, (M,)
        Batch and set of each observation, before any were left out and in any order.
    wavelengths : mapping of int to float
        [A] of each set, 0 where unknown.
    cells : mapping of int to gemmi.UnitCell

    Raises
    ------
    UserError
        The cells of the sets are far apart.
    """
    sets = np.unique(iset)
    parameters = [cells[k].parameters for k in sets.tolist()]
    check_one_form(parameters, cell_groups(parameters), data.name, "sets")
    wavelength = np.array([wavelengths[k] for k in sets.tolist()])
    group = wavelength_groups(wavelength)
    start: dict[int, int] = {}
    of_set = np.array([start.setdefault(k, len(start)) for k in group.tolist()])  # in their order
    batches, first = np.unique(batch, return_index=True)
    of_batch = of_set[np.searchsorted(sets, np.asarray(iset)[first])]
    members = [np.flatnonzero(of_set == k) for k in range(of_set.max() + 1)]
    known = [float(np.median(wavelength[rows])) or None for rows in members]  # 0 is unknown
    forms = [typical_cell(np.array(parameters)[rows], data.space_group) for rows in members]
    of_row = of_batch[np.searchsorted(batches, data.metadata["BATCH"])]
    return split_data(data, of_row, *_waves(data, known), forms)


def _waves(
    data: UnmergedData, wavelength: Sequence[float | None]
) -> tuple[list[str], list[DatasetLabels]]:
    """Name data sets by their wavelengths, WAVE1 and so on, where there are several."""
    labels = [data.labels._replace(wavelength=value) for value in wavelength]
    suffixes = [f"WAVE{k + 1}" for k in range(len(labels))]
    if len(labels) > 1:
        labels = [
            own._replace(names=own.names._replace(dataset=suffix))
            for own, suffix in zip(labels, suffixes, strict=True)
        ]
    return suffixes, labels


def file_word(text: str) -> str:
    """Make a word that can be part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "dataset"


def _words(part: UnmergedData) -> str:
    wavelength = part.typical_wavelength
    known = "unknown wavelength" if wavelength is None else f"{wavelength:.5f} A"
    return f"{part.name} ({known}, {len(part)} observations)"


def _places(cells: ArrayLike) -> Array:
    """Log lengths and angles in radians, (n, 6): differences are relative ones."""
    cells = np.asarray(cells, dtype=float)
    return np.concatenate([np.log(cells[:, :3]), np.radians(cells[:, 3:])], axis=1)


def _valley(values: Array) -> float:
    """Threshold between two groups of values with the least spread within both (Otsu)."""
    ordered = np.sort(values)
    n = np.arange(1, len(ordered))
    if not len(n):
        return float(ordered[0])
    total = np.cumsum(ordered - ordered.mean())[:-1]
    best = int(np.argmax(total**2 / (n * (len(ordered) - n))))
    return float(ordered[best])


def _spread(values: Array) -> float:
    """Return the standard deviation, robust where strays can be told from spread."""
    robust = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    if len(values) >= ENOUGH:
        return robust
    return max(robust, float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
