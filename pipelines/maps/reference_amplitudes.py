"""|F_calc| of a reference structure, or |F| of an MTZ file, for the rows of a merger.

The reference says nothing of Bijvoet differences: both mates get the same amplitude, so that it
cannot put an anomalous signal into the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.unmerged_mtz import load_mtz
from braggflux.pipelines.maps.atomic_model import (
    check_same_crystal,
    check_same_form,
    read_model,
    structure_factors,
)

Array = NDArray[np.float64]

#: Labels of amplitudes in order of preference: of models with bulk solvent, of atoms, measured.
AMPLITUDES = (
    *("F-model", "FMODEL", "FC_ALL", "FC", "F-calc", "FCALC", "F_calc"),
    *("F", "FP", "FMEAN", "FOBS", "F-obs", "F-obs-filtered"),
)

#: Types of columns in the order of preference, intensities before amplitudes, means before mates.
KINDS = ("J", "K", "F", "G")


def reference_amplitudes(path: Path, asus: Sequence[ReciprocalAsu]) -> Array:
    """Amplitudes of all rows, one dataset after the other, on any scale; NaN where there is none.

    Parameters
    ----------
    path : Path
        Coordinates (PDB, mmCIF), or an MTZ file with merged amplitudes.
    asus : sequence of ReciprocalAsu
        Of each dataset.

    Raises
    ------
    UserError
        It cannot be used, or is of another crystal form.
    """
    if path.suffix.lower() == ".mtz":
        mtz = _mtz_of_form(path, asus)
        amplitude = np.array(mtz.column_with_label(_amplitude_label(mtz, path)), dtype=float)
        known = np.isfinite(amplitude) & (amplitude >= 0)
        return _of_all(asus, mtz.make_miller_array()[known], amplitude[known], path)
    return _of_all(asus, *_calculated(path, asus), path)


def check_reference(path: Path, cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup) -> None:
    """Check that :func:`reference_amplitudes` can use a file, as far as that takes a moment.

    Raises
    ------
    UserError
    """
    if path.suffix.lower() != ".mtz":
        check_same_crystal(read_model(path), cell, space_group, path)
        return
    mtz = _merged_mtz(path)
    check_same_form(mtz.cell, mtz.spacegroup, cell, space_group, path)
    _amplitude_label(mtz, path)


def reference_intensities(path: Path, asu: ReciprocalAsu) -> Array:
    """F^2 of the rows of one dataset on any scale, measured or calculated; NaN for none, (R,).

    As :func:`reference_amplitudes`, but of an MTZ file merged intensities will do as well, and
    are preferred.
    """
    if path.suffix.lower() != ".mtz":
        return _of_all([asu], *_calculated(path, [asu]), path) ** 2
    mtz = _mtz_of_form(path, [asu])
    kind = next((k for k in KINDS if len(mtz.columns_with_type(k))), None)
    if kind is None:
        raise UserError(
            f"reference {path} has neither intensities nor amplitudes (columns of type J, K, F or "
            f"G; found {' '.join(mtz.column_labels())}); give a merged file that has"
        )
    value = np.array(mtz.columns_with_type(kind)[0], dtype=float)
    known = np.isfinite(value)
    value = value[known] ** (2 if kind in "FG" else 1)
    return _of_all([asu], mtz.make_miller_array()[known], value, path)


def _calculated(
    path: Path, asus: Sequence[ReciprocalAsu]
) -> tuple[NDArray[np.integer[Any]], Array]:
    structure = read_model(path)
    for asu in asus:
        check_same_crystal(structure, asu.cell, asu.space_group, path)
    # a little beyond: the reflections that set the limit must be inside
    hkl, value = structure_factors(structure, 0.999 * min(asu.d_min for asu in asus))
    return hkl, np.abs(value).astype(float)


def _of_all(
    asus: Sequence[ReciprocalAsu], hkl: NDArray[np.integer[Any]], values: Array, path: Path
) -> Array:
    columns = [_of_rows(asu, hkl, values) for asu in asus]
    if not all((column > 0).any() for column in columns):
        raise UserError(
            f"reference {path} has no reflection in common with the data; give one that reaches "
            "their resolution"
        )
    return np.concatenate(columns)


def _of_rows(asu: ReciprocalAsu, hkl: NDArray[np.integer[Any]], amplitude: Array) -> Array:
    values = np.full(len(asu), np.nan)
    for sign in (1, -1):
        row = asu.refl_id(sign * hkl)
        values[row[row >= 0]] = amplitude[row >= 0]
    return values


def _mtz_of_form(path: Path, asus: Sequence[ReciprocalAsu]) -> gemmi.Mtz:
    mtz = _merged_mtz(path)
    for asu in asus:
        check_same_form(mtz.cell, mtz.spacegroup, asu.cell, asu.space_group, path)
    return mtz


def _merged_mtz(path: Path) -> gemmi.Mtz:
    mtz = load_mtz(path)
    if mtz.batches or {"B", "Y"} & {column.type for column in mtz.columns}:
        raise UserError(
            f"reference {path} is unmerged; give coordinates or an MTZ file with merged amplitudes"
        )
    return mtz


def _amplitude_label(mtz: gemmi.Mtz, path: Path) -> str:
    found = [column.label for column in mtz.columns if column.type == "F"]
    for label in AMPLITUDES:
        if label in found:
            return label
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"reference {path} has several columns of amplitudes ({' '.join(found)}), none under "
            f"a known label; name the one to use {AMPLITUDES[0]}"
        )
    raise UserError(
        f"reference {path} has no column of amplitudes (type F); found "
        f"{' '.join(mtz.column_labels())}; give coordinates or an MTZ file with amplitudes"
    )
