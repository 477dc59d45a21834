"""Merged MTZ files: columns, Friedel mates, and what other programs read from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.io import mtz as mtz_io
from braggflux.merge.output.half_sets import HalfSet
from braggflux.merge.output.merged_table import DIFFERENCE

CELL = gemmi.UnitCell(42.0, 42.0, 58.0, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 43 21 2")
WAVELENGTH = 1.0375
CONTRACT = (
    "H K L F SIGF F(+) SIGF(+) F(-) SIGF(-) IMEAN SIGIMEAN I(+) SIGI(+) I(-) SIGI(-) N(+) N(-) "
    "DANO SIGDANO FOMDANO E FreeR_flag"
).split()
HALVES = [
    f"{prefix}F{half}{mate}"
    for half in (1, 2)
    for mate in ("", "(+)", "(-)")
    for prefix in ("", "SIG")
]


def made(anomalous: bool = True, coupled: bool = True):
    rng = np.random.default_rng(5)
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 3.0, anomalous)
    n = len(asu)
    f, sigma_f = rng.uniform(5, 50, n), rng.uniform(0.5, 2, n)
    n_obs = rng.integers(0, 5, n)
    difference = rng.standard_normal(n), rng.uniform(0.1, 0.3, n), rng.uniform(0.1, 0.9, n)
    difference = difference if coupled else None
    values = {"f": f, "sigma_f": sigma_f, "i": f**2, "sigma_i": 2 * f * sigma_f, "n_obs": n_obs}
    e = f / f.std()
    return asu, values, mtz_io.merged_table(asu, **values, difference=difference, normalised=e)


def halves_of(asu) -> dict[str, HalfSet]:
    """Two halves; neither has seen a tenth of the rows."""
    rng = np.random.default_rng(6)
    f = np.where(rng.random(len(asu)) < 0.1, np.nan, rng.uniform(5, 50, len(asu)))
    return {f"F{k}": HalfSet.of(asu, f + rng.standard_normal(len(f)), 1 + 0 * f) for k in (1, 2)}


@pytest.fixture
def written(tmp_path):
    asu, values, table = made()
    path = tmp_path / "merged.mtz"
    mtz_io.write_merged_mtz(
        path,
        table,
        CELL,
        SPACE_GROUP,
        WAVELENGTH,
        history=["made by a test", "x" * 100, *DIFFERENCE],
        names=mtz_io.DatasetNames("project", "crystal", "peak"),
        free_flag=np.arange(len(table)) % 20,
    )
    return asu, values, table, path


def test_columns_types_and_header_follow_the_contract(written):
    *_, path = written
    mtz = gemmi.read_mtz_file(str(path))
    assert mtz.column_labels() == CONTRACT
    types = {c.label: c.type for c in mtz.columns}
    assert "".join(types[label] for label in CONTRACT) == "HHHFQGLGLJQKMKMRRDQWEI"
    assert mtz.spacegroup.hm == "P 43 21 2"
    np.testing.assert_allclose(mtz.cell.parameters, CELL.parameters)
    assert [(d.project_name, d.crystal_name, d.dataset_name) for d in mtz.datasets] == [
        ("project", "crystal", "peak")
    ]
    assert mtz.datasets[0].wavelength == pytest.approx(WAVELENGTH)
    assert "made by a test" in mtz.history
    hkl = mtz.make_miller_array()
    assert np.array_equal(hkl, hkl[np.lexsort(hkl.T[::-1])])
    in_asu = gemmi.ReciprocalAsu(SPACE_GROUP)
    assert all(in_asu.is_in(h) for h in hkl.tolist())


def test_friedel_mates_stand_side_by_side(written):
    asu, values, table, _ = written
    operations = SPACE_GROUP.operations()
    row_of = {tuple(h): k for k, h in enumerate(asu.miller_index.tolist())}
    assert len(table) == len({tuple(h) for h in asu.asu_index[values["n_obs"] > 0].tolist()})
    for r, h in enumerate(table.miller_index.tolist()):
        plus = row_of[tuple(h)]
        minus = row_of.get(tuple(-x for x in h))
        assert (minus is None) == operations.is_reflection_centric(h)
        for row, f, n in (
            (plus, table.f_plus[r], table.n_plus[r]),
            (minus, table.f_minus[r], table.n_minus[r]),
        ):
            if row is None or values["n_obs"][row] == 0:
                assert np.isnan(f)
                assert np.isnan(n)
            else:
                assert f == values["f"][row]
                assert n == values["n_obs"][row]


def test_mean_is_weighted_by_precision(written):
    *_, table, _ = written
    both = np.isfinite(table.f_plus) & np.isfinite(table.f_minus)
    weights = np.stack([table.sigma_f_plus[both], table.sigma_f_minus[both]]) ** -2
    expected = np.average(np.stack([table.f_plus[both], table.f_minus[both]]), 0, weights)
    np.testing.assert_allclose(table.f[both], expected)
    single = np.isfinite(table.i_plus) & ~np.isfinite(table.i_minus)
    np.testing.assert_allclose(table.i_mean[single], table.i_plus[single])
    np.testing.assert_allclose(table.sigma_i_mean[single], table.sigma_i_plus[single])


def test_round_trip_keeps_every_value(written):
    *_, table, path = written
    read = mtz_io.read_merged_mtz(path)
    order = np.lexsort(table.miller_index.T[::-1])
    assert np.array_equal(read.table.miller_index, table.miller_index[order])
    names = ("f_plus", "sigma_f_minus", "i_plus", "sigma_i_minus", "f", "i_mean", "n_minus")
    for name in (*names, "difference", "sigma_difference", "merit", "normalised"):
        np.testing.assert_allclose(
            getattr(read.table, name), getattr(table, name)[order], rtol=1e-6, err_msg=name
        )
    assert read.wavelength == pytest.approx(WAVELENGTH)
    assert read.space_group == SPACE_GROUP
    assert read.history[0] == "made by a test"


def test_reciprocalspaceship_reads_the_file(written):
    rs = pytest.importorskip("reciprocalspaceship")
    *_, table, path = written
    data = rs.read_mtz(str(path))
    assert len(data) == len(table)
    assert str(data.dtypes["F(+)"]) == "FriedelSFAmplitude"
    assert str(data.dtypes["SIGI(-)"]) == "StddevFriedelI"
    h = tuple(table.miller_index[0].tolist())
    assert float(data.loc[h, "F"]) == pytest.approx(table.f[0], rel=1e-6)


IOTBX = """
import json, sys
from iotbx.reflection_file_reader import any_reflection_file
arrays = any_reflection_file(sys.argv[1]).as_miller_arrays()
json.dump({",".join(a.info().labels): [str(a.observation_type()), a.anomalous_flag(), a.size()]
           for a in arrays}, open(sys.argv[2], "w"))
