"""Test sets for R_free: alike reflections together, the same for all data sets, others' kept."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.merge.io.free_flag_file import read_free_flags
from braggflux.merge.output.free_flags import (
    N_SETS,
    TWIN_TOLERANCE,
    FreeFlags,
    one_of_those_alike,
)

CELL = gemmi.UnitCell(79.4, 79.4, 37.8, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 43 21 2")
#: One of each crystal system, some with a lattice of higher symmetry than the crystal's.
CRYSTALS = {
    "P 1": (50, 60, 70, 85, 95, 100),
    "P 1 21 1": (50, 60, 50.2, 90, 119.5, 90),
    "C 1 2 1": (100, 57.7, 60, 90, 90.3, 90),
    "P 21 21 21": (50, 50.3, 80, 90, 90, 90),
    "I 4": (80, 80, 100, 90, 90, 90),
    "P 43 21 2": (79.4, 79.4, 37.8, 90, 90, 90),
    "R 3 :H": (90, 90, 220, 90, 90, 120),
    "P 61 2 2": (92, 92, 130, 90, 90, 120),
    "P 21 3": (80, 80, 80, 90, 90, 90),
}


def reflections(d_min=3.0, cell=CELL, space_group=SPACE_GROUP):
    return gemmi.make_miller_array(cell, space_group, d_min)


def flag_file(path, values, label="FreeR_flag", cell=CELL, space_group=SPACE_GROUP, hkl=None):
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup = space_group
    mtz.set_cell_for_all(cell)
    mtz.add_dataset("d")
    mtz.add_column(label, "I")
    mtz.set_data(np.column_stack([reflections() if hkl is None else hkl, values]).astype(float))
    mtz.write_to_file(str(path))
    return path


@pytest.mark.parametrize("name", CRYSTALS)
def test_a_twentieth_of_the_orbits_under_the_lattice_is_the_test_set(name):
    cell, group = gemmi.UnitCell(*CRYSTALS[name]), gemmi.SpaceGroup(name)
    hkl = reflections(3.0, cell, group)
    number = FreeFlags().numbers(hkl, cell, group)
    assert (number.min(), number.max()) == (0, N_SETS - 1)
    lattice = gemmi.find_lattice_symmetry(cell, group.centring_type(), TWIN_TOLERANCE)
    rows = np.random.default_rng(0).choice(len(hkl), 300)
    for op in [*lattice.sym_ops, *group.operations().sym_ops]:
        for sign in (1, -1):  # Bijvoet mates too
            image = np.rint(sign * hkl[rows] @ np.array(op.rot) / gemmi.Op.DEN).astype(int)
            np.testing.assert_array_equal(FreeFlags().numbers(image, cell, group), number[rows])
    n_orbits = len(np.unique(one_of_those_alike(hkl, cell, group), axis=0))
    # a binomial of n orbits, with as many reflections in each on average
    sigma = np.sqrt(0.05 * 0.95 / n_orbits)
    assert abs((number == 0).mean() - 0.05) < 4 * sigma


def test_mates_of_a_possible_twin_are_together_where_the_crystal_does_not_relate_them():
    cell, group = gemmi.UnitCell(80, 80, 100, 90, 90, 90), gemmi.SpaceGroup("P 4")
    hkl = reflections(3.0, cell, group)
    hkl = hkl[(hkl[:, 0] != hkl[:, 1]) & (hkl[:, 2] > 0) & (hkl[:, 0] > 0) & (hkl[:, 1] > 0)]
    twin = hkl[:, [1, 0, 2]]
    numbers = [FreeFlags().numbers(h, cell, group) for h in (hkl, twin)]
    np.testing.assert_array_equal(*numbers)


def test_resolution_cell_and_selection_do_not_matter_but_the_seed_does():
    fine, coarse = reflections(2.5), reflections(3.5)
    of = {tuple(h): n for h, n in zip(fine.tolist(), FreeFlags().numbers(
        fine, CELL, SPACE_GROUP), strict=True)}  # fmt: skip
    other_cell = gemmi.UnitCell(79.0, 79.0, 38.1, 90, 90, 90)
    same = FreeFlags().numbers(coarse[::-3], other_cell, gemmi.SpaceGroup("P 41 21 2"))
    assert [of[tuple(h)] for h in coarse[::-3].tolist()] == same.tolist()
    other = FreeFlags(seed=1).numbers(fine, CELL, SPACE_GROUP)
    both = (other == 0) & (np.array([of[tuple(h)] for h in fine.tolist()]) == 0)
    assert both.sum() < 0.2 * (other == 0).sum()


def test_thin_shells_are_whole():
    hkl = reflections(2.5)
    number = FreeFlags(thin_shells=True).numbers(hkl, CELL, SPACE_GROUP)
    assert 0.03 < (number == 0).mean() < 0.07
    order = np.argsort(CELL.calculate_1_d2_array(hkl), kind="stable")
    changes = np.count_nonzero(np.diff(number[order] == 0))
    assert 30 <= changes <= 41  # both sides of each of 20 shells, at most


@pytest.mark.parametrize("label", ["FreeR_flag", "FREE", "R-free-flags"])
def test_numbers_of_ccp4_are_kept_and_extended(tmp_path, label):
    rng, hkl = np.random.default_rng(3), reflections()
    theirs = rng.integers(0, 10, len(hkl)).astype(float)
    theirs[rng.random(len(hkl)) < 0.1] = np.nan  # no flag: extended
    flags = FreeFlags(given=read_free_flags(flag_file(tmp_path / "f.mtz", theirs, label)))
    fine = reflections(2.2)
    ours = flags.numbers(fine, CELL, SPACE_GROUP)
    of = {tuple(h): n for h, n in zip(fine.tolist(), ours.tolist(), strict=True)}
    found = np.array([of[tuple(h)] for h in hkl.tolist()])
    known = np.isfinite(theirs)
    np.testing.assert_array_equal(found[known], theirs[known])
    new = np.array([of[h] for h in of.keys() - set(map(tuple, hkl.tolist()))])
    assert (new.min(), new.max()) == (0, 9)  # ten sets, as theirs
    assert abs((new == 0).mean() - 0.1) < 0.03


@pytest.mark.parametrize("test_value", [0, 1])
def test_of_two_values_the_rarer_is_the_test_set(tmp_path, test_value):
    """1 with phenix and CNS, 0 with some; written as CCP4 has it."""
    rng, hkl = np.random.default_rng(4), reflections()
    is_test = rng.random(len(hkl)) < 0.1
    theirs = np.where(is_test, test_value, 1 - test_value)
    given = read_free_flags(flag_file(tmp_path / "f.mtz", theirs, "R-free-flags"))
    ours = FreeFlags(given=given).numbers(hkl, CELL, SPACE_GROUP)
    np.testing.assert_array_equal(ours == 0, is_test)
    assert set(ours) == set(range(given.n_sets))
    assert given.n_sets == pytest.approx(10, abs=1)


def test_new_reflections_follow_the_mates_that_the_file_knows(tmp_path):
    cell, group = gemmi.UnitCell(80, 80, 100, 90, 90, 90), gemmi.SpaceGroup("P 4")
    hkl = reflections(4.0, cell, group)
    one = hkl[hkl[:, 0] > hkl[:, 1]]
    theirs = np.random.default_rng(5).integers(0, 20, len(one))
    path = flag_file(tmp_path / "f.mtz", theirs, cell=cell, space_group=group, hkl=one)
    flags = FreeFlags(given=read_free_flags(path))
    twin = one[:, [1, 0, 2]]
    twin = twin[twin[:, 0] > 0]
    kept = flags.numbers(one[:, :3], cell, group)
    np.testing.assert_array_equal(kept, theirs)
    has_twin = one[:, 1] > 0
    np.testing.assert_array_equal(flags.numbers(twin, cell, group), theirs[has_twin])


def test_flags_of_another_crystal_form_are_refused(tmp_path):
    hkl = reflections()
    flags = np.arange(len(hkl)) % 20
    given = read_free_flags(flag_file(tmp_path / "f.mtz", flags))
    given.check(gemmi.UnitCell(79.9, 79.9, 37.5, 90, 90, 90), gemmi.SpaceGroup("P 41 21 2"))
    with pytest.raises(UserError, match=r"has the cell 79.4.*the data have 85.*same crystal form"):
        given.check(gemmi.UnitCell(85, 85, 37.8, 90, 90, 90), SPACE_GROUP)
    with pytest.raises(UserError, match="space group P 43 21 2, the data have P 42;"):
        given.check(CELL, gemmi.SpaceGroup("P 42"))


@pytest.mark.parametrize(
    ("values", "label", "message"),
    [
        (0, "FreeR_flag", "no test set"),
        ([0.5, 1], "FreeR_flag", "integer flags"),
        ([0, 1], "FreeR_flag", "cannot be told"),
        ([1, 2, 3], "FreeR_flag", "of several sets 0 is the test set"),
        ([0, 1, 1, 1], "N", "one column FreeR_flag.*found none among H K L N"),
    ],
)
def test_what_is_no_test_set(tmp_path, values, label, message):
    theirs = np.resize(values, len(reflections()))
    with pytest.raises(UserError, match=message) as error:
        read_free_flags(flag_file(tmp_path / "f.mtz", theirs, label))
    assert "\n" not in str(error.value)
