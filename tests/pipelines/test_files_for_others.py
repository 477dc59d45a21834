"""Files that leave the house, read as other programs read them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
import reciprocalspaceship as rs

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.pipelines import cli
from braggflux.pipelines.deposition.mmcif import deposition_text
from braggflux.pipelines.report import merge_folder

DICTIONARY = Path(__file__).with_name("pdbx_subset.dic")
CELL = gemmi.UnitCell(40, 50, 60, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")

IOTBX = """
import io, json, sys
from iotbx.reflection_file_reader import any_reflection_file
from iotbx.reflection_file_utils import reflection_file_server
file = any_reflection_file(sys.argv[1])
arrays = file.as_miller_arrays()
server = reflection_file_server(reflection_files=[file], err=io.StringIO())
def chosen(labels=None, **preferences):
    found = server.get_xray_data(file_name=None, labels=labels, ignore_all_zeros=True,
                                 parameter_scope="", **preferences)
    return found.info().label_string()
flags, test_value = server.get_r_free_flags(file_name=None, label=None, test_flag_value=None,
                                            disable_suitability_test=False, parameter_scope="")
json.dump({
  "amplitudes": [a.info().label_string() for a in arrays if a.is_xray_amplitude_array()],
  "intensities": [a.info().label_string() for a in arrays if a.is_xray_intensity_array()],
  "amplitude": chosen(labels=["F,SIGF"]),
  "intensity": chosen(prefer_anomalous=False), "mates": chosen(prefer_anomalous=True),
  "flags": flags.info().label_string(), "test_value": test_value,
  "n_test": int((flags.data() == test_value).count(True))}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory) -> Path:
    """5,000 observations, none of them of an odd batch of the high resolutions."""
    asu, rng = ReciprocalAsu(CELL, SPACE_GROUP, 3.5, True), np.random.default_rng(5)
    f2 = rng.exponential(1000.0, len(asu)) * asu.epsilon
    minus = asu.friedel_sign < 0
    f2[minus] = f2[asu.friedel_mate[minus]] * (1 + 0.05 * rng.standard_normal(minus.sum()))
    image, row = np.repeat(np.arange(20), 250), rng.integers(0, len(asu), 5000)
    sigma = 15.0 + 0.02 * f2[row]
    values = f2[row] + sigma * rng.standard_normal(len(row)), sigma, image + 1
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup, mtz.title = SPACE_GROUP, "a test"
    mtz.set_cell_for_all(CELL)
    mtz.add_dataset("peak").wavelength = 1.1
    for label, kind in (("I", "J"), ("SIGI", "Q"), ("BATCH", "B")):
        mtz.add_column(label, kind)
    mtz.set_data(np.column_stack([asu.miller_index[row], *values]).astype(np.float32))
    path = tmp_path_factory.mktemp("unmerged") / "a.mtz"
    mtz.write_to_file(str(path))
    return path


def merge(path, out, *more) -> int:
    fast = ("--anomalous", "--epochs", "5", "--set", "held_out=0")
    return cli.main(["merge", *(str(a) for a in (path, "--out", out, *fast, *more))])


