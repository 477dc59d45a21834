"""Indexing operators: as many as gemmi's twin laws, none of them a symmetry of the crystal."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal.ambiguity import indexing_operators
from braggflux.integrator.crystal.cell import inv_d2
from braggflux.integrator.crystal.symmetry import to_asu

FORMS = {
    "P 63": (60, 60, 80, 90, 90, 120),
    "P 3": (60, 60, 80, 90, 90, 120),
    "P 3 2 1": (60, 60, 80, 90, 90, 120),
    "R 3": (60, 60, 80, 90, 90, 120),
    "R 3:R": (60, 60, 60, 80, 80, 80),
    "P 41": (60, 60, 40, 90, 90, 90),
    "P 4/m": (60, 60, 40, 90, 90, 90),
    "I 4": (60, 60, 40, 90, 90, 90),
    "P 21 3": (60, 60, 60, 90, 90, 90),
    "P 1": (60, 70, 80, 81, 92, 103),
}


@pytest.mark.parametrize("name", FORMS)
def test_merohedry(name):
    cell, group = gemmi.UnitCell(*FORMS[name]), gemmi.SpaceGroup(name)
    operators = indexing_operators(cell, group, 0.1)
    assert len(operators) == 1 + len(gemmi.find_twin_laws(cell, group, 0.1, False))
    assert operators.names[0] == "h,k,l"
    assert operators.is_symmetric.all()
    hkl = np.random.default_rng(0).integers(-9, 10, (200, 3))
    hkl = hkl[np.abs(hkl).min(1) > 0]
    unique = []
    for matrix, operator in zip(operators.matrices, operators.names, strict=True):
        moved = hkl @ matrix
        np.testing.assert_array_equal(
            moved, [gemmi.Op(operator).apply_to_hkl(h) for h in hkl.tolist()]
        )
        np.testing.assert_allclose(inv_d2(moved, cell), inv_d2(hkl, cell))
        unique.append(to_asu(moved, group).miller_index)
        assert np.linalg.det(matrix) == pytest.approx(1.0), "anomalous pairs must not be swapped"
    for a in range(len(unique)):
        for b in range(a):
            assert (unique[a] != unique[b]).any(axis=1).mean() > 0.5


def test_one_operator_after_another():
    cell, group = gemmi.UnitCell(*FORMS["P 3"]), gemmi.SpaceGroup("P 3")
    operators = indexing_operators(cell, group, 0.1)
    hkl = np.random.default_rng(0).integers(-9, 10, (100, 3))
    for b in range(len(operators)):
        after = operators.after(b, group)
        for a, matrix in enumerate(operators.matrices):
            both = to_asu(hkl @ matrix @ operators.matrices[b], group)
            one = to_asu(hkl @ operators.matrices[after[a]], group)
            np.testing.assert_array_equal(both.miller_index, one.miller_index)


@pytest.mark.parametrize("name", ["P 43 21 2", "P 61 2 2", "P 4 3 2"])
def test_holohedral_crystals_have_none(name):
    cell = (60, 60, 60, 90, 90, 90) if name == "P 4 3 2" else (79, 79, 38, 90, 90, 90)
    if name == "P 61 2 2":
        cell = FORMS["P 63"]
    assert len(indexing_operators(gemmi.UnitCell(*cell), gemmi.SpaceGroup(name), 0.5)) == 1


def test_pseudo_merohedry_needs_the_tolerance():
    group = gemmi.SpaceGroup("P 21 21 21")
    cell = gemmi.UnitCell(60, 60.3, 80, 90, 90, 90)  # the diagonal is 0.3 degrees off
    assert len(indexing_operators(cell, group, 0.1)) == 1
    operators = indexing_operators(cell, group, 0.5)
    assert len(operators) == 2
    assert operators.is_symmetric.all()


def test_an_operator_that_moves_the_axes_is_no_choice_for_all():
    """P 4 in a cubic cell: any edge may be taken for the four-fold axis, but one is."""
    cell = gemmi.UnitCell(60, 60, 60, 90, 90, 90)
    operators = indexing_operators(cell, gemmi.SpaceGroup("P 4"), 0.1)
    assert len(operators) == 6
    assert operators.is_symmetric.sum() == 2
