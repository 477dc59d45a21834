"""Merged structure factors in MTZ files.

Unmerged ones are in :mod:`braggflux.merge.io.formats.unmerged_mtz`.

Column names and types are those of CCP4 (``F(+)`` G, ``SIGF(+)`` L, ``I(+)`` K, ``SIGI(+)`` M,
``F`` F, ``IMEAN`` J, ``DANO`` D, ``E`` E, sigmas Q, figures of merit W, ``FreeR_flag`` I, counts
R), so that other programs find the data without being told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.atomic import replacing
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.crystal.symmetry import is_in_asu
from braggflux.integrator.errors import UserError, reading
from braggflux.merge.io.dataset_labels import DatasetNames
from braggflux.merge.io.formats.unmerged_mtz import (
    UnmergedMtz,
    UnmergedTable,
    batch_offsets,
    load_mtz,
    read_unmerged_mtz,
    write_unmerged_mtz,
)
from braggflux.merge.io.observations import LARGEST, check_cell, check_indices
from braggflux.merge.output.half_sets import HalfSet, friedel_rows, mean_of_mates
from braggflux.merge.output.merged_table import DIFFERENCE, MergedTable, merged_table

__all__ = [
    "DatasetNames",
    "MergedMtz",
    "MergedTable",
    "UnmergedMtz",
    "UnmergedTable",
    "batch_offsets",
    "merged_table",
    "read_merged_mtz",
    "read_unmerged_mtz",
    "write_half_sets_mtz",
    "write_merged_mtz",
    "write_unmerged_mtz",
]

Array = NDArray[np.float64]
Column = tuple[str, str, NDArray[Any]]  # label, type, values

FREE_FLAG = "FreeR_flag"
#: Of counts: R, any real number. Programs look for flags of R_free among integers (I), where small
#: counts look like flags.
COUNT = "R"


@dataclass(frozen=True)
class MergedMtz:
    """Contents of a merged MTZ file.

    ``table`` has NaN in the columns the file lacks. The DANO of other programs is the plain
    difference of the mates, in need of weights: a DANO whose history does not say that it is the
    coupled posterior counts as lacking.
    """

    table: MergedTable
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    wavelength: float
    history: tuple[str, ...]


def write_merged_mtz(
    path: str | Path,
    table: MergedTable,
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    wavelength: float,
    *,
    history: Sequence[str] = (),
    names: DatasetNames = DatasetNames(),  # noqa: B008 - immutable
    title: str = "",
    free_flag: NDArray[np.int64] | None = None,
) -> None:
    """Write ``F SIGF F(+) SIGF(+) F(-) SIGF(-) IMEAN SIGIMEAN I(+) ... N(+) N(-) DANO ... E``.

    Without Friedel mates kept apart: ``F SIGF IMEAN SIGIMEAN N E``. DANO, SIGDANO and FOMDANO are
    there where a prior ties the mates, E where it is known, FreeR_flag where it is given.

    Parameters
    ----------
    path : str or Path
    table : MergedTable
        Indices in the CCP4 asymmetric unit.
    cell : gemmi.UnitCell
    space_group : gemmi.SpaceGroup
    wavelength : float
        [A]; 0 for unknown.
    history : sequence of str
        Lines of at most 80 characters; longer ones are cut.
    names : DatasetNames
    title : str
    free_flag : (R,) int, optional
        Of R_free, as CCP4 has it: 0 is the test set.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    if not is_in_asu(table.miller_index, space_group).all():
        raise ValueError("miller_index must lie in the CCP4 asymmetric unit")
    mtz = _empty_mtz(cell, space_group, wavelength, names, title)
    columns = list(_columns(table))
    if free_flag is not None:
        columns.append((FREE_FLAG, "I", free_flag))
    _write(path, mtz, columns, history)