@pytest.fixture(scope="module")
def merged(unmerged, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merge") / "out"
    assert merge(unmerged, out) == 0
    return out


@pytest.mark.slow
@pytest.mark.dials
def test_cctbx_takes_one_array_of_each_kind_and_our_flags(merged, dials, tmp_path):
    environment = dict(os.environ)
    for build in Path("/usr/lib/cctbx").glob("python3*"):
        environment.setdefault("LIBTBX_BUILD", str(build))
    path, out = merged / "merged.mtz", tmp_path / "out.json"
    command = [sys.executable, "-c", IOTBX, str(path), str(out)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    seen = json.loads(out.read_text())
    mates = "I(+),SIGI(+),I(-),SIGI(-)"
    assert seen["amplitudes"] == ["F,SIGF", mates.replace("I(", "F(")]
    assert seen["intensities"] == ["IMEAN,SIGIMEAN", mates]
    chosen = [seen[k] for k in ("amplitude", "intensity", "mates")]
    assert chosen == ["F,SIGF", "IMEAN,SIGIMEAN", mates]
    flags = np.array(gemmi.read_mtz_file(str(path)).column_with_label("FreeR_flag"))
    assert (seen["flags"], seen["test_value"]) == ("FreeR_flag", 0)
    assert seen["n_test"] == (flags == 0).sum() > 20


def test_names_title_and_day_are_in_the_header(merged):
    mtz = gemmi.read_mtz_file(str(merged / "merged.mtz"))
    (dataset,) = mtz.datasets
    assert (mtz.title, dataset.dataset_name, dataset.wavelength) == (
        "a test", "peak", pytest.approx(1.1),
    )  # fmt: skip
    assert dataset.crystal_name
    assert dataset.project_name
    assert "braggflux" in mtz.history[0]
    assert any(word.count("-") == 2 for word in mtz.history[0].replace(",", " ").split())
    assert mtz.rfree_column().label == "FreeR_flag"


def test_a_test_set_is_carried_and_another_crystals_refused(merged, unmerged, tmp_path, capsys):
    before = gemmi.read_mtz_file(str(merged / "merged.mtz"))
    flags = np.array(before.column_with_label("FreeR_flag"))
    swapped = np.where(flags == 7, 0, np.where(flags == 0, 7, flags))
    half = gemmi.Mtz(with_base=True)
    half.spacegroup = before.spacegroup
    half.set_cell_for_all(before.cell)
    half.add_dataset("other")
    half.add_column("FREE", "I")
    half.set_data(np.column_stack([before.make_miller_array(), swapped])[::2].astype(np.float32))
    half.write_to_file(str(tmp_path / "half.mtz"))
    assert merge(unmerged, tmp_path / "out", "--free-r", tmp_path / "half.mtz") == 0
    after = gemmi.read_mtz_file(str(tmp_path / "out" / "merged.mtz"))
    kept = np.array(after.column_with_label("FreeR_flag"))
    np.testing.assert_array_equal(kept[::2], swapped[::2])
    np.testing.assert_array_equal(kept[1::2], flags[1::2])  # the same seed as before
    np.testing.assert_array_equal(after.column_with_label("F"), before.column_with_label("F"))
    assert any("kept from half.mtz" in line for line in after.history)
    half.set_cell_for_all(gemmi.UnitCell(44, 50, 60, 90, 90, 90))
    half.write_to_file(str(tmp_path / "other.mtz"))
    capsys.readouterr()
    assert merge(unmerged, tmp_path / "none", "--free-r", tmp_path / "other.mtz") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has the cell 44" in said
    assert "leave --free-r out" in said
    assert not (tmp_path / "none" / "merged.mtz").exists()


@pytest.mark.slow
def test_unmerged_observations_are_read_back_and_merged_again(merged, unmerged, tmp_path):
    path = merged / "unmerged.mtz"
    ours, theirs = (gemmi.read_mtz_file(str(p)) for p in (path, unmerged))
    assert {b.number for b in ours.batches} == set(range(1, 21))
    assert ours.batches[0].wavelength == pytest.approx(1.1)
    assert ours.title == "a test"
    data = rs.read_mtz(str(path)).reset_index()
    assert not rs.read_mtz(str(path)).merged
    found = data[["H", "K", "L", "BATCH"]].to_numpy(dtype=int)
    given = np.column_stack([theirs.make_miller_array(), theirs.column_with_label("BATCH")])
    assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in given.tolist()}
    assert len(found) == 5000
    assert merge(path, tmp_path / "again") == 0
    first, second = (
        gemmi.read_mtz_file(str(out / "merged.mtz")) for out in (merged, tmp_path / "again")
    )
    i = [np.array(mtz.column_with_label("IMEAN")) for mtz in (first, second)]
    assert np.corrcoef(*i)[0, 1] > 0.999


def table_one(folder) -> dict[str, dict[str, str]]:
    with (folder / "table1.csv").open(newline="") as file:
        return {row["quantity"]: row for row in csv.DictReader(file)}


def test_table_one_is_the_same_in_three_forms(merged):
    rows = table_one(merged)
    with (merged / "statistics.csv").open(newline="") as file:
        *shells, overall = csv.DictReader(file)
    assert "half sets are" not in (merged / "table1.txt").read_text()  # of amplitudes
    for place, row in (("overall", overall), ("inner", shells[0]), ("outer", shells[-1])):
        for name in ("n_obs", "n_unique", "completeness", "redundancy", "r_pim", "d_min"):
            found = float(rows[name][f"braggflux {place}"])
            assert found == pytest.approx(float(row[name]), rel=1e-4), (place, name)
        assert rows["r_pim"]["definition"]
    assert float(rows["completeness"]["braggflux outer"]) <= 1.0
    (source,) = merge_folder.describe(merged, None, None)[1]  # unmerged.mtz is no data set
    assert source.name == ""
    text, tex = ((merged / f"table1.{kind}").read_text() for kind in ("txt", "tex"))
    assert max(map(len, text.splitlines())) <= 80
    r_pim = f"{float(rows['r_pim']['braggflux overall']):.3f}"
    (line,) = [x for x in text.splitlines() if x.startswith("R_pim  ")]
    assert line.split()[1] == r_pim
    (line,) = [x for x in tex.splitlines() if x.startswith(r"$R_\mathrm{pim}$")]
    assert line.split(" & ")[1] == r_pim
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 1
    body = [x for x in tex.splitlines() if x.endswith(r"\\") and "multicolumn" not in x]
    assert {x.count(" & ") for x in body} == {3}
    assert "P 21 21 21" in text


def complaints(path) -> list[str]:
    """What gemmi's validator says of a file, by the PDBx dictionary."""
    found: list[str] = []
    validator = gemmi.cif.Ddl(found.append)
    validator.read_ddl(gemmi.cif.read(str(DICTIONARY)))
    is_valid = validator.validate_cif(gemmi.cif.read(str(path)))
    return found if found or is_valid else ["not valid"]


def test_mmcif_is_valid_and_read_back(merged, tmp_path):
    path = merged / "deposition.cif"
    assert complaints(path) == []
    text = path.read_text()
    (tmp_path / "bad.cif").write_text(text.replace("_reflns.number_obs", "_reflns.number_seen"))
    assert complaints(tmp_path / "bad.cif") == ["[mtz] unknown tag _reflns.number_seen"]
    (read,) = gemmi.as_refln_blocks(gemmi.cif.read(str(path)))
    mtz = gemmi.read_mtz_file(str(merged / "merged.mtz"))
    np.testing.assert_array_equal(read.make_miller_array(), mtz.make_miller_array())
    items = {"F": "F_meas_au", "SIGF": "F_meas_sigma_au", "IMEAN": "intensity_meas"}
    items |= {"F(+)": "pdbx_F_plus", "SIGI(-)": "pdbx_I_minus_sigma"}
    for label, item in items.items():
        np.testing.assert_allclose(
            read.make_float_array(item), mtz.column_with_label(label), rtol=1e-5
        )
    is_test = np.array(mtz.column_with_label("FreeR_flag")) == 0
    status = list(read.block.find_values("_refln.status"))
    assert [s == "f" for s in status] == is_test.tolist()
    assert read.spacegroup == SPACE_GROUP
    assert read.wavelength == pytest.approx(1.1)


def test_an_unknown_wavelength_is_no_zero(merged, tmp_path):
    files = [gemmi.read_mtz_file(str(merged / f"{x}merged.mtz")) for x in ("", "un")]
    for mtz in files:
        mtz.datasets[0].wavelength = 0.0
    for batch in files[1].batches:
        batch.wavelength = 0.0
    rows = [{"d_max": 40.0, "d_min": 3.5}, {"d_max": 40.0, "d_min": 3.5}]
    text = deposition_text(*files, rows, [("braggflux", "0", "data scaling")], "by a test")
    (tmp_path / "zero.cif").write_text(text)
    assert complaints(tmp_path / "zero.cif") == []
    block = gemmi.cif.read_string(text).sole_block()
    assert list(block.find_values("_diffrn_radiation_wavelength.wavelength")) == ["?"]
    assert list(block.find_values("_reflns.pdbx_Rpim_I_all")) == ["?"]


def test_mmcif_has_the_statistics_and_the_method(merged):
    block, rows = gemmi.cif.read(str(merged / "deposition.cif"))[0], table_one(merged)

    def only(tag):
        (value,) = block.find_values(tag)
        return gemmi.cif.as_string(value)

    for tag, name, factor in (
        ("number_obs", "n_unique", 1), ("pdbx_Rpim_I_all", "r_pim", 1),
        ("percent_possible_obs", "completeness", 100), ("d_resolution_high", "d_min", 1),
    ):  # fmt: skip
        expected = factor * float(rows[name]["braggflux overall"])
        assert float(only(f"_reflns.{tag}")) == pytest.approx(expected, rel=2e-3), tag
    assert "ELBO" in only("_reflns.data_reduction_details")
    assert "FreeR_flag" in only("_reflns.R_free_details")
    shells = block.find("_reflns_shell.", ["d_res_high", "number_unique_obs"])
    assert len(shells) == 10
    assert sum(int(row[1]) for row in shells) == int(rows["n_unique"]["braggflux overall"])
    names = [gemmi.cif.as_string(x) for x in block.find_values("_software.name")]
    assert names == ["braggflux"]
