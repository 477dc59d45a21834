"""Test sets of other programs (R_free), read from merged MTZ files.

Two conventions are about. CCP4 gives every reflection a number from 0 to n - 1 and takes 0 as the
test set; phenix and CNS have two values, of which the rarer one is the test set.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.forms import CELL_TOLERANCE, cell_text
from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.unmerged_mtz import load_mtz

#: Labels without case and punctuation: FreeR_flag, FREE, RFREE, FREER (CCP4), R-free-flags
#: (phenix), TEST (CNS).
LABELS = {"freerflag", "freerflags", "free", "rfree", "freer", "rfreeflags", "rfreeflag", "test"}
#: A test set of two values is rarer than this.
LARGEST_SHARE = 0.4
#: Number of sets where a file has only two values, at most.
MOST_SETS = 100


@dataclass(frozen=True)
class GivenFlags:
    """A test set that is to be kept.

    Parameters
    ----------
    path : Path
    miller_index : (M, 3) int32
        In the CCP4 asymmetric unit.
    number : (M,) int
        Set of each reflection, 0 to ``n_sets`` - 1, 0 for the test set; -1 where the file says
        only that the reflection is in none but the test set.
    n_sets : int
        Sets there are; the test set is one of them.
    cell : gemmi.UnitCell
    space_group : gemmi.SpaceGroup
    """

    path: Path
    miller_index: NDArray[np.int32]
    number: NDArray[np.int64]
    n_sets: int
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup

    def check(self, cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup) -> None:
        """Make sure that the same indices mean the same reflections.

        Space groups that differ by screw axes alone (P41212, P43212) have the same.

        Raises
        ------
        UserError
        """
        if _laue_group(space_group) != _laue_group(self.space_group):
            raise UserError(
                f"--free-r {self.path} has space group {self.space_group.xhm()}, the data have "
                f"{space_group.xhm()}; give flags of the same crystal form, or leave --free-r out"
            )
        if not self.cell.is_similar(cell, CELL_TOLERANCE, math.degrees(CELL_TOLERANCE)):
            raise UserError(
                f"--free-r {self.path} has the cell {cell_text(self.cell)}, the data have "
                f"{cell_text(cell)}; give flags of the same crystal form, or leave --free-r out"
            )


def _laue_group(space_group: gemmi.SpaceGroup) -> frozenset[str]:
    """Operations without translations but centring, and with the inversion."""
    operations = space_group.operations().derive_symmorphic()
    operations.add_inversion()
    return frozenset(op.triplet() for op in operations)


def read_free_flags(path: Path) -> GivenFlags:
    """Read the test set of a merged MTZ file, whatever the program that made it.

    Raises
    ------
    UserError
        No MTZ file, no or several columns of flags, or no telling which value is the test set.
    """
    mtz = load_mtz(path)
    if mtz.batches:
        raise UserError(f"--free-r {path} is an unmerged MTZ file; give a merged one with flags")
    mtz.ensure_asu()
    found = [c for c in mtz.columns if re.sub(r"[^a-z]", "", c.label.lower()) in LABELS]
    if len(found) != 1:
        labels = " ".join(c.label for c in found) or "none"
        raise UserError(
            f"--free-r {path}: one column FreeR_flag, FREE, RFREE or R-free-flags is needed, "
            f"found {labels} among {' '.join(mtz.column_labels())}; give a file with one test set"
        )
    values = np.array(found[0], dtype=np.float64)
    known = np.isfinite(values)
    number, n_sets = _sets(values[known], f"--free-r {path}: {found[0].label}")
    return GivenFlags(
        path, mtz.make_miller_array()[known].astype(np.int32), number, n_sets, mtz.cell,
        mtz.spacegroup,
    )  # fmt: skip


def _sets(values: NDArray[np.float64], what: str) -> tuple[NDArray[np.int64], int]:
    """Return the set of each reflection, and how many sets there are."""
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) < 2 or not np.array_equal(kinds, np.rint(kinds)):
        shown = " ".join(f"{kind:g}" for kind in kinds[:5])
        raise UserError(f"{what} holds {shown or 'nothing'}: no test set; give integer flags")
    if len(kinds) > 2:
        if kinds[0] != 0:
            raise UserError(
                f"{what} goes from {kinds[0]:g} to {kinds[-1]:g}; of several sets 0 is the test "
                "set: renumber them"
            )
        return values.astype(np.int64), int(kinds[-1]) + 1
    share = counts.min() / counts.sum()
    if share > LARGEST_SHARE:
        raise UserError(
            f"{what} is {kinds[0]:g} in {counts[0]} reflections and {kinds[1]:g} in {counts[1]}: "
            "which is the test set cannot be told; give flags with a test set of 1 to 20 %"
        )
    is_test = values == kinds[np.argmin(counts)]
    return np.where(is_test, 0, -1), int(np.clip(round(1 / share), 2, MOST_SETS))
