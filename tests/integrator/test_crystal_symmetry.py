"""Symmetry over all tabulated settings, against gemmi's scalar code and reciprocalspaceship."""

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal import symmetry
from braggflux.integrator.crystal.cell import d_spacing, inv_d2
from braggflux.integrator.crystal.reciprocal_asu import MANY_INDICES, ReciprocalAsu
from braggflux.integrator.errors import UserError

SETTINGS = [sg.xhm() for sg in gemmi.spacegroup_table()]  # 230 groups, 564 settings
REFERENCE_SETTINGS = [sg.xhm() for sg in gemmi.spacegroup_table_itb()]
TRICLINIC = gemmi.UnitCell(51.3, 62.7, 44.1, 81.0, 97.5, 112.4)


def hkl_cube(n: int) -> np.ndarray:
    side = np.arange(-n, n + 1)
    return np.stack(np.meshgrid(side, side, side, indexing="ij"), -1).reshape(-1, 3).astype("i4")


def compatible_cell(space_group: gemmi.SpaceGroup) -> gemmi.UnitCell:
    """A generic metric averaged over the group's rotations: obeys any setting's restrictions."""
    metric = np.array([[1600.0, 260.0, -190.0], [260.0, 2500.0, 330.0], [-190.0, 330.0, 3600.0]])
    averaged = np.zeros((3, 3))
    for op in space_group.operations().sym_ops:
        rotation = np.array(op.rot) / gemmi.Op.DEN
        averaged += rotation.T @ metric @ rotation
    averaged /= len(space_group.operations().sym_ops)
    lengths = np.sqrt(np.diag(averaged))
    cosines = averaged / np.outer(lengths, lengths)
    angles = np.degrees(np.arccos([cosines[1, 2], cosines[0, 2], cosines[0, 1]]))
    return gemmi.UnitCell(*lengths, *angles)


