"""Unmerged files of SCALEPACK, written by cctbx."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import gemmi
import numpy as np
import pytest
from simulated_unmerged import FAST

from braggflux.integrator.errors import UserError
from braggflux.merge.io.read import read_table
from braggflux.pipelines import cli
from braggflux.pipelines.inputs.inputs import parse_unit_cell

DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")
CELL = gemmi.UnitCell(79.3, 79.3, 37.8, 90, 90, 90)
#: Every column at its full width: nothing separates the numbers.
CONTENT = """    8 p43212
  1  0  0  0  1  0  0  0  1
  0  0  0
 -1  0  0  0 -1  0  0  0  1
  0  0  6
  0 -1  0  1  0  0  0  0  1
  6  6  9
  0  1  0 -1  0  0  0  0  1
  6  6  3
 -1  0  0  0  1  0  0  0 -1
  6  6  9
  1  0  0  0 -1  0  0  0 -1
  6  6  3
  0  1  0  1  0  0  0  0 -1
  0  0  0
  0 -1  0 -1  0  0  0  0 -1
  0  0  6
-101-102-103 102 101 103 12341 0 0  1123456.7 12345.6
   1   2   3   2   1   3     2 1 0  2   -91.7     8.2
   4   1   0   4   1   0     1 0 0  1    10.0     0.0
"""


def read(path, content, cell=CELL, **given):
    path.write_text(content)
    (data,) = read_table([path], cell=cell, **given)
    return data


def test_fixed_columns(tmp_path):
    data = read(tmp_path / "a.sca", CONTENT)
    np.testing.assert_array_equal(data.miller_index, [[1, 2, 3], [-101, -102, -103]])
    np.testing.assert_array_equal(data.intensity, [-91.7, 123456.7])
    np.testing.assert_array_equal(data.sigma, [8.2, 12345.6])
    np.testing.assert_array_equal(data.metadata["BATCH"], [2, 12341])
    assert data.space_group.xhm() == "P 43 21 2"
    assert data.has_lp_applied
    again = read(
        tmp_path / "b.txt", CONTENT.replace("\n", "\r\n"), space_group=gemmi.SpaceGroup(92)
    )
    np.testing.assert_array_equal(again.intensity, data.intensity)
    assert again.space_group.number == 92


@pytest.mark.dials
@pytest.mark.parametrize(
    ("symbol", "cell"),
    [
        ("P43212", (79.3, 79.3, 37.8, 90, 90, 90)),
        ("C2", (60, 40, 50, 90, 101, 90)),
        ("R3:H", (80, 80, 60, 90, 90, 120)),
        ("R32:R", (70, 70, 70, 85, 85, 85)),
        ("P6122", (93, 93, 130, 90, 90, 120)),
        ("I23", (90, 90, 90, 90, 90, 90)),
    ],
)
def test_what_cctbx_writes(tmp_path, dials, symbol, cell):
    if DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(DEBIAN_BUILD))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cctbx import crystal, miller
        from cctbx.array_family import flex
        from iotbx.scalepack import no_merge_original_index
    rng = np.random.default_rng(3)
    index = rng.integers(-9, 10, (300, 3))
    symmetry = crystal.symmetry(unit_cell=cell, space_group_symbol=symbol)
    indices = flex.miller_index([tuple(map(int, h)) for h in index])
    value, sigma = (np.round(rng.normal(50, 30, 300), 1), np.round(rng.uniform(1, 9, 300), 1))
    array = miller.array(
        miller.set(symmetry, indices, anomalous_flag=True), flex.double(value), flex.double(sigma)
    ).set_observation_type_xray_intensity()
    path, batch = tmp_path / "a.sca", np.arange(300)
    no_merge_original_index.writer(
        array, file_name=str(path), batch_numbers=flex.int(batch.tolist())
    )
    (data,) = read_table([path], cell=gemmi.UnitCell(*cell))
    np.testing.assert_array_equal(data.miller_index, index)
    np.testing.assert_allclose(data.intensity, value)
    np.testing.assert_allclose(data.sigma, sigma)
    np.testing.assert_array_equal(data.metadata["BATCH"], batch)
    theirs = no_merge_original_index.reader(str(path))
    assert data.space_group.number == theirs.space_group_info().type().number()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("p43212", "p4q"), "'p4q'"),
        (("p43212", "p61"), "operators of another space group"),
        (("123456.7", "12345 .7"), "cannot be read"),
        ((CONTENT[CONTENT.index("-101") :], ""), "no observations"),
    ],
)
def test_refused(tmp_path, change, words):
    assert change[0] in CONTENT
    with pytest.raises(UserError, match=words):
        read(tmp_path / "a.sca", CONTENT.replace(*change))


def test_the_cell_must_be_given(tmp_path):
    with pytest.raises(UserError, match="--unit-cell"):
        read(tmp_path / "a.sca", CONTENT, cell=None)


def test_merged_files(tmp_path):
    merged = "    1\n -987\n    79.300    79.300    37.800    90.000    90.000    90.000 p43212\n"
    with pytest.raises(UserError, match="perhaps it is merged"):
        read(tmp_path / "a.sca", merged + "   1   2   3    91.7     8.2\n")


def test_cell_of_the_command_line():
    assert parse_unit_cell("79.3,79.3,37.8,90,90,90").parameters == CELL.parameters
    for text in ("79,79,38,90,90", "79,79,38,90,90,x", "79,79,-38,90,90,90", "1,2,3,90,90,180"):
        with pytest.raises(UserError, match="--unit-cell"):
            parse_unit_cell(text)


@pytest.mark.realdata
def test_a_cell_that_is_not_the_files(shared, tmp_path, capsys):
    """A file that says its own cell does not lose it to the command line, nor silently."""
    source = shared / "data" / "small" / "xds_ascii.hkl"
    argv = ["merge", str(source), "--out", str(tmp_path / "m"), "--unit-cell"]
    assert cli.main([*argv, "60,60,37.8,90,90,90"]) == 2
    assert "--unit-cell says 60.00 60.00" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_merge_of_a_file_without_cell(tmp_path):
    rng = np.random.default_rng(0)
    index = rng.integers(1, 9, (600, 3))
    rows = [
        "".join(f"{v:4d}" for v in (*h, *h)) + f"{i % 12 + 1:6d} 0 0  1{v:8.1f}{9.0:8.1f}\n"
        for i, (h, v) in enumerate(zip(index.tolist(), rng.uniform(50, 90, 600), strict=True))
    ]
    head = CONTENT[: CONTENT.index("-101")]
    (tmp_path / "a.sca").write_text(head + "".join(rows))
    argv = ["merge", str(tmp_path / "a.sca"), "--out", str(tmp_path / "m"), *FAST]
    assert cli.main(argv) == 2
    assert cli.main([*argv, "--unit-cell", "79.3,79.3,37.8,90,90,90"]) == 0
    merged = gemmi.read_mtz_file(str(tmp_path / "m" / "merged.mtz"))
    assert merged.cell.parameters == pytest.approx(CELL.parameters, rel=1e-6)
    assert merged.spacegroup.xhm() == "P 43 21 2"
