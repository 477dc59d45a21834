"""Files of XDS against their raw text, gemmi, cctbx and DIALS."""

from __future__ import annotations

import gzip
import logging
import os
import warnings
from pathlib import Path

import gemmi
import numpy as np
import pytest
from simulated_unmerged import FAST

from braggflux.integrator.crystal.corrections import lp_correction
from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.mtz_observations import read_mtz
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.read import read_table
from braggflux.merge.io.sweep_columns import BEAMS, FRAME, FRAME_WIDTH, SWEEP, SWEEP_COLUMNS, ZETA
from braggflux.pipelines.cli import main

DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")
pytestmark = pytest.mark.realdata


@pytest.fixture(scope="module")
def small(shared) -> Path:
    return shared / "data" / "small"


@pytest.fixture(scope="module")
def correct(small) -> UnmergedData:
    return one(small / "xds_ascii.hkl")


@pytest.fixture(scope="module")
def iotbx(dials):
    """Readers of cctbx."""
    if DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(DEBIAN_BUILD))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import iotbx.xds.integrate_hkl
        import iotbx.xds.read_ascii
    return iotbx


def one(path) -> UnmergedData:
    (data,) = read_table([path])
    return data


def raw(path) -> np.ndarray:
    """Rows as they stand in the file."""
    return np.loadtxt(path, comments="!")


def sort(index, *columns) -> list[np.ndarray]:
    """Columns in one order that does not depend on the file's."""
    order = np.lexsort((*columns[::-1], *np.asarray(index).T))
    return [np.asarray(column)[order] for column in (index, *columns)]


def edited(path, tmp_path, *changes, name="a.HKL") -> Path:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / name).write_text(text)
    return tmp_path / name


