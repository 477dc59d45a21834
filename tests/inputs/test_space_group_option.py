"""`--space-group` for files that have one: as a file written in that group, or refused."""

from __future__ import annotations

import gemmi
import mad_files as mad
import numpy as np
import pytest

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.mtz_observations import read_mtz
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.io.stores.chosen_group import StoreInGroup, in_group, new_symmetry_correlation
from braggflux.merge.io.stores.unmerged_store import UnmergedStore
from braggflux.pipelines import cli

FAST = ("--epochs", "5", "--set", "network_width=8")
ROWS = mad.observe(mad.truth(), 0, n_images=8)


def write(path, group, rows=ROWS, cell=mad.CELL):
    mtz = mad.empty_mtz(cell=cell, group=gemmi.SpaceGroup(group))
    mad.add_dataset(mtz, ("p", "x", "d"), mad.PEAK, range(1, 9), cell=cell)
    return mad.write(path, rows, mtz)


def merged(path, out, *argv):
    assert cli.main(["merge", str(path), "--out", str(out), *FAST, *argv]) == 0
    return read_merged_mtz(out / "merged.mtz")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mtz", "store", "streamed", "converted"])
def test_amplitudes_are_those_of_a_file_in_that_group(tmp_path, kind):
    """Reduced in P 1 2 1, merged in P 21 21 21: other asymmetric unit, fewer reflections."""
    given, flags = ("--space-group", "P212121"), () if kind == "mtz" else ("--stills",)
    path = write(tmp_path / "low.mtz", "P 1 2 1")
    if kind != "mtz":
        argv = ["convert", str(path), "--out", str(tmp_path / "low.h5")]
        path = tmp_path / "low.h5"
        assert cli.main([*argv, *(given if kind == "converted" else ())]) == 0
    if kind == "streamed":
        flags = (*flags, "--set", "stream_above=0")
    if kind == "converted":
        given = ()
    low = merged(path, tmp_path / "a", *flags, *given)
    high = merged(write(tmp_path / "high.mtz", "P 21 21 21"), tmp_path / "b", *flags[:1])
    assert low.space_group.xhm() == high.space_group.xhm() == "P 21 21 21"
    np.testing.assert_array_equal(low.table.miller_index, high.table.miller_index)
    if kind != "streamed":  # which has another number of steps
        np.testing.assert_allclose(low.table.f, high.table.f, rtol=1e-3)
    np.testing.assert_array_equal(low.table.n_plus, high.table.n_plus)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (
            "P 43 21 2",
            "cell 40.00 50.00 60.00 90.00 90.00 90.00 cannot be in space group P 43 21 2",
        ),
        ("C 2 2 21", "C 2 2 21 has no place for 5"),
        ("I 21 21 21", "no place for 5"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, group, words):
    path = write(tmp_path / "a.mtz", "P 21 21 21")
    argv = ["merge", str(path), "--space-group", group, "--out", str(tmp_path / "out"), *FAST]
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("group", ["P 2 2 21", "P 1 21 1", "P 1"])
def test_what_needs_no_new_rotation_is_not_questioned(tmp_path, group):
    data = read_mtz(write(tmp_path / "a.mtz", "P 21 21 21"))
    found = in_group(data, gemmi.SpaceGroup(group))
    assert found.space_group.xhm() == group
    np.testing.assert_array_equal(found.miller_index, data.miller_index)
    assert new_symmetry_correlation(data, found.space_group) is None


def test_symmetry_that_the_intensities_lack_is_said(tmp_path, caplog):
    """P 4 data of a cell that P 4 2 2 fits too: the correlation of the true intensities is 0."""
    cell, group = gemmi.UnitCell(50, 50, 60, 90, 90, 90), gemmi.SpaceGroup("P 4")
    asu = ReciprocalAsu(cell, group, 4.0, False)
    rng = np.random.default_rng(0)
    row = rng.integers(0, len(asu), 6000)
    f2 = rng.exponential(1000.0, len(asu))
    columns = {"BATCH": np.repeat(np.arange(8), 750) + 1, "SIGI": np.full(6000, 15.0)}
    rows = mad.Rows(asu.miller_index[row], columns | {"I": f2[row]})
    data = read_mtz(write(tmp_path / "a.mtz", "P 4", rows, cell))
    with caplog.at_level("WARNING"):
        in_group(data, gemmi.SpaceGroup("P 41 21 2"))
    assert "they are not equal" in caplog.text
    right = new_symmetry_correlation(read_mtz(write(tmp_path / "b.mtz", "P 1 2 1")), mad.GROUP)
    assert right > 0.9


def test_rhombohedral_axes_are_those_of_the_cell(tmp_path):
    cell = gemmi.UnitCell(60, 60, 60, 80, 80, 80)
    data = read_mtz(write(tmp_path / "a.mtz", "P 1", cell=cell))
    assert in_group(data, gemmi.SpaceGroup("R 3")).space_group.xhm() == "R 3:R"


def test_a_cell_that_the_file_gets_wrong_is_mended(tmp_path):
    """The header says P 41 21 2 of an orthorhombic cell: refused, and right in P 21 21 21."""
    path = write(tmp_path / "a.mtz", "P 41 21 2")
    argv = ["merge", str(path), "--out", str(tmp_path / "out"), *FAST]
    assert cli.main(argv) == 2
    assert cli.main([*argv, "--space-group", "P 21 21 21"]) == 0


def test_a_group_that_dials_tables_get_wrong_is_mended(tmp_path):
    wrong = mad.sweep(1.0, group=gemmi.SpaceGroup("P 41 21 2"))
    argv = ["merge", *map(str, mad.write_tables(tmp_path, [(ROWS, wrong)])), *FAST]
    argv += ["--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert cli.main([*argv, "--space-group", "P 21 21 21"]) == 0
    found = read_merged_mtz(tmp_path / "out" / "merged.mtz")
    assert found.space_group.xhm() == "P 21 21 21"
    assert found.cell.parameters == pytest.approx(mad.CELL.parameters, abs=1e-3)


def test_a_store_in_another_group_keeps_its_rows(tmp_path):
    path = write(tmp_path / "a.mtz", "P 1 2 1")
    assert cli.main(["convert", str(path), "--out", str(tmp_path / "a.h5")]) == 0
    with StoreInGroup(UnmergedStore(tmp_path / "a.h5"), mad.GROUP) as store:
        data = store.read(2, 5)
        assert data.space_group.xhm() == store.space_group.xhm() == "P 21 21 21"
        rows = slice(int(store.image_starts[2]), int(store.image_starts[5]))
        np.testing.assert_array_equal(store.column("miller_index", rows), data.miller_index)
    with pytest.raises(UserError, match="cannot be in space group"):
        StoreInGroup(UnmergedStore(tmp_path / "a.h5"), gemmi.SpaceGroup("P 4"))
