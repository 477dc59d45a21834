"""Unmerged MTZ files: original indices, batches, and what other programs read from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal.geometry import (
    Beam,
    Crystal,
    Experiment,
    Goniometer,
    Panel,
    Scan,
)
from braggflux.integrator.errors import UserError
from braggflux.merge.io import mtz as mtz_io

SPACE_GROUP = gemmi.SpaceGroup("P 43 21 2")
CELL = gemmi.UnitCell(42.0, 42.0, 58.0, 90, 90, 90)

IOTBX = """
import json, sys
from iotbx.reflection_file_reader import any_reflection_file
from dials.array_family import flex
reader = any_reflection_file(sys.argv[1])
(array,) = [a for a in reader.as_miller_arrays(merge_equivalents=False)
            if a.info().labels == ["I", "SIGI"]]
mtz = reader.file_content()
batch = mtz.batches()[3]
json.dump({"indices": list(mtz.extract_original_index_miller_indices()),
  "i": list(array.data()), "observation_type": str(array.observation_type()),
  "anomalous": array.anomalous_flag(), "n_batches": mtz.batches().size(),
  "phi": [batch.phistt(), batch.phiend()], "umat": list(batch.umat()),
  "wavelength": batch.alambd(), "scan_axis": list(batch.scanax())}, open(sys.argv[2], "w"))