class TestCorrect:
    def test_rows(self, small, correct):
        rows = raw(small / "xds_ascii.hkl")
        rows = rows[rows[:, 4] > 0]  # 41 of 453 are misfits
        assert (len(rows), len(correct)) == (412, 412)
        m = correct.metadata
        ours = sort(
            *(correct.miller_index, m["XDET"], m["YDET"], correct.intensity, correct.sigma),
            *(m["PEAK"], m["CORR"], m["BATCH"], m["ROT"]),
        )
        image = np.floor(rows[:, 7]) + 1
        theirs = sort(rows[:, :3], *rows[:, [5, 6, 3, 4, 9, 10]].T, image, 0.5 * rows[:, 7])
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        assert correct.space_group.xhm() == "P 43 21 2"
        assert correct.cell.parameters == pytest.approx((79.336, 79.336, 37.797, 90, 90, 90))
        assert correct.has_lp_applied

    def test_as_gemmi_makes_an_mtz_file_of_it(self, small, correct, tmp_path):
        xds = gemmi.read_xds_ascii(str(small / "xds_ascii.hkl"))
        xds.to_mtz().write_to_file(str(tmp_path / "a.mtz"))
        mtz = read_mtz(tmp_path / "a.mtz")  # FLAG leaves out the misfits
        both = []
        for data in (correct, mtz):
            m = data.metadata
            angle = sum(m[a] * m[b] for a, b in zip(BEAMS[:3], BEAMS[3:], strict=True))
            columns = (m["BATCH"], m["XDET"], data.intensity, data.sigma, m["ROT"], m[ZETA], angle)
            both.append(sort(data.miller_index, *columns))
        for a, b in zip(*both, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(
            np.sort(np.diff(np.sort(correct.metadata[FRAME]))),
            np.sort(np.diff(np.sort(mtz.metadata["ROT"] / 0.5))),
            atol=1e-3,
        )

    def test_as_cctbx_reads_it(self, small, correct, iotbx):
        with (small / "xds_ascii.hkl").open() as file:
            theirs = iotbx.xds.read_ascii.reader(file)
        index, value, sigma = (
            np.array(list(x)) for x in (theirs.miller_indices, theirs.iobs, theirs.sigma_iobs)
        )
        good = sigma > 0
        a = sort(correct.miller_index, correct.intensity, correct.sigma)
        for ours, other in zip(a, sort(index[good], value[good], sigma[good]), strict=True):
            np.testing.assert_array_equal(ours, other)

    def test_the_diffracted_beams_end_where_the_spots_are(self, correct):
        m = correct.metadata
        assert set(SWEEP_COLUMNS) <= m.keys()
        assert set(m[SWEEP]) == {0.0}
        assert set(m[FRAME_WIDTH]) == {0.5}
        np.testing.assert_allclose(m[FRAME] * 0.5, m["ROT"])  # from image 1 and 0 degrees
        s0, s1 = in_laboratory(correct, [0.999994, 0.003061, -0.001524])
        np.testing.assert_allclose(
            s0, np.tile([0.004215, -0.006992, 0.999967], (412, 1)), atol=1e-5
        )
        x = 1305.18 + 149.766 / 0.172 * s1[:, 0] / s1[:, 2]
        y = 1695.69 + 149.766 / 0.172 * s1[:, 1] / s1[:, 2]
        assert np.median(np.hypot(x - m["XDET"], y - m["YDET"])) < 0.5  # px

    def test_polarization_is_what_correct_has_applied(self, small):
        rows = raw(small / "xds_ascii.hkl")
        data = one(small / "xds_ascii.hkl")
        s0, s1 = in_laboratory(data, [0.999994, 0.003061, -0.001524])
        lorentz = np.linalg.norm(np.cross(s1, s0), axis=1) * data.metadata[ZETA]
        normal = np.cross(s0[0], np.cross([0.0, 1.0, 0.0], s0[0]))  # without its part along s0
        rlp = lorentz * lp_correction(s1, s0[0], None, normal / np.linalg.norm(normal), 0.98)
        key = {(*r[:3].astype(int), r[5], r[6]): r[8] for r in rows}
        m = data.metadata
        keys = zip(*data.miller_index.T, m["XDET"], m["YDET"], strict=True)
        theirs = np.array([key[k] for k in keys])
        np.testing.assert_allclose(rlp, theirs, rtol=5e-3)


def in_laboratory(data, axis):
    """Beams turned back to where they were measured, (N, 3) each."""
    from scipy.spatial.transform import Rotation

    axis = np.array(axis) / np.linalg.norm(axis)
    turn = Rotation.from_rotvec(np.radians(data.metadata["ROT"])[:, None] * axis)
    beams = np.stack([data.metadata[name] for name in BEAMS], axis=1)
    return turn.apply(beams[:, :3]), turn.apply(beams[:, 3:])


class TestIntegrate:
    def test_polarization_of_a_synchrotron(self, small, caplog):
        data = one(small / "integrate.hkl")
        assert "0.99" in caplog.text
        xds = gemmi.read_xds_ascii(str(small / "integrate.hkl"))
        before = np.array(xds.iobs_array)
        xds.apply_polarization_correction(0.99, gemmi.Vec3(0, 1, 0))
        position = (xds.xd_array, xds.yd_array)
        ours = sort(
            data.miller_index, data.metadata["XDET"], data.metadata["YDET"], data.intensity
        )
        theirs = sort(xds.miller_array, *position, xds.iobs_array)
        plain = sort(xds.miller_array, *position, before)
        np.testing.assert_array_equal(ours[0], theirs[0])
        # gemmi takes the beams from the orientation, which is 0.4 degrees off in this file
        np.testing.assert_allclose(ours[-1] / plain[-1], theirs[-1] / plain[-1], rtol=0.02)
        assert 0.9 < np.median(ours[-1] / plain[-1]) < 0.97  # near the diagonal of the detector

    def test_in_house_the_beam_is_unpolarized(self, small, tmp_path):
        path = edited(
            small / "integrate.hkl", tmp_path, ("WAVELENGTH=  1.892", "WAVELENGTH= 1.5418")
        )
        data, rows = one(path), raw(small / "integrate.hkl")
        np.testing.assert_array_equal(np.sort(data.intensity), np.sort(rows[:, 3]))

    def test_places_and_beams(self, small, iotbx):
        data, theirs = one(small / "integrate.hkl"), iotbx.xds.integrate_hkl.reader()
        theirs.read_file(str(small / "integrate.hkl"))
        m = data.metadata
        xyz = np.array(theirs.xyzcal)
        a = sort(
            data.miller_index, m["XDET"], m["YDET"], m["BATCH"], m["ROT"], m["MAXC"], m["CORR"]
        )
        b = sort(
            *(theirs.hkl, *xyz[:, :2].T, np.floor(xyz[:, 2]) + 1, 0.5 * xyz[:, 2]),
            *(theirs.maxc, theirs.corr),
        )
        for ours, other in zip(a, b, strict=True):
            np.testing.assert_allclose(ours, other)
        s0, s1 = in_laboratory(data, [0.999994, 0.003006, 0.001792])
        d = np.array([data.cell.calculate_d(h) for h in data.miller_index.tolist()])
        np.testing.assert_allclose(np.linalg.norm(s1 - s0, axis=1), 1.892 / d, rtol=2e-3)
        assert np.median(s1[:, 0] * (m["XDET"] - 1308.86) > 0) == 1  # on the side of the spot


def xscale(path, tmp_path, second=""):
    """File of XSCALE with the rows of one of CORRECT as two sets in turn."""
    _, _, body = path.read_text().partition("!END_OF_HEADER\n")
    cell = "79.336    79.336    37.797  90.000  90.000  90.000"
    lines = [
        "!FORMAT=XDS_ASCII    MERGE=FALSE    FRIEDEL'S_LAW=FALSE",
        "!OUTPUT_FILE=a.ahkl        DATE=14-Sep-2022",
        "!Generated by XSCALE   (VERSION Jan 10, 2022  BUILT=20220820)",
        "!SPACE_GROUP_NUMBER=   96",
        f"!UNIT_CELL_CONSTANTS=    {cell}",
        "! ISET=   1 INPUT_FILE=../a b/XDS_ASCII.HKL",
        "! ISET=   1 X-RAY_WAVELENGTH=  1.892000",
        f"! ISET=   1 UNIT_CELL_CONSTANTS=    {cell}",
        "! ISET=   2 INPUT_FILE=b/XDS_ASCII.HKL",
        f"! ISET=   2 X-RAY_WAVELENGTH=  {second or '1.892000'}",
        f"! ISET=   2 UNIT_CELL_CONSTANTS=    {cell}",
        "!NUMBER_OF_ITEMS_IN_EACH_DATA_RECORD=10",
    ]
    names = ("H", "K", "L", "IOBS", "SIGMA(IOBS)", "XD", "YD", "ZD", "PSI", "ISET")
    lines += [f"!ITEM_{name}={i + 1}" for i, name in enumerate(names)]
    rows = [line.split() for line in body.splitlines() if not line.startswith("!")]
    lines += ["!END_OF_HEADER"]
    lines += [" ".join([*r[:8], r[11], str(1 + i % 2)]) for i, r in enumerate(rows)]
    (tmp_path / "scaled.ahkl").write_text("\n".join([*lines, "!END_OF_DATA", ""]))
    return tmp_path / "scaled.ahkl"


class TestXscale:
    def test_sets_of_one_wavelength_are_one_dataset(self, small, tmp_path, correct):
        data = one(xscale(small / "xds_ascii.hkl", tmp_path))
        assert len(data) == len(correct)
        batch = data.metadata["BATCH"]
        rows = raw(small / "xds_ascii.hkl")
        image, is_first = np.floor(rows[:, 7]) + 1, np.arange(len(rows)) % 2 == 0
        good = rows[:, 4] > 0
        expected = np.concatenate([image[good & is_first], image[good & ~is_first] + 2000])
        np.testing.assert_array_equal(np.sort(batch), np.sort(expected))

    def test_sets_of_two_wavelengths_are_two(self, small, tmp_path):
        first, second = read_table([xscale(small / "xds_ascii.hkl", tmp_path, "0.9790")])
        good = raw(small / "xds_ascii.hkl")[:, 4] > 0
        assert (len(first), len(second)) == (good[::2].sum(), good[1::2].sum())
        assert first.name != second.name


class TestWays:
    def test_line_ends_compression_and_names(self, small, tmp_path, correct):
        content = (small / "xds_ascii.hkl").read_bytes()
        (tmp_path / "a.HKL").write_bytes(content.replace(b"\n", b"\r\n"))
        (tmp_path / "b.HKL.gz").write_bytes(gzip.compress(content))
        (tmp_path / "c.ahkl").write_bytes(content)
        for name in ("a.HKL", "b.HKL.gz", "c.ahkl"):
            data = one(tmp_path / name)
            np.testing.assert_array_equal(data.intensity, correct.intensity)
            assert data.name == name[0]

    def test_scan_that_begins_later(self, small, tmp_path, correct):
        """The same photographs numbered from 201: the image number moves, nothing else does."""
        lines = (small / "xds_ascii.hkl").read_text().splitlines()
        moved = []
        for line in lines:
            if not line.startswith("!"):
                words = line.split()
                words[7] = f"{float(words[7]) + 200:.1f}"
                line = " ".join(words)
            line = line.replace("STARTING_FRAME=       1", "STARTING_FRAME=     201")
            moved.append(line.replace("=       1    1439", "=     201    1639"))
        (tmp_path / "a.HKL").write_text("\n".join(moved) + "\n")
        data = one(tmp_path / "a.HKL")
        for name, column in correct.metadata.items():
            shift = 200 if name == "BATCH" else 0
            np.testing.assert_allclose(data.metadata[name], column + shift, atol=1e-9)

    def test_rhombohedral_axes(self, small, tmp_path):
        path = edited(small / "xds_ascii.hkl", tmp_path, ("NUMBER=   96", "NUMBER=  146"))
        cell = " 80.000    80.000    80.000  85.000  85.000  85.000"
        text = path.read_text().replace(
            "  79.336    79.336    37.797  90.000  90.000  90.000", cell
        )
        path.write_text(text)
        assert one(path).space_group.xhm() == "R 3:R"

    def test_friedels_law_is_said(self, small, tmp_path, caplog):
        one(edited(small / "xds_ascii.hkl", tmp_path, ("LAW=FALSE", "LAW=TRUE")))
        assert "FRIEDEL'S_LAW=TRUE" in caplog.text

    def test_wrong_orientation_is_not_used(self, small, tmp_path, caplog):
        path = edited(small / "xds_ascii.hkl", tmp_path, ("AXIS=  0.999994", "AXIS= -0.999994"))
        assert SWEEP not in one(path).metadata
        assert "orientation" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("MERGE=FALSE", "MERGE=TRUE")], "merged (MERGE=TRUE)"),
        ([("!END_OF_DATA\n", "")], "ends before !END_OF_DATA"),
        ([("NUMBER=   96", "NUMBER=    0")], "--space-group"),
        ([("!UNIT_CELL_CONSTANTS=", "!UNIT_CELL=")], "does not say its cell"),
        ([("3.047E+00  5.176E-01", "3.047E+00")], "cannot be read"),
        ([("3.047E+00", "*********")], "cannot be read"),
        ([("!ITEM_PSI=12\n", "")], "12 columns where its header names 11"),
        ([("!ITEM_ZD=8", "!ITEM_Z=8")], "no column ZD"),
        ([("!OSCILLATION_RANGE=  0.500000", "!OSCILLATION_RANGE=  ?")], "OSCILLATION_RANGE"),
        ([("!END_OF_HEADER\n", "")], "within its header"),
    ],
)
def test_refused(small, tmp_path, changes, words):
    path = edited(small / "xds_ascii.hkl", tmp_path, *changes)
    with pytest.raises(UserError) as caught:
        read_table([path])
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


def test_info_of_misfits(small, caplog):
    with caplog.at_level(logging.INFO):
        one(small / "xds_ascii.hkl")
    assert "41 misfits" in caplog.text


@pytest.mark.slow
def test_merge_writes_the_wavelength_and_convert_a_store(small, tmp_path):
    source = str(small / "xds_ascii.hkl")
    assert main(["merge", source, "--out", str(tmp_path / "m"), "--anomalous", *FAST]) == 0
    merged = gemmi.read_mtz_file(str(tmp_path / "m" / "merged.mtz"))
    assert merged.datasets[-1].wavelength == pytest.approx(1.892, abs=1e-6)
    assert merged.spacegroup.xhm() == "P 43 21 2"
    assert main(["convert", source, "--out", str(tmp_path / "a.h5")]) == 0
    (store,) = read_table([tmp_path / "a.h5"])
    assert (len(store), store.labels.wavelength) == (412, 1.892)