def test_to_asu_equals_gemmi_one_by_one_in_every_setting():
    cube = hkl_cube(2)
    for name in SETTINGS:
        space_group = gemmi.SpaceGroup(name)
        operations, asu = space_group.operations(), gemmi.ReciprocalAsu(space_group)
        expected = [asu.to_asu(list(map(int, hkl)), operations) for hkl in cube]
        mapping = symmetry.to_asu(cube, space_group)
        np.testing.assert_array_equal(mapping.miller_index, [e[0] for e in expected], name)
        np.testing.assert_array_equal(mapping.isym, [e[1] for e in expected], name)
        np.testing.assert_array_equal(
            symmetry.from_asu(mapping.miller_index, mapping.isym, space_group), cube, name
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # pandas about the versions of its helpers
def test_symmetry_flags_equal_reciprocalspaceship():
    utils = pytest.importorskip("reciprocalspaceship.utils")
    cube = hkl_cube(4)
    cube = cube[np.any(cube != 0, axis=1)]
    for name in REFERENCE_SETTINGS:
        space_group = gemmi.SpaceGroup(name)
        index, isym = utils.hkl_to_asu(cube, space_group)
        mapping = symmetry.to_asu(cube, space_group)
        np.testing.assert_array_equal(mapping.miller_index, index, name)
        np.testing.assert_array_equal(mapping.isym, isym, name)
        np.testing.assert_array_equal(
            symmetry.is_centric(cube, space_group), utils.is_centric(cube, space_group), name
        )
        absent = utils.is_absent(cube, space_group)
        np.testing.assert_array_equal(symmetry.is_absent(cube, space_group), absent, name)
        present = cube[~absent]
        for centring in (False, True):
            np.testing.assert_array_equal(
                symmetry.epsilon(present, space_group, centring=centring),
                utils.compute_structurefactor_multiplicity(
                    present, space_group, include_centering=centring
                ),
                name,
            )


def test_equivalents_share_resolution_in_every_setting():
    cube = hkl_cube(3)
    for name in SETTINGS:
        space_group = gemmi.SpaceGroup(name)
        cell = compatible_cell(space_group)
        mapped = symmetry.to_asu(cube, space_group).miller_index
        np.testing.assert_allclose(inv_d2(mapped, cell), inv_d2(cube, cell), rtol=1e-9, atol=1e-15)


def test_inv_d2_equals_gemmi():
    cube = hkl_cube(5)
    np.testing.assert_allclose(
        inv_d2(cube, TRICLINIC),
        [TRICLINIC.calculate_1_d2(hkl.tolist()) for hkl in cube],
        rtol=1e-12,
    )
    assert d_spacing([0, 0, 0], TRICLINIC) == np.inf
    assert d_spacing([3, -1, 2], TRICLINIC) == pytest.approx(TRICLINIC.calculate_d([3, -1, 2]))


@pytest.mark.parametrize("bad", [np.zeros(3, int), np.zeros((4, 2), int), [[0.5, 0.0, 1.0]]])
def test_miller_index_of_wrong_shape_or_type_is_refused(bad):
    with pytest.raises(ValueError, match="Miller indices must"):
        symmetry.as_miller_index(bad)


@pytest.mark.slow
@pytest.mark.parametrize("anomalous", [False, True])
def test_reciprocal_asu_in_every_setting(anomalous):
    """Each observable index of a cube has one row, shared exactly by its equivalents."""
    cube = hkl_cube(4)
    for name in SETTINGS:
        space_group = gemmi.SpaceGroup(name)
        cell = compatible_cell(space_group)
        d_min = 12.1
        table = ReciprocalAsu(cell, space_group, d_min, anomalous)
        operations = space_group.operations()
        row = table.refl_id(cube)
        # many are looked up in another way
        many = np.tile(cube, (MANY_INDICES // len(cube) + 1, 1))
        np.testing.assert_array_equal(table.refl_id(many)[-len(cube) :], row, name)

        d = d_spacing(cube, cell)
        observable = (d >= d_min) & ~operations.systematic_absences(cube) & np.isfinite(d)
        np.testing.assert_array_equal(row >= 0, observable, name)
        assert set(row[row >= 0]) == set(range(len(table))), name  # the cube covers the sphere
        np.testing.assert_array_equal(table.refl_id(table.miller_index), np.arange(len(table)))

        for op in operations.sym_ops:
            equivalent = cube @ (np.array(op.rot) // gemmi.Op.DEN)
            np.testing.assert_array_equal(table.refl_id(equivalent), row, name)
        mate = np.where(row >= 0, table.friedel_mate[row], -1)
        np.testing.assert_array_equal(table.refl_id(-cube), mate, name)

        shared = table.friedel_mate == np.arange(len(table))
        np.testing.assert_array_equal(shared, table.is_centric | (not anomalous), name)
        np.testing.assert_array_equal(
            table.friedel_mate[table.friedel_mate], np.arange(len(table))
        )
        np.testing.assert_array_equal(
            table.is_centric,
            [operations.is_reflection_centric(h.tolist()) for h in table.asu_index],
        )
        np.testing.assert_array_equal(
            table.epsilon,
            [operations.epsilon_factor_without_centering(h.tolist()) for h in table.asu_index],
        )
        assert symmetry.is_in_asu(table.asu_index, space_group).all(), name


def test_reciprocal_asu_of_lysozyme_has_the_number_of_gemmi():
    cell, space_group = gemmi.UnitCell(79.4, 79.4, 37.8, 90, 90, 90), gemmi.SpaceGroup("P43212")
    unique = ReciprocalAsu(cell, space_group, 2.0, anomalous=False)
    split = ReciprocalAsu(cell, space_group, 2.0, anomalous=True)
    assert len(unique) == gemmi.count_reflections(cell, space_group, 2.0)
    assert len(split) == 2 * len(unique) - unique.is_centric.sum()
    assert split.d.min() >= 2.0
    assert split.refl_id([[0, 0, 1], [200, 0, 0], [0, 0, 0]]).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("d_min", [0.0, -1.0, float("nan"), 1000.0, 1e-3, 1e-300])
def test_reciprocal_asu_refuses_useless_resolution(d_min):
    with pytest.raises(UserError, match="d_min"):
        ReciprocalAsu(TRICLINIC, gemmi.SpaceGroup("P1"), d_min, anomalous=True)