"""


def rotation(axis, degrees):
    axis = np.asarray(axis, float) / np.linalg.norm(axis)
    k = np.cross(np.eye(3), axis)
    angle = np.radians(degrees)
    return np.eye(3) - np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def experiment(first=1, last=10, wavelength=1.0375, axis=(1.0, 0.0, 0.0)) -> Experiment:
    b = np.diag([1 / 42.0, 1 / 42.0, 1 / 58.0])
    a = rotation([1, 2, 3], 40.0) @ b
    return Experiment(
        beam=Beam(np.array([0.0, 0.0, 1.0]), wavelength),
        panels=(
            Panel(
                "p",
                np.array([1.0, 0, 0]),
                np.array([0, -1.0, 0]),
                np.array([-50.0, 60, -120]),
                (0.172, 0.172),
                (600, 700),
            ),
        ),
        goniometer=Goniometer(np.array(axis)),
        scan=Scan((first, last), (30.0, 0.5)),
        crystal=Crystal(a, SPACE_GROUP),
    )


def table(n=400, n_experiments=1, seed=0) -> mtz_io.UnmergedTable:
    rng = np.random.default_rng(seed)
    hkl = rng.integers(-12, 13, (n, 3))
    hkl[(hkl == 0).all(axis=1)] = (1, 2, 3)
    return mtz_io.UnmergedTable(
        miller_index=hkl,
        experiment=rng.integers(0, n_experiments, n),
        intensity=rng.exponential(100, n) - 5,
        sigma=rng.uniform(1, 5, n),
        xyz_px=rng.uniform(0, 1, (n, 3)) * [600, 700, 10],
        lp=rng.uniform(0.1, 1, n),
    )


def by_intensity(intensity, *columns):
    order = np.argsort(np.asarray(intensity, np.float32))
    return [np.asarray(c)[order] for c in columns]


def test_round_trip_gives_original_indices(tmp_path):
    t, path = table(), tmp_path / "unmerged.mtz"
    mtz_io.write_unmerged_mtz(path, t, [experiment()], history=["made by a test"])
    read = mtz_io.read_unmerged_mtz(path)
    ours = by_intensity(t.intensity, t.miller_index, t.sigma, t.xyz_px[:, 0], t.lp)
    theirs = by_intensity(
        read.intensity, read.miller_index, read.sigma, read.columns["XDET"], read.columns["LP"]
    )
    np.testing.assert_array_equal(theirs[0], ours[0])
    for a, b in zip(theirs[1:], ours[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    (frame,) = by_intensity(t.intensity, np.floor(t.xyz_px[:, 2]))
    (batch,) = by_intensity(read.intensity, read.batch)
    np.testing.assert_array_equal(batch, 1 + frame)
    (rot,) = by_intensity(read.intensity, read.columns["ROT"])
    (z,) = by_intensity(t.intensity, t.xyz_px[:, 2])
    np.testing.assert_allclose(rot, 30 + 0.5 * z, rtol=1e-6)
    assert read.space_group == SPACE_GROUP
    np.testing.assert_allclose(read.cell.parameters, CELL.parameters, atol=1e-4)


def test_indices_in_the_file_are_in_the_asymmetric_unit_and_sorted(tmp_path):
    path = tmp_path / "unmerged.mtz"
    mtz_io.write_unmerged_mtz(path, table(), [experiment()])
    mtz = gemmi.read_mtz_file(str(path))
    asu = gemmi.ReciprocalAsu(SPACE_GROUP)
    hkl = mtz.make_miller_array()
    assert all(asu.is_in(h) for h in hkl.tolist())
    assert np.array_equal(hkl, hkl[np.lexsort(hkl.T[::-1])])
    assert mtz.column_labels() == "H K L M/ISYM BATCH I SIGI XDET YDET ROT LP".split()
    assert "".join(c.type for c in mtz.columns) == "HHHYBJQRRRR"
    isym = np.array(mtz.column_with_label("M/ISYM")).astype(int)
    assert isym.min() >= 1
    assert isym.max() == 2 * len(list(SPACE_GROUP.operations().sym_ops))


def test_reciprocalspaceship_reads_observed_indices(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rs = pytest.importorskip("reciprocalspaceship")
    t, path = table(), tmp_path / "unmerged.mtz"
    mtz_io.write_unmerged_mtz(path, t, [experiment()])
    data = rs.read_mtz(str(path)).reset_index()
    (expected,) = by_intensity(t.intensity, t.miller_index)
    (found,) = by_intensity(data["I"], data[["H", "K", "L"]].to_numpy(dtype=int))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.dials
@pytest.mark.parametrize("axis", [(1.0, 0.0, 0.0), (0.0, -1.0, 0.0)])
def test_cctbx_reads_indices_and_orientation(tmp_path, dials, axis):
    e, t = experiment(axis=axis), table()
    path, out = tmp_path / "unmerged.mtz", tmp_path / "out.json"
    mtz_io.write_unmerged_mtz(path, t, [e])
    environment = dict(os.environ)
    for build in Path("/usr/lib/cctbx").glob("python3*"):
        environment.setdefault("LIBTBX_BUILD", str(build))
    command = [sys.executable, "-c", IOTBX, str(path), str(out)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    seen = json.loads(out.read_text())
    assert "intensity" in seen["observation_type"]
    assert seen["n_batches"] == 10
    assert seen["phi"] == pytest.approx([31.5, 32.0])
    assert seen["wavelength"] == pytest.approx(1.0375)
    (expected,) = by_intensity(t.intensity, t.miller_index)
    (found,) = by_intensity(seen["i"], seen["indices"])
    np.testing.assert_array_equal(found, expected)
    # U is a rotation (stored column by column) that takes the crystal to the Cambridge frame, in
    # which the rotation axis is z and the beam travels along x
    u = np.array(seen["umat"]).reshape(3, 3).T
    np.testing.assert_allclose(u @ u.T, np.eye(3), atol=1e-5)
    a_star = e.crystal.A[:, 0]
    in_cambridge = u @ [1.0, 0, 0]
    assert in_cambridge[2] == pytest.approx(a_star @ axis / np.linalg.norm(a_star), abs=1e-5)
    beam = e.beam.s0 * e.beam.wavelength
    assert in_cambridge[0] == pytest.approx(a_star @ beam / np.linalg.norm(a_star), abs=1e-5)


def test_sweeps_get_batches_and_data_sets_of_their_own(tmp_path):
    experiments = [experiment(1, 10), experiment(1, 20), experiment(2001, 2010, wavelength=1.5)]
    assert mtz_io.batch_offsets(experiments) == [0, 1000, 0]
    t = table(n_experiments=3)
    t = replace(t, scale=np.full(len(t), 2.0))
    mtz_io.write_unmerged_mtz(tmp_path / "u.mtz", t, experiments)
    mtz = gemmi.read_mtz_file(str(tmp_path / "u.mtz"))
    numbers = [b.number for b in mtz.batches]
    assert numbers == [*range(1, 11), *range(1001, 1021), *range(2001, 2011)]
    assert {b.dataset_id for b in mtz.batches} == {1, 2}
    assert [d.wavelength for d in mtz.datasets] == pytest.approx([1.0375, 1.5])
    read = mtz_io.read_unmerged_mtz(tmp_path / "u.mtz")
    sweep = np.searchsorted([1000, 2000], read.batch)
    (ours,) = by_intensity(t.intensity, t.experiment)
    (theirs,) = by_intensity(read.intensity, sweep)
    np.testing.assert_array_equal(theirs, ours)
    assert np.all(read.columns["SCALEUSED"] == 2)


def test_scan_varying_cell_is_in_the_batch_headers(tmp_path):
    e = experiment()
    growing = np.stack([e.crystal.A / (1 + 0.001 * k) for k in range(11)])
    e = replace(e, crystal=replace(e.crystal, A_at_scan_points=growing))
    mtz_io.write_unmerged_mtz(tmp_path / "u.mtz", table(), [e])
    cells = [b.cell.a for b in gemmi.read_mtz_file(str(tmp_path / "u.mtz")).batches]
    np.testing.assert_allclose(cells, [42 * (1 + 0.001 * (k + 0.5)) for k in range(10)], rtol=1e-6)


def test_a_still_has_one_batch(tmp_path):
    e = replace(experiment(), scan=None, goniometer=None)
    t = table()
    t = replace(t, xyz_px=t.xyz_px * [1, 1, 0])
    mtz_io.write_unmerged_mtz(tmp_path / "u.mtz", t, [e])
    assert set(mtz_io.read_unmerged_mtz(tmp_path / "u.mtz").batch) == {1}


def test_useless_rows_are_left_out_and_none_left_is_an_error(tmp_path):
    t = table(5)
    sigma = np.array([1.0, 0.0, np.nan, -1.0, 2.0])
    path = tmp_path / "u.mtz"
    mtz_io.write_unmerged_mtz(path, replace(t, sigma=sigma), [experiment()])
    assert len(mtz_io.read_unmerged_mtz(path).sigma) == 2
    with pytest.raises(UserError, match="none of 5 observations"):
        mtz_io.write_unmerged_mtz(
            tmp_path / "v.mtz", replace(t, sigma=np.zeros(5)), [experiment()]
        )
    assert not (tmp_path / "v.mtz").exists()


def test_merged_and_unmerged_are_not_taken_for_each_other(tmp_path, shared):
    path = tmp_path / "u.mtz"
    mtz_io.write_unmerged_mtz(path, table(), [experiment()])
    with pytest.raises(UserError, match="is an unmerged MTZ file"):
        mtz_io.read_merged_mtz(path)
    with pytest.raises(UserError, match=r"not an unmerged MTZ file.*found H K L IMEAN"):
        mtz_io.read_unmerged_mtz(shared / "data/hewl_nai/dials_merged.mtz")