def write_half_sets_mtz(
    path: str | Path,
    asu: ReciprocalAsu,
    half_sets: Mapping[str, HalfSet],
    wavelength: float,
    *,
    history: Sequence[str] = (),
    names: DatasetNames = DatasetNames(),  # noqa: B008 - immutable
    title: str = "",
) -> None:
    """Write ``F1 SIGF1 F1(+) SIGF1(+) F1(-) SIGF1(-) F2 ...``, of mates merged F1 SIGF1 F2 ...

    Parameters
    ----------
    path : str or Path
    asu : ReciprocalAsu
    half_sets : mapping of str to HalfSet
        By name, F or I and a number; over the reflections of ``asu``, mates joined. Those that no
        half has seen are left out.
    wavelength, history, names, title
        As :func:`write_merged_mtz`.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    index = asu.asu_index[friedel_rows(asu)[0]]
    seen = np.any([np.isfinite(half.mean) for half in half_sets.values()], axis=0)
    columns = list(_indices(index[seen]))
    for name, half in half_sets.items():
        columns += _value_and_sigma(name, half.mean[seen], half.sigma[seen])
        if asu.anomalous:
            half = half.select(seen)
            columns += _mates(name, half.plus, half.sigma_plus, half.minus, half.sigma_minus)
    mtz = _empty_mtz(asu.cell, asu.space_group, wavelength, names, title)
    _write(path, mtz, columns, history)


def _empty_mtz(
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    wavelength: float,
    names: DatasetNames,
    title: str,
) -> gemmi.Mtz:
    mtz = gemmi.Mtz()  # no HKL_base: readers would take its wavelength 0 for the data's
    dataset = mtz.add_dataset(names.dataset)
    dataset.project_name, dataset.crystal_name = names.project, names.crystal
    dataset.id, dataset.wavelength = 1, wavelength
    mtz.title = title
    mtz.spacegroup = space_group
    mtz.set_cell_for_all(cell)
    return mtz


def _write(
    path: str | Path, mtz: gemmi.Mtz, columns: Iterable[Column], history: Sequence[str]
) -> None:
    columns = list(columns)
    for label, kind, _ in columns:
        mtz.add_column(label, kind, dataset_id=1)
    mtz.set_data(np.column_stack([values for _, _, values in columns]).astype(np.float32))
    mtz.sort()
    mtz.history = [line[:80] for line in history]
    with replacing(path) as temporary:
        temporary.write_bytes(mtz.write_to_bytes())


def _columns(table: MergedTable) -> Iterable[Column]:
    """(label, type, values) of every column, in the order of the contract."""
    t = table
    yield from _indices(t.miller_index)
    yield from _value_and_sigma("F", t.f, t.sigma_f)
    if t.is_anomalous:
        yield from _mates("F", t.f_plus, t.sigma_f_plus, t.f_minus, t.sigma_f_minus)
    yield from _value_and_sigma("IMEAN", t.i_mean, t.sigma_i_mean)
    if t.is_anomalous:
        yield from _mates("I", t.i_plus, t.sigma_i_plus, t.i_minus, t.sigma_i_minus)
        yield from (("N(+)", COUNT, t.n_plus), ("N(-)", COUNT, t.n_minus))
    else:
        yield "N", COUNT, t.n_plus
    if t.has_coupled_differences:
        yield from (("DANO", "D", t.difference), ("SIGDANO", "Q", t.sigma_difference))
    if np.isfinite(t.merit).any():
        yield "FOMDANO", "W", t.merit
    if np.isfinite(t.normalised).any():
        yield "E", "E", t.normalised


def _indices(miller_index: NDArray[np.integer[Any]]) -> Iterable[Column]:
    yield from ((axis, "H", miller_index[:, i]) for i, axis in enumerate("HKL"))


def _value_and_sigma(name: str, value: Array, sigma: Array) -> Iterable[Column]:
    yield from ((name, {"F": "F", "I": "J"}[name[0]], value), (f"SIG{name}", "Q", sigma))


def _mates(
    name: str, plus: Array, sigma_plus: Array, minus: Array, sigma_minus: Array
) -> Iterable[Column]:
    value_type, sigma_type = {"F": ("G", "L"), "I": ("K", "M")}[name[0]]
    yield from ((f"{name}(+)", value_type, plus), (f"SIG{name}(+)", sigma_type, sigma_plus))
    yield from ((f"{name}(-)", value_type, minus), (f"SIG{name}(-)", sigma_type, sigma_minus))


def read_merged_mtz(path: str | Path) -> MergedMtz:
    """Read ``F(+)/F(-)``, ``I(+)/I(-)``, or means only, from a merged MTZ file.

    Indices are brought into the CCP4 asymmetric unit.

    Raises
    ------
    UserError
        Not a readable MTZ file, unmerged, or without the columns; the message names those found.
    """
    with reading(path, "write it again or give another"):
        return _merged(load_mtz(path), path)


def _merged(mtz: gemmi.Mtz, path: str | Path) -> MergedMtz:
    if mtz.batches or "M/ISYM" in mtz.column_labels() or "M_ISYM" in mtz.column_labels():
        raise UserError(
            f"{path} is an unmerged MTZ file (it has batches or M/ISYM); merged data are needed: "
            "give a merged file, or merge this one first with `braggflux merge`"
        )
    check_cell(mtz.cell)
    check_indices(mtz.make_miller_array())
    mtz.ensure_asu()
    found = _Columns(mtz)
    has_f, has_i = found.has_mates("F"), found.has_mates("I")
    mean_intensity = "IMEAN" if "IMEAN" in found.data else "I"
    if not (has_f or has_i or "F" in found.data or mean_intensity in found.data):
        raise UserError(
            f"{path} has none of the columns F(+)/F(-), I(+)/I(-), F/SIGF, IMEAN/SIGIMEAN, "
            f"I/SIGI; found {' '.join(mtz.column_labels())}; give a file with merged amplitudes "
            "or intensities under these labels"
        )
    f, i = found.mates("F"), found.mates("I")
    f_mean, i_mean = found.mean("F", f), found.mean(mean_intensity, i)
    is_coupled = any(line.startswith(DIFFERENCE[0]) for line in mtz.history)
    table = MergedTable(
        mtz.make_miller_array().astype(np.int32),
        *f,
        *i,
        *f_mean,
        *i_mean,
        found.get("N(+)" if "N(+)" in found.data else "N"),
        found.get("N(-)"),
        found.get("DANO" if is_coupled else ""),
        found.get("SIGDANO" if is_coupled else ""),
        found.get("FOMDANO" if is_coupled else ""),
        found.get("E"),
        has_f or has_i,
    )
    wavelength = mtz.datasets[-1].wavelength if len(mtz.datasets) else 0.0
    return MergedMtz(table, mtz.cell, mtz.spacegroup, wavelength, tuple(mtz.history))


class _Columns:
    """Columns of a merged file by label; missing ones, and numbers beyond all, are NaN."""

    def __init__(self, mtz: gemmi.Mtz) -> None:
        self._length = mtz.nreflections
        self.data = {}
        for column in mtz.columns:
            values = np.array(column, dtype=np.float64)
            self.data[column.label] = np.where(np.abs(values) < LARGEST, values, np.nan)

    def get(self, label: str) -> Array:
        return self.data.get(label, np.full(self._length, np.nan))

    def has_mates(self, name: str) -> bool:
        return {f"{p}{name}({m})" for p in ("", "SIG") for m in "+-"} <= self.data.keys()

    def mates(self, name: str) -> tuple[Array, Array, Array, Array]:
        plus, minus = f"{name}(+)", f"{name}(-)"
        return self.get(plus), self.get(f"SIG{plus}"), self.get(minus), self.get(f"SIG{minus}")

    def mean(self, name: str, mates: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        if name in self.data:
            return self.get(name), self.get(f"SIG{name}")
        return mean_of_mates(*mates)
