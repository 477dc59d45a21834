"""A space group that the user names for data whose file names another.

Indices stay as observed, so that any group of the lattice can be asked for; whether the
intensities have its symmetry is another question, which they answer themselves.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.cell import inv_d2
from braggflux.integrator.crystal.forms import CrystalForm, typical_cell
from braggflux.integrator.crystal.lattice import TOLERANCE, check_lattice, lattice_misfit
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.crystal.symmetry import rotations
from braggflux.integrator.errors import UserError
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.stores.observation_store import ObservationStore, StoreView

Array = NDArray[np.float64]
Index = NDArray[np.int32]

log = logging.getLogger(__name__)

#: Share of the observations that the new lattice centring may forbid: strays, not a sublattice.
MAX_FORBIDDEN = 0.02
#: Correlation, of intensities that a rotation brings together, below which they are not equal.
MIN_CORRELATION = 0.3
#: Pairs of reflections that a correlation needs, and observations of which it is taken.
MIN_PAIRS, SAMPLE = 50, 1_000_000
N_SHELLS = 10


def in_group(data: UnmergedData, group: gemmi.SpaceGroup) -> UnmergedData:
    """Copy of data in another space group, with a cell that obeys it.

    Raises
    ------
    UserError
        The cell does not have the symmetry, or the centring forbids many of the observations.
    """
    cell, group = chosen_form(data, group)
    if group.xhm() != data.space_group.xhm():
        _check_observations(data, group)
    return replace(data, cell=cell, space_group=group)


class StoreInGroup(StoreView):
    """Read a store in another space group, as :func:`in_group` does.

    Parameters
    ----------
    source : ObservationStore
        Closed with this one.
    group : gemmi.SpaceGroup

    Raises
    ------
    UserError
    """

    def __init__(self, source: ObservationStore, group: gemmi.SpaceGroup) -> None:
        super().__init__(source)
        self.cell, self.space_group = chosen_form(source, group)
        if self.space_group.xhm() != source.space_group.xhm():
            n_images = int(np.searchsorted(source.image_starts, SAMPLE))
            _check_observations(source.read(0, min(n_images, source.n_images)), self.space_group)

    def read(self, first: int = 0, last: int | None = None) -> UnmergedData:
        """Read images ``first`` to ``last`` - 1, as :meth:`ObservationStore.read`."""
        data = self._source.read(first, last)
        return replace(data, cell=self.cell, space_group=self.space_group)

    def column(self, name: str, rows: slice) -> NDArray[Any]:
        """Read some rows of a column, as :meth:`ObservationStore.column`."""
        return self._source.column(name, rows)


def chosen_form(
    form: CrystalForm, group: gemmi.SpaceGroup
) -> tuple[gemmi.UnitCell, gemmi.SpaceGroup]:
    """Cell and space group of data in the group asked for, R on the axes that the cell has.

    Raises
    ------
    UserError
        The cell does not have the symmetry.
    """
    if group.ext in "HR" and lattice_misfit(form.cell, group) > TOLERANCE:
        other = gemmi.find_spacegroup_by_name(group.hm, form.cell.alpha, form.cell.gamma)
        group = other or group
    if group.xhm() != form.space_group.xhm():
        check_lattice(form.cell, group, form.name)
    return typical_cell([form.cell.parameters], group), group


def _check_observations(data: UnmergedData, group: gemmi.SpaceGroup) -> None:
    """Refuse a centring that the indices do not have; say where intensities contradict."""
    forbidden = float(_is_forbidden(data.miller_index, group).mean())
    if forbidden > MAX_FORBIDDEN:
        raise UserError(
            f"{data.name}: the lattice of {group.xhm()} has no place for {forbidden:.0%} of the "
            f"observations, which are indexed in {data.space_group.xhm()}; give a space group of "
            "the same lattice, or index again"
        )
    log.info(
        "%s: merged in %s, as asked for; the file has %s",
        *(data.name, group.xhm(), data.space_group.xhm()),
    )
    correlation = new_symmetry_correlation(data, group)
    if correlation is not None:
        say = log.warning if correlation < MIN_CORRELATION else log.info
        say(
            "%s: %s has rotations that %s has not; intensities that they bring together correlate "
            "by %.3f%s",
            *(data.name, group.xhm(), data.space_group.xhm(), correlation),
            ": they are not equal, and to merge them is likely wrong" * (say == log.warning),
        )


def _is_forbidden(index: Index, group: gemmi.SpaceGroup) -> NDArray[np.bool_]:
    """Whether the lattice centring makes reflections absent, (N,)."""
    shifts = np.array(group.operations().cen_ops, dtype=np.int64)
    return ((index.astype(np.int64) @ shifts.T) % gemmi.Op.DEN != 0).any(axis=1)


def new_symmetry_correlation(data: UnmergedData, group: gemmi.SpaceGroup) -> float | None:
    """Least correlation of mean intensities under rotations of ``group`` that the data's lacks.

    Intensities are those of the file, over their mean in shells of resolution. None without such
    rotations, or without reflections enough.
    """
    known = {(sign * r).tobytes() for r in rotations(data.space_group) for sign in (1, -1)}
    new = [r for r in rotations(group) if r.tobytes() not in known]
    if not new:
        return None
    index, intensity = data.miller_index[:SAMPLE], data.intensity[:SAMPLE]
    d_min = float(np.quantile(inv_d2(index, data.cell), 0.999)) ** -0.5
    asu = ReciprocalAsu(data.cell, data.space_group, d_min, anomalous=False)
    row = asu.refl_id(index)
    n = np.bincount(row[row >= 0], minlength=len(asu))
    mean = np.bincount(row[row >= 0], intensity[row >= 0], minlength=len(asu)) / np.maximum(n, 1)
    shell = np.argsort(np.argsort(asu.d)) * N_SHELLS // len(asu)
    level = np.bincount(shell[n > 0], mean[n > 0], N_SHELLS) / np.bincount(
        shell[n > 0], minlength=N_SHELLS
    ).clip(1)
    value = mean / np.where(level > 0, level, np.inf)[shell] / asu.epsilon
    found = []
    for rotation in new:
        other = asu.refl_id(asu.miller_index @ rotation)
        rows = np.flatnonzero((n > 0) & (other >= 0) & (other != np.arange(len(asu))))
        rows = rows[n[other[rows]] > 0]
        if len(rows) >= MIN_PAIRS:
            found.append(float(np.corrcoef(value[rows], value[other[rows]])[0, 1]))
    return min(found, default=None)
