"""Observations of SCALEPACK, written with ``no merge original index``.

The first lines give the number of symmetry operators, the space group and the operators; each
observation has the original and the unique index, batch, two flags, the operator, I and sigma in
columns of fixed width. There is no cell and no place on the detector.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.symmetry import rotations
from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.text_files import open_binary, stem_of
from braggflux.merge.io.observations import UnmergedData, make_unmerged

Array = NDArray[np.float64]

#: Widths of the columns: original and unique index, batch, centric, spindle, operator, I, sigma.
WIDTHS = (*6 * (4,), 6, 2, 2, 3, 8, 8)
_FIRST_LINE = re.compile(rb" *\d+ +[A-Za-z][^\r\n]*\r?\n[ \d-]{27}\s*\r?\n[ \d-]{9}\s*\r?\n")


def is_scalepack(head: bytes) -> bool:
    """Whether a file begins like one of SCALEPACK with original indices."""
    return _FIRST_LINE.match(head) is not None


def read_scalepack(
    path: str | Path,
    space_group: gemmi.SpaceGroup | None = None,
    cell: gemmi.UnitCell | None = None,
) -> UnmergedData:
    """Read the observations of one file.

    The only metadata are ``BATCH``. Observations without a positive sigma are left out.

    Parameters
    ----------
    path : str or Path
        May be compressed (gzip).
    space_group : gemmi.SpaceGroup, optional
        Instead of that of the file.
    cell : gemmi.UnitCell
        The file has none.

    Raises
    ------
    UserError
        Not such a file, damaged, or no cell is given.
    """
    path = Path(path)
    with open_binary(path) as file:
        lines = file.read().decode("latin-1").splitlines()
    if len(lines) < 2 or not is_scalepack("\n".join([*lines[:3], ""]).encode("latin-1")):
        raise UserError(
            f"{path} is not a file of SCALEPACK with original indices (perhaps it is merged); "
            "write it with 'no merge original index'"
        )
    if cell is None:
        raise UserError(
            f"{path} is of SCALEPACK and does not say its cell; give it with --unit-cell, for "
            "example 79.4,79.4,37.8,90,90,90"
        )
    number, name = lines[0].split(maxsplit=1)
    n_lines = 1 + 2 * int(number)
    group = space_group or _space_group(name, lines[1:n_lines:2], cell, path)
    rows = _rows([line for line in lines[n_lines:] if line.strip()], path)
    return make_unmerged(
        source=str(path),
        miller_index=rows[:, :3].astype(np.int32),
        intensity=rows[:, 10],
        sigma=rows[:, 11],
        image_label=rows[:, 6],
        metadata={"BATCH": rows[:, 6]},
        wavelength=None,
        cell=cell,
        space_group=group,
        name=stem_of(path),
        has_lp_applied=True,
    )


def _rows(lines: list[str], path: Path) -> Array:
    if not lines:
        raise UserError(f"{path} holds no observations; give a file that does")
    edges = np.cumsum((0, *WIDTHS)).tolist()
    pairs = list(pairwise(edges))
    try:
        return np.array([[float(line[a:b]) for a, b in pairs] for line in lines])
    except ValueError as error:
        raise UserError(
            f"{path} has an observation that cannot be read ({error}); its columns must be those "
            "of 'no merge original index' (6i4, i6, 2i2, i3, 2f8): write it again"
        ) from error


def _space_group(
    name: str, operators: list[str], cell: gemmi.UnitCell, path: Path
) -> gemmi.SpaceGroup:
    """Space group by its name, which must have the rotations of the operators."""
    group = gemmi.find_spacegroup_by_name(name.strip(), cell.alpha, cell.gamma)
    if group is None:
        raise UserError(
            f"{path} has the space group {name.strip()!r}, which is not known; give it with "
            "--space-group, for example P43212"
        )
    written = {tuple(int(line[i : i + 3]) for i in range(0, 27, 3)) for line in operators}
    known = rotations(group)
    expected = [
        {tuple(r.ravel().tolist()) for r in of} for of in (known, known.transpose(0, 2, 1))
    ]
    if written not in expected:
        raise UserError(
            f"{path} has the name {name.strip()!r} and the operators of another space group or "
            "setting; give the right one with --space-group"
        )
    return group