"""


@pytest.mark.dials
def test_cctbx_recognises_amplitudes_and_intensities(written, dials, tmp_path):
    _, _, table, path = written
    environment = dict(os.environ)
    for build in Path("/usr/lib/cctbx").glob("python3*"):
        environment.setdefault("LIBTBX_BUILD", str(build))
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", IOTBX, str(path), str(out)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    seen = json.loads(out.read_text())
    n_mates = int(np.isfinite(table.f_plus).sum() + np.isfinite(table.f_minus).sum())
    assert seen["F(+),SIGF(+),F(-),SIGF(-)"] == ["xray.amplitude", True, n_mates]
    assert seen["I(+),SIGI(+),I(-),SIGI(-)"] == ["xray.intensity", True, n_mates]
    assert seen["F,SIGF"] == ["xray.amplitude", False, len(table)]
    assert seen["IMEAN,SIGIMEAN"] == ["xray.intensity", False, len(table)]


def test_without_anomalous_there_are_only_means(tmp_path):
    _, _, table = made(anomalous=False)
    mtz_io.write_merged_mtz(tmp_path / "m.mtz", table, CELL, SPACE_GROUP, WAVELENGTH)
    mtz = gemmi.read_mtz_file(str(tmp_path / "m.mtz"))
    labels = "H K L F SIGF IMEAN SIGIMEAN N E".split()
    assert mtz.column_labels() == labels
    read = mtz_io.read_merged_mtz(tmp_path / "m.mtz")
    assert not read.table.is_anomalous
    np.testing.assert_allclose(np.sort(read.table.f), np.sort(table.f), rtol=1e-6)


@pytest.mark.parametrize("anomalous", [True, False])
def test_half_sets_have_a_file_of_their_own(tmp_path, anomalous):
    asu, _, _ = made(anomalous=anomalous)
    halves = halves_of(asu)
    names = mtz_io.DatasetNames("project", "crystal", "peak")
    path = tmp_path / "half_sets.mtz"
    mtz_io.write_half_sets_mtz(path, asu, halves, WAVELENGTH, names=names, title="a title")
    mtz = gemmi.read_mtz_file(str(path))
    wanted = HALVES if anomalous else [label for label in HALVES if "(" not in label]
    assert mtz.column_labels() == [*"HKL", *wanted]
    types = "".join(c.type for c in mtz.columns)[3:]
    assert types == ("FQGLGL" if anomalous else "FQ") * 2
    assert (mtz.title, mtz.datasets[0].dataset_name) == ("a title", "peak")
    seen = np.isfinite(halves["F1"].mean) | np.isfinite(halves["F2"].mean)
    assert mtz.nreflections == seen.sum() < len(seen)
    rows = np.searchsorted(
        np.flatnonzero(asu.friedel_sign > 0), asu.refl_id(mtz.make_miller_array())
    )
    label = "F2(-)" if anomalous else "F2"
    expected = halves["F2"].minus if anomalous else halves["F2"].mean
    np.testing.assert_allclose(mtz.column_with_label(label), expected[rows], rtol=1e-6)


def test_without_a_prior_that_ties_mates_there_is_no_difference(tmp_path):
    _, _, table = made(coupled=False)
    mtz_io.write_merged_mtz(tmp_path / "m.mtz", table, CELL, SPACE_GROUP, WAVELENGTH)
    labels = gemmi.read_mtz_file(str(tmp_path / "m.mtz")).column_labels()
    assert labels == [x for x in CONTRACT if "DANO" not in x and x != "FreeR_flag"]
    assert not mtz_io.read_merged_mtz(tmp_path / "m.mtz").table.has_coupled_differences


def test_a_difference_needs_both_mates(written):
    _, _, table, _ = written
    pairs = np.isfinite(table.f_plus) & np.isfinite(table.f_minus)
    assert np.array_equal(np.isfinite(table.difference), pairs)
    centric = SPACE_GROUP.operations().centric_flag_array(table.miller_index)
    assert centric.any()
    assert np.isnan(table.difference[centric]).all()


@pytest.mark.parametrize("label", ["I", "IMEAN"])
def test_the_mean_intensity_of_others_has_either_label(tmp_path, label):
    _, _, table = made()
    path = tmp_path / "m.mtz"
    mtz_io.write_merged_mtz(path, table, CELL, SPACE_GROUP, WAVELENGTH)
    mtz = gemmi.read_mtz_file(str(path))
    mtz.column_with_label("IMEAN").label, mtz.column_with_label("SIGIMEAN").label = (
        label,
        f"SIG{label}",
    )
    mtz.write_to_file(str(path))
    read = mtz_io.read_merged_mtz(path).table
    order = np.lexsort(table.miller_index.T[::-1])
    for name in ("i_mean", "sigma_i_mean"):
        np.testing.assert_allclose(getattr(read, name), getattr(table, name)[order], rtol=1e-6)


@pytest.mark.realdata
def test_the_plain_difference_of_other_programs_is_not_taken_for_ours(shared):
    """DIALS and CCP4 write one under the same label; it is not shrunk and needs weights."""
    path = shared / "data/hewl_nai/dials_merged.mtz"
    assert "DANO" in gemmi.read_mtz_file(str(path)).column_labels()
    assert not mtz_io.read_merged_mtz(path).table.has_coupled_differences


@pytest.mark.realdata
def test_reads_what_dials_merge_writes(shared):
    read = mtz_io.read_merged_mtz(shared / "data/hewl_nai/dials_merged.mtz")
    centric = np.asarray(read.space_group.operations().centric_flag_array(read.table.miller_index))
    assert len(read.table) == 8537
    assert np.isfinite(read.table.f_plus[centric]).all()
    assert not np.isfinite(read.table.f_minus[centric]).any()
    pairs = np.isfinite(read.table.f_plus) & np.isfinite(read.table.f_minus)
    assert pairs.sum() == 6830
    assert read.wavelength == pytest.approx(1.03752, abs=1e-5)


def test_indices_outside_the_asymmetric_unit_are_mapped_with_their_mates(written, tmp_path):
    """A file in another asymmetric unit: F(+) and F(-) change places for inverted indices."""
    *_, path = written
    mtz = gemmi.read_mtz_file(str(path))
    data = np.array(mtz)
    data[:, :3] *= -1
    mtz.set_data(data)
    mtz.write_to_file(str(tmp_path / "inverted.mtz"))
    read = mtz_io.read_merged_mtz(tmp_path / "inverted.mtz").table
    original = mtz_io.read_merged_mtz(path).table
    assert np.isfinite(original.difference).sum() > 300
    where = {tuple(h): k for k, h in enumerate(read.miller_index.tolist())}
    order = [where[tuple(h)] for h in original.miller_index.tolist()]
    pairs = np.isfinite(original.f_plus) & np.isfinite(original.f_minus)
    np.testing.assert_array_equal(read.f_plus[order][pairs], original.f_minus[pairs])
    np.testing.assert_array_equal(read.difference[order], -original.difference)


def test_user_errors_name_what_was_found(written, tmp_path):
    *_, path = written
    with pytest.raises(UserError, match="does not exist"):
        mtz_io.read_merged_mtz(tmp_path / "none.mtz")
    cut = tmp_path / "cut.mtz"
    cut.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="not a complete MTZ file"):
        mtz_io.read_merged_mtz(cut)
    text = tmp_path / "text.mtz"
    text.write_text("not an MTZ file")
    with pytest.raises(UserError, match="not a complete MTZ file"):
        mtz_io.read_merged_mtz(text)
    mtz = gemmi.read_mtz_file(str(path))
    for label in [c for c in mtz.column_labels()[3:] if c != "N(+)"]:
        mtz.remove_column(mtz.column_labels().index(label))
    mtz.write_to_file(str(tmp_path / "counts.mtz"))
    with pytest.raises(UserError, match=r"none of the columns F\(\+\).*found H K L N\(\+\)"):
        mtz_io.read_merged_mtz(tmp_path / "counts.mtz")


def test_unwritable_output_leaves_nothing(written, tmp_path):
    _, _, table, _ = written
    target = tmp_path / "none" / "merged.mtz"
    with pytest.raises(UserError, match="cannot write"):
        mtz_io.write_merged_mtz(target, table, CELL, SPACE_GROUP, WAVELENGTH)
    assert not target.parent.exists()


def test_a_failed_write_keeps_the_old_file(written, tmp_path, monkeypatch):
    _, _, table, path = written
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        mtz_io.write_merged_mtz(path, table, CELL, SPACE_GROUP, WAVELENGTH)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
