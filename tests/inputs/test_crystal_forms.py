"""Cells and space groups that contradict each other; refined cells and other settings pass."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
from simulated_unmerged import FAST, observed, write_mtz

from braggflux.integrator.crystal.forms import typical_cell
from braggflux.integrator.crystal.lattice import check_lattice, lattice_misfit
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.pipelines import cli

FITTING = {
    "triclinic": ("P 1", (30, 40, 50, 70, 80, 95)),
    "monoclinic": ("P 1 21 1", (30, 40, 50, 90, 103, 90)),
    "monoclinic, unique axis c": ("P 1 1 21", (30, 40, 50, 90, 90, 103)),
    "C-centred": ("C 1 2 1", (60, 40, 50, 90, 121, 90)),
    "orthorhombic": ("P 21 21 21", (30, 40, 50, 90, 90, 90)),
    "tetragonal": ("P 43 21 2", (79.405, 79.405, 37.8, 90, 90, 90)),
    "tetragonal, refined freely": ("P 43 21 2", (79.40, 79.41, 37.8, 90.02, 89.97, 90)),
    "trigonal": ("P 31 2 1", (60, 60, 90, 90, 90, 120)),
    "hexagonal, refined freely": ("P 63", (66.9, 66.95, 40.95, 90, 90.03, 119.95)),
    "rhombohedral, hexagonal axes": ("R 3 2:H", (60, 60, 150, 90, 90, 120)),
    "rhombohedral axes": ("R 3 2:R", (60, 60, 60, 75, 75, 75)),
    "cubic": ("F 2 3", (90, 90, 90, 90, 90, 90)),
}
CONTRADICTING = {
    "orthorhombic cell, tetragonal group": ("P 41 21 2", (34, 55, 68, 90, 90, 90)),
    "tetragonal axes in another order": ("P 43 21 2", (37.8, 79.4, 79.4, 90, 90, 90)),
    "monoclinic angle, orthorhombic group": ("P 21 21 21", (30, 40, 50, 90, 95, 90)),
    "another unique axis": ("P 1 21 1", (30, 40, 50, 90, 90, 103)),
    "gamma of 60": ("P 63", (40, 40, 50, 90, 90, 60)),
    "right angles, hexagonal group": ("P 63", (40, 40, 50, 90, 90, 90)),
    "rhombohedral axes, hexagonal setting": ("R 3 2:H", (60, 60, 60, 75, 75, 75)),
    "tetragonal cell, cubic group": ("I 2 3", (79, 79, 38, 90, 90, 90)),
    "two per cent": ("P 43 21 2", (79.4, 81.0, 37.8, 90, 90, 90)),
    "a short axis beside a long one": ("P 43 21 2", (30, 32, 300, 90, 90, 90)),
}


@pytest.mark.parametrize("name", FITTING)
def test_forms_that_go_together(name):
    group, cell = gemmi.SpaceGroup(FITTING[name][0]), gemmi.UnitCell(*FITTING[name][1])
    check_lattice(cell, group, "x")
    cells = np.array([cell.parameters] * 3) + np.array([[0], [-0.02], [0.03]])
    assert lattice_misfit(typical_cell(cells, group), group) < 1e-9


@pytest.mark.parametrize("name", CONTRADICTING)
def test_forms_that_contradict(name):
    group, cell = gemmi.SpaceGroup(CONTRADICTING[name][0]), gemmi.UnitCell(*CONTRADICTING[name][1])
    with pytest.raises(UserError, match="cannot be in space group"):
        check_lattice(cell, group, "x")
    if lattice_misfit(cell, group) < 0.06:  # crystals of stills are refined without symmetry
        return
    # the mean over the group would have hidden it
    with pytest.raises(UserError, match="cannot be in space group"):
        typical_cell([cell.parameters] * 5, group)


def test_the_setting_that_fits_is_named():
    group = gemmi.SpaceGroup("R 3:H")
    with pytest.raises(UserError, match="'R 3:R'"):
        check_lattice(gemmi.UnitCell(60, 60, 60, 75, 75, 75), group, "x")


def test_a_contradicting_header_is_refused(tmp_path, capsys):
    asu = ReciprocalAsu(
        gemmi.UnitCell(34, 55, 68, 90, 90, 90), gemmi.SpaceGroup("P 21 21 21"), 5.0, False
    )
    rows = observed(asu, np.random.default_rng(0), 4, 60)
    wrong = {"cell": (34, 55, 68, 90, 90, 90), "space_group": "P 41 21 2"}
    path = write_mtz(tmp_path / "a.mtz", *rows, **wrong)
    assert cli.main(["merge", str(path), "--out", str(tmp_path / "out"), *FAST]) == 2
    error = capsys.readouterr().err
    assert (
        "the cell 34.00 55.00 68.00 90.00 90.00 90.00 cannot be in space group P 41 21 2" in error
    )
    assert not (tmp_path / "out").exists()
    right = write_mtz(tmp_path / "b.mtz", *rows, **wrong | {"space_group": "P 21 21 21"})
    assert cli.main(["merge", str(right), "--out", str(tmp_path / "out"), *FAST]) == 0


def test_reindexing_a_freely_refined_cell(tmp_path):
    """Axes of a tetragonal cell that differ by a hundredth of an Angstrom may be exchanged."""
    form = {"cell": (40.0, 40.01, 50, 90, 90, 90), "space_group": "P 43"}
    asu = ReciprocalAsu(
        gemmi.UnitCell(*form["cell"]), gemmi.SpaceGroup(form["space_group"]), 5.0, False
    )
    path = write_mtz(tmp_path / "a.mtz", *observed(asu, np.random.default_rng(0), 4, 60), **form)
    argv = ["merge", str(path), "--out", str(tmp_path / "out"), "--reindex", "k,h,-l", *FAST]
    assert cli.main(argv) == 0
