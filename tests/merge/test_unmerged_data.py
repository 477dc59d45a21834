"""Unmerged MTZ files of several programs, and what is done to observations before merging."""

from __future__ import annotations

import warnings
from dataclasses import replace

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal.forms import check_one_crystal_form, typical_cell
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.mtz_observations import read_mtz
from braggflux.merge.io.observations import UnmergedData, combine_friedel
from braggflux.merge.io.read import read_table
from braggflux.merge.io.reindexing import reindex

CELL = gemmi.UnitCell(79.0, 79.0, 38.0, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 43 21 2")
COLUMNS = (("M/ISYM", "Y"), ("BATCH", "B"), ("I", "J"), ("SIGI", "Q"), ("XDET", "R"))


def write_mtz(path, rows, columns=COLUMNS, *, to_asu=True, space_group=SPACE_GROUP):
    """Write rows (h, k, l, *columns) with indices as observed."""
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup = space_group
    mtz.set_cell_for_all(CELL)
    mtz.add_dataset("data")
    for label, kind in columns:
        mtz.add_column(label, kind)
    mtz.set_data(np.asarray(rows, dtype=np.float32))
    if to_asu:
        mtz.switch_to_asu_hkl()
    mtz.write_to_file(str(path))
    return path


def random_rows(n=200, n_batches=7, seed=1):
    rng = np.random.default_rng(seed)
    index = rng.integers(-12, 13, (n, 3))
    index[(index == 0).all(axis=1)] = 1
    batch = rng.integers(3, 3 + n_batches, n)
    intensity, sigma = rng.normal(50, 30, n), rng.uniform(1, 5, n)
    return np.column_stack([index, np.ones(n), batch, intensity, sigma, rng.uniform(0, 9, n)])


def make(index, image=None, name="data", cell=CELL, space_group=SPACE_GROUP, **metadata):
    index = np.asarray(index, dtype=np.int32)
    n = len(index)
    return UnmergedData(
        miller_index=index,
        intensity=np.arange(1.0, n + 1),
        sigma=np.ones(n),
        image=np.zeros(n, dtype=np.int64) if image is None else np.asarray(image, dtype=np.int64),
        wavelength=None,
        metadata={key: np.asarray(value, dtype=float) for key, value in metadata.items()},
        cell=cell,
        space_group=space_group,
        name=name,
    )


class TestMtz:
    def test_rows_come_back_as_observed_and_sorted_by_image(self, tmp_path):
        rows = random_rows()
        data = read_mtz(write_mtz(tmp_path / "a.mtz", rows))
        order = np.argsort(rows[:, 4], kind="stable")
        np.testing.assert_array_equal(data.miller_index, rows[order, :3])
        np.testing.assert_allclose(data.intensity, rows[order, 5], rtol=1e-6)
        np.testing.assert_allclose(data.sigma, rows[order, 6], rtol=1e-6)
        np.testing.assert_array_equal(data.image, rows[order, 4] - 3)
        np.testing.assert_array_equal(data.metadata["BATCH"], rows[order, 4])
        np.testing.assert_allclose(data.metadata["XDET"], rows[order, 7], rtol=1e-6)
        assert data.metadata.keys() == {"BATCH", "XDET"}
        assert (data.n_images, data.name, data.wavelength) == (7, "a", None)
        np.testing.assert_array_equal(np.diff(data.image_starts), np.bincount(data.image))

    def test_image_numbers_have_no_holes(self, tmp_path):
        rows = random_rows()
        rows = rows[rows[:, 4] != 5]
        assert read_mtz(write_mtz(tmp_path / "a.mtz", rows)).n_images == 6

    def test_profile_fitted_intensities_are_preferred(self, tmp_path):
        columns = (*COLUMNS, ("IPR", "J"), ("SIGIPR", "Q"))
        rows = np.column_stack([random_rows(), np.arange(200.0), np.full(200, 3.0)])
        data = read_mtz(write_mtz(tmp_path / "a.mtz", rows, columns))
        assert set(data.intensity) == set(range(200))
        assert np.all(data.sigma == 3.0)
        assert {"I", "SIGI"} <= data.metadata.keys()

    def test_names_of_other_programs(self, tmp_path):
        columns = (("M/ISYM", "Y"), ("image", "B"), ("Iobs", "J"), ("SigIobs", "Q"), ("x", "R"))
        data = read_mtz(write_mtz(tmp_path / "a.mtz", random_rows(), columns))
        assert data.metadata.keys() == {"x", "BATCH"}
        assert np.all(data.sigma >= 1.0)

    def test_bad_rows_are_left_out(self, tmp_path):
        rows = random_rows()
        rows[:3, 6] = 0.0, -1.0, np.nan
        rows[3, 5] = np.nan
        data = read_mtz(write_mtz(tmp_path / "a.mtz", rows))
        assert len(data) == 196
        assert np.isfinite(data.intensity).all()
        assert (data.sigma > 0).all()

    @pytest.mark.realdata
    @pytest.mark.parametrize(
        ("name", "lp"),
        [("thermolysin_xfel/friedel_minus_n395", False), ("pyp_laue/off_iso_uc", False)],
    )
    def test_real_files_against_reciprocalspaceship(self, shared, name, lp):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas, of its optional packages
            import reciprocalspaceship as rs
        path = shared / "data" / f"{name}.mtz"
        data = read_mtz(path)
        theirs = rs.read_mtz(str(path)).reset_index()  # as observed
        theirs = theirs.sort_values("BATCH", kind="stable")
        np.testing.assert_array_equal(data.miller_index, theirs[["H", "K", "L"]])
        np.testing.assert_array_equal(data.intensity, theirs["I"].to_numpy(float))
        np.testing.assert_array_equal(data.sigma, theirs["SigI"].to_numpy(float))
        np.testing.assert_array_equal(data.image, theirs["BATCH"].to_numpy(int))
        for label, column in data.metadata.items():
            np.testing.assert_array_equal(column, theirs[label].to_numpy(float))
        assert data.has_lp_applied is lp

    @pytest.mark.realdata
    def test_laue_files_have_a_wavelength_for_each_observation(self, shared):
        data = read_mtz(shared / "data" / "pyp_laue" / "2ms_iso_uc.mtz")
        assert (len(data), data.n_images) == (48_055, 20)
        assert data.is_polychromatic
        assert 1.0 < data.wavelength.min() < data.wavelength.max() < 1.2
        assert data.metadata.keys() == {"X", "Y", "BATCH"}

    def test_xds_files_as_gemmi_converts_them(self, tmp_path):
        header = [
            "!FORMAT=XDS_ASCII    MERGE=FALSE    FRIEDEL'S_LAW=FALSE",
            "!Generated by XDS_ASCII",
            "!SPACE_GROUP_NUMBER=   96",
            "!UNIT_CELL_CONSTANTS=    79.000    79.000    38.000  90.000  90.000  90.000",
            "!STARTING_FRAME=  1",
            "!ROTATION_AXIS=  1.0  0.0  0.0",
            "!OSCILLATION_RANGE=  0.5",
            "!STARTING_ANGLE=  0.0",
            "!X-RAY_WAVELENGTH=  1.03",
            "!INCIDENT_BEAM_DIRECTION=  0.0  0.0  0.97",
            "!NUMBER_OF_ITEMS_IN_EACH_DATA_RECORD=13",
        ]
        names = "H K L IOBS SIGMA(IOBS) XD YD ZD RLP PEAK CORR MAXC PSI"
        header += [f"!ITEM_{name}={i}" for i, name in enumerate(names.split(), 1)]
        rows = [
            "3 -2 5 100.0 4.0 10.0 20.0 0.4 0.3 100 30 9 0",
            "-3 2 -5 90.0 3.0 11.0 21.0 1.4 0.3 100 30 9 0",
            "1 1 4 80.0 -3.0 12.0 22.0 1.6 0.3 100 30 9 0",  # a misfit
        ]
        ascii_file = tmp_path / "XDS_ASCII.HKL"
        ascii_file.write_text("\n".join([*header, "!END_OF_HEADER", *rows, "!END_OF_DATA", ""]))
        mtz = gemmi.read_xds_ascii(str(ascii_file)).to_mtz()
        mtz.write_to_file(str(tmp_path / "xds.mtz"))
        data = read_mtz(tmp_path / "xds.mtz")
        np.testing.assert_array_equal(data.miller_index, [[3, -2, 5], [-3, 2, -5]])
        np.testing.assert_allclose(data.intensity, [100, 90])
        assert data.has_lp_applied


class TestPartials:
    COLUMNS = (*COLUMNS, ("FRACTIONCALC", "R"))

    def rows(self):
        """Fulls and partials: (h, k, l, M/ISYM, BATCH, I, SIGI, XDET, FRACTIONCALC)."""
        return [
            [3, -2, 5, 1, 1, 100.0, 4.0, 1.0, 1.0],
            [4, -2, 5, 257, 1, 30.0, 3.0, 2.0, 0.3],
            [4, -2, 5, 257, 2, 70.0, 4.0, 3.0, 0.7],
            [4, -2, 5, 1, 3, 55.0, 4.0, 3.0, 1.0],  # the same index, recorded fully
            [-4, 2, -5, 257, 2, 20.0, 3.0, 4.0, 0.5],  # the Friedel mate, another reflection
            [-4, 2, -5, 257, 3, 25.0, 3.0, 4.0, 0.49],
            [5, -2, 5, 257, 1, 30.0, 3.0, 5.0, 0.4],  # incomplete
            [6, 1, 2, 257, 1, 12.0, 3.0, 6.0, 0.5],  # parts of two crossings
            [6, 1, 2, 257, 9, 13.0, 3.0, 6.0, 0.5],
        ]

    def test_parts_are_summed_over_neighbouring_images(self, tmp_path):
        data = read_mtz(write_mtz(tmp_path / "a.mtz", self.rows(), self.COLUMNS))
        found = {
            (*h, round(b)): (i, s, f)
            for h, b, i, s, f in zip(
                data.miller_index.tolist(),
                data.metadata["BATCH"],
                data.intensity,
                data.sigma,
                data.metadata["FRACTIONCALC"],
                strict=True,
            )
        }
        expected = {
            (3, -2, 5, 1): (100.0, 4.0, 1.0),
            (4, -2, 5, 2): (100.0, 5.0, 1.0),
            (4, -2, 5, 3): (55.0, 4.0, 1.0),
            (-4, 2, -5, 2): (45.0, np.sqrt(18.0), 0.99),
        }
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert found[key] == pytest.approx(values, rel=1e-6)

    def test_a_bad_part_spoils_the_whole(self, tmp_path):
        rows = self.rows()
        rows[1][6] = 0.0
        data = read_mtz(write_mtz(tmp_path / "a.mtz", rows, self.COLUMNS))
        assert len(data) == 3

    def test_without_fractions_they_are_refused(self, tmp_path):
        path = write_mtz(tmp_path / "a.mtz", [row[:-1] for row in self.rows()])
        with pytest.raises(UserError, match=r"7 partials but no FRACTIONCALC"):
            read_mtz(path)

    def test_what_aimless_has_summed_is_left_alone(self, tmp_path):
        rows = [[*row, 2.0] for row in self.rows()]
        path = write_mtz(tmp_path / "a.mtz", rows, (*self.COLUMNS, ("NPART", "I")))
        assert len(read_mtz(path)) == len(rows)


class TestRefused:
    def check(self, path, *words):
        with pytest.raises(UserError) as caught:
            read_table([path])
        message = str(caught.value)
        assert "\n" not in message
        assert str(path) in message
        for word in words:
            assert word in message

    def test_merged(self, tmp_path):
        rows = random_rows()[:, [0, 1, 2, 5, 6]]
        path = write_mtz(tmp_path / "a.mtz", rows, (("IMEAN", "J"), ("SIGIMEAN", "Q")))
        self.check(path, "merged", "no BATCH", "IMEAN")

    def test_no_intensity_column(self, tmp_path):
        columns = (("M/ISYM", "Y"), ("BATCH", "B"), ("F", "F"), ("SIGF", "Q"), ("XDET", "R"))
        path = write_mtz(tmp_path / "a.mtz", random_rows(), columns)
        self.check(path, "no intensity column", "SIGF")

    def test_no_sigma_column(self, tmp_path):
        columns = (("M/ISYM", "Y"), ("BATCH", "B"), ("I", "J"), ("ROT", "R"), ("XDET", "R"))
        self.check(write_mtz(tmp_path / "a.mtz", random_rows(), columns), "SIGI")

    @pytest.mark.parametrize(
        ("sigma", "words"),
        [(0.0, "all 200 sigmas are 0"), (np.nan, "none of the 200 sigmas"), (-1.0, "none of 200")],
    )
    def test_useless_sigmas(self, tmp_path, sigma, words):
        rows = random_rows()
        rows[:, 6] = sigma
        self.check(write_mtz(tmp_path / "a.mtz", rows), words)

    @pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
    def test_truncated(self, tmp_path, fraction):
        path = write_mtz(tmp_path / "a.mtz", random_rows())
        content = path.read_bytes()
        path.write_bytes(content[: int(fraction * len(content))])
        self.check(path, "not a complete MTZ file")

    def test_missing_and_unknown(self, tmp_path):
        self.check(tmp_path / "none.mtz", "does not exist")
        (tmp_path / "a.hkl").touch()
        self.check(tmp_path / "a.hkl", ".stream")


class TestFriedel:
    @pytest.mark.realdata
    def test_thermolysin(self, shared):
        folder = shared / "data" / "thermolysin_xfel"
        halves = read_table([folder / f"friedel_{m}_n395.mtz" for m in ("plus", "minus")])
        both = combine_friedel(*halves)
        assert (len(both), both.n_images, both.name) == (75_619 + 60_689, 395, "friedel_n395")
        asu = ReciprocalAsu(both.cell, both.space_group, 1.6, anomalous=True)
        acentric = ~asu.is_centric
        for half, sign in zip(halves, (1, -1), strict=True):
            rows = asu.refl_id(half.miller_index)
            assert np.all(asu.friedel_sign[rows[acentric[rows]]] == sign)
        # the same image is one image
        for image in (0, 200, 394):
            n = sum(np.count_nonzero(h.metadata["BATCH"] == image) for h in halves)
            assert np.count_nonzero(both.image == image) == n

    def test_a_minus_file_stored_as_plus_gives_the_same(self, tmp_path):
        plus = make([[3, 1, 2], [4, 1, 2]], image=[0, 1], BATCH=[5, 9], name="p", x=[1, 2])
        minus = make([[-3, -1, -2], [-5, -2, -3]], image=[0, 1], BATCH=[7, 9], name="m", y=[1, 2])
        both = combine_friedel(plus, minus)
        flipped = replace(minus, miller_index=-minus.miller_index)
        np.testing.assert_array_equal(
            combine_friedel(plus, flipped).miller_index, both.miller_index
        )
        np.testing.assert_array_equal(both.image, [0, 1, 2, 2])
        assert both.metadata.keys() == {"BATCH"}
        assert both.name == "p"

    def test_a_file_with_both_mates_is_refused(self):
        plus = make([[3, 1, 2], [-4, -1, -2]], name="p")
        with pytest.raises(UserError, match=r"1 observations of F\(\+\) and 1 of its Friedel"):
            combine_friedel(plus, make([[-3, -1, -2]], name="m"))


class TestReindex:
    @pytest.mark.parametrize("operator", ["k,h,-l", "-h,-k,l", "h+k,-h,l", "l,h,k"])
    def test_indices_and_cell_as_gemmi(self, operator):
        cell = gemmi.UnitCell(50, 60, 70, 81, 92, 103)
        index = np.random.default_rng(0).integers(-9, 10, (50, 3))
        group = gemmi.SpaceGroup("P 1")
        data = reindex(make(index, cell=cell, space_group=group), operator)
        op = gemmi.Op(operator)
        np.testing.assert_array_equal(
            data.miller_index, [op.apply_to_hkl(h) for h in index.tolist()]
        )
        before = [cell.calculate_d(h) for h in index.tolist()]
        after = [data.cell.calculate_d(h) for h in data.miller_index.tolist()]
        np.testing.assert_allclose(after, before, rtol=1e-9)

    @pytest.mark.parametrize(
        "operator", ["k,h", "k,h,l", "2h,k,l", "h/2,2k,l", "x,y,z", "h,k,l+1", ""]
    )
    def test_refused(self, operator):
        with pytest.raises(UserError, match="reindexing operator"):
            reindex(make([[1, 2, 3]]), operator)

    def test_an_operator_of_another_lattice_is_refused(self):
        with pytest.raises(UserError, match=r"unfit for P 43 21 2"):
            reindex(make([[1, 2, 3]]), "l,h,k")

    @pytest.mark.parametrize(
        ("group", "cell", "operator", "is_kept"),
        [
            ("P 63", (60, 60, 80, 90, 90, 120), "k,h,-l", True),
            ("P 21 21 21", (40, 50, 60, 90, 90, 90), "k,l,h", True),
            ("P 21 21 2", (40, 50, 60, 90, 90, 90), "k,h,-l", True),
            # the axis without screw, the unique axis, the three-fold axis go elsewhere
            ("P 21 21 2", (40, 50, 60, 90, 90, 90), "k,l,h", False),
            ("P 1 21 1", (40, 50, 60, 90, 90, 90), "k,l,h", False),
            ("C 2 2 21", (40, 40, 40, 90, 90, 90), "k,l,h", False),
        ],
    )
    def test_the_space_group_must_stay(self, group, cell, operator, is_kept):
        data = make(
            [[1, 2, 3]], cell=gemmi.UnitCell(*cell), space_group=gemmi.SpaceGroup(group), name="x"
        )
        if is_kept:
            assert reindex(data, operator).space_group.xhm() == group
            return
        with pytest.raises(UserError, match=f"away from where {group} has them"):
            reindex(data, operator)


class TestCells:
    def test_one_crystal_form(self):
        data = [make([[1, 2, 3]], name="a"), make([[1, 2, 3]], name="b")]
        check_one_crystal_form(data)
        other = replace(data[1], cell=gemmi.UnitCell(79, 79, 39.5, 90, 90, 90))
        with pytest.raises(UserError, match=r"cells of a .*38.00.* and b .*39.50"):
            check_one_crystal_form([data[0], other])
        check_one_crystal_form([data[0], other], tolerance=0.05)
        other = replace(data[1], space_group=gemmi.SpaceGroup("P 41 21 2"))
        with pytest.raises(UserError, match="P 41 21 2"):
            check_one_crystal_form([data[0], other])

    @pytest.mark.parametrize(
        ("name", "cell"),
        [
            ("P 61 2 2", (93, 93.3, 130, 90.1, 89.9, 120.2)),
            ("R 3:R", (60, 60.2, 59.9, 80.1, 80, 79.8)),
            ("C 1 2 1", (60, 70, 80, 90.2, 110, 89.9)),
            ("F 4 3 2", (60, 60.2, 59.9, 90.1, 90, 89.8)),
            ("P 1", (60, 70, 80, 81, 92, 103)),
        ],
    )
    def test_typical_cell_obeys_the_symmetry(self, name, cell):
        group = gemmi.SpaceGroup(name)
        typical = typical_cell([cell, cell, np.array(cell) * 1.2], group)
        assert typical.is_compatible_with_spacegroup(group, eps=1e-9)
        np.testing.assert_allclose(typical.parameters, cell, rtol=5e-3)


def test_rows_must_fit_together():
    with pytest.raises(ValueError, match="sorted by image"):
        make([[1, 2, 3], [1, 2, 4]], image=[1, 0])
    with pytest.raises(ValueError, match="sorted by image"):
        make([[1, 2, 3]], image=[-1])
    with pytest.raises(ValueError, match="x"):
        make([[1, 2, 3]], x=[1, 2])


def test_select_keeps_image_numbers():
    data = make([[1, 2, 3], [1, 2, 4], [1, 2, 5]], image=[0, 1, 1], x=[1, 2, 3])
    part = data.select(data.metadata["x"] > 1)
    np.testing.assert_array_equal(part.image, [1, 1])
    np.testing.assert_array_equal(part.intensity, [2, 3])
    np.testing.assert_array_equal(part.image_starts, [0, 0, 2])
