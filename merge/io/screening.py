"""Rows that would count twice, or spoil what all rows share: left out, and said how many.

The data are those of one dataset, as its reader gives them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.merge.io.observations import UnmergedData

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: Names of spot positions in the order of preference.
POSITIONS = (("XDET", "YDET"), ("X", "Y"), ("xobs", "yobs"), ("fs", "ss"))
#: Spots of one index on one image that are nearer than this share of the detector are one spot.
SAME_PLACE = 1e-3
#: Share of spots measured twice that is taken for an accident, the first measurement kept.
FEW = 0.01
#: Share of copies on other images, where no position confirms them, that is no coincidence.
MANY_COPIES = 0.05
#: Wavelengths further from nearly all others than those are from each other are wrong; on a
#: logarithmic scale, and at least this far.
NEARLY_ALL, LEAST_RANGE = (0.005, 0.995), 0.05


def screened(data: UnmergedData, *, is_laue: bool = False) -> UnmergedData:
    """Leave out copies of other rows and, for Laue, rows without a possible wavelength.

    Parameters
    ----------
    data : UnmergedData
    is_laue : bool

    Raises
    ------
    UserError
        Many spots were integrated twice with different results, or most wavelengths are missing.
    """
    keep = np.ones(len(data), dtype=bool)
    if is_laue and data.wavelength is not None:
        keep &= has_possible_wavelength(data.wavelength, data.name)
    copies = _copies(data)
    if copies.any():
        log.warning(
            "%s: %d of %d observations are copies of others; each counts once",
            *(data.name, copies.sum(), len(data)),
        )
    keep &= ~copies
    again = _measured_again(data, keep)
    if again.any():
        share = again.sum() / max(keep.sum(), 1)
        if share > FEW:
            raise UserError(
                f"{data.name}: {again.sum()} of {len(data)} observations have the index, image "
                "and place of another one but another intensity: the spots were integrated twice, "
                "and the same photons would count twice; give the rows of one integration"
            )
        log.warning(
            "%s: %d observations measure a spot again that was measured; the first is kept",
            *(data.name, again.sum()),
        )
        keep &= ~again
    return data if keep.all() else data.select(keep)


def has_possible_wavelength(wavelength: Array, name: str) -> NDArray[np.bool_]:
    """Rows with a wavelength that can be of this beam, (N,).

    Parameters
    ----------
    wavelength : (N,)
        [A]; 0, negative or not finite for none.
    name : str
        Of the dataset, for messages.

    Raises
    ------
    UserError
        Most rows have none.
    """
    known = np.isfinite(wavelength) & (wavelength > 0)
    if 2 * known.sum() < len(known):
        raise UserError(
            f"{name}: {len(known) - known.sum()} of {len(known)} observations have no wavelength "
            "above 0, which --laue needs of each; give a file with a Wavelength column, or leave "
            "--laue out"
        )
    value = np.log(np.where(known, wavelength, 1.0))
    low, high = np.quantile(value[known], NEARLY_ALL)
    margin = max(high - low, LEAST_RANGE)
    possible = known & (value >= low - margin) & (value <= high + margin)
    if not possible.all():
        log.warning(
            "%s: %d observations without a wavelength and %d far from the spectrum (%.4g to %.4g "
            "A) are left out",
            *(name, (~known).sum(), (known & ~possible).sum()),
            *np.exp([value[possible].min(), value[possible].max()]),
        )
    return possible


def _copies(data: UnmergedData) -> NDArray[np.bool_]:
    """Rows that repeat an earlier one, (N,): index, intensity, sigma, place, and image.

    Copies under other image numbers, of a sweep that is in the file twice, are found by their
    places; without places they must be many.
    """
    found = np.zeros(len(data), dtype=bool)
    order = np.argsort(data.intensity, kind="stable")
    equal = np.diff(data.intensity[order]) == 0
    rows = order[np.concatenate([[False], equal]) | np.concatenate([equal, [False]])]
    if not len(rows):
        return found
    rows.sort()
    position = spot_positions(data)
    columns = [data.intensity, data.sigma, *data.miller_index.T]
    found[_repeats([*columns, data.image], rows)] = True
    elsewhere = _repeats(columns + ([] if position is None else list(position.T)), rows)
    if position is not None or len(elsewhere) > MANY_COPIES * len(data):
        found[elsewhere] = True
    return found


def _repeats(columns: Sequence[NDArray[Any]], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of some ``rows`` that are equal in all columns to an earlier one."""
    values = np.stack([np.nan_to_num(c[rows].astype(np.float64)) for c in columns])
    order = np.lexsort(values)  # stable: of equal rows the first comes first
    same = (np.diff(values[:, order], axis=1) == 0).all(0)
    return rows[order[1:][same]]


def _measured_again(data: UnmergedData, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows at the place of an earlier one of the same index and image, (N,).

    Parts of one reflection, with partialities of their own, are no measurements of one spot.
    """
    found = np.zeros(len(data), dtype=bool)
    position = spot_positions(data)
    if position is None:
        return found
    near = SAME_PLACE * np.ptp(position[keep], axis=0).max()
    first, second = _pairs(data, np.flatnonzero(keep))
    one_place = (np.abs(position[first] - position[second]) <= near).all(1)
    for name in ("partiality", "panel"):
        if name in data.metadata:
            column = data.metadata[name]
            one_place &= column[first] == column[second]
    found[second[one_place]] = True
    return found


def _pairs(
    data: UnmergedData, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those of some ``rows`` that follow each other under one index on one image, (P,) each."""
    index = data.miller_index[rows].astype(np.int64)
    limit = int(np.abs(index).max(initial=0))
    key = data.image[rows]
    for column in index.T:
        key = key * (2 * limit + 1) + column + limit
    order = np.argsort(key, kind="stable")
    same = np.diff(key[order]) == 0
    return rows[order[:-1][same]], rows[order[1:][same]]


def spot_positions(data: UnmergedData) -> Array | None:
    """Place of each spot on the detector, (N, 2); None where it is not known."""
    for names in POSITIONS:
        if all(name in data.metadata for name in names):
            position = np.column_stack([data.metadata[name] for name in names])
            return position if np.isfinite(position).all() else None
    return None
