"""Unmerged mmCIF as gemmi, DIALS and autoPROC write it."""

from __future__ import annotations

import gzip
import subprocess

import gemmi
import numpy as np
import pytest
from simulated_integration import changed, write_integrated

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import DialsFlag, read_reflections
from braggflux.merge.io.formats.dials import read_dials
from braggflux.merge.io.read import read_table

SMALL = """data_x
_cell.length_a 79.3
_cell.length_b 79.3
_cell.length_c 37.8
_cell.angle_alpha 90
_cell.angle_beta 90
_cell.angle_gamma 90
_symmetry.space_group_name_H-M 'P 43 21 2'
loop_
_diffrn_radiation.diffrn_id
_diffrn_radiation.wavelength_id
peak w1
remote w2
again w1
loop_
_diffrn_radiation_wavelength.id
_diffrn_radiation_wavelength.wavelength
w1 0.9791
w2 0.9500
loop_
_diffrn_refln.id
_diffrn_refln.diffrn_id
_diffrn_refln.index_h
_diffrn_refln.index_k
_diffrn_refln.index_l
_diffrn_refln.pdbx_image_id
_diffrn_refln.intensity_net
_diffrn_refln.intensity_sigma
_diffrn_refln.pdbx_scale_value
_diffrn_refln.pdbx_detector_x
_diffrn_refln.pdbx_detector_y
_diffrn_refln.pdbx_scan_angle
1 peak 1 2 3 28 231.2 3.5 1.0 1243.0 1227.3 13.551
2 remote 1 2 3 28 100.2 3.6 1.4 1269.8 1235.8 13.6
3 again -1 -2 -3 29 230.1 3.7 1.4 1169.8 1135.8 35.9
4 peak 2 2 3 30 ? 3.5 1.0 1243.0 1227.3 13.9
"""


def read(path, content, **given):
    path.write_text(content)
    return read_table([path], **given)


def test_scans_of_one_wavelength_are_one_dataset(tmp_path):
    peak, remote = read(tmp_path / "a.cif", SMALL)
    np.testing.assert_array_equal(peak.miller_index, [[1, 2, 3], [-1, -2, -3]])
    np.testing.assert_array_equal(peak.intensity, [231.2, 230.1])
    np.testing.assert_array_equal(peak.sigma, [3.5, 3.7])
    np.testing.assert_array_equal(peak.metadata["XDET"], [1243.0, 1169.8])
    np.testing.assert_array_equal(peak.metadata["ROT"], [13.551, 35.9])
    np.testing.assert_array_equal(remote.intensity, [100.2])
    assert len({*peak.metadata["BATCH"], *remote.metadata["BATCH"]}) == 3
    assert (peak.labels.wavelength, remote.labels.wavelength) == (0.9791, 0.95)
    assert peak.space_group.xhm() == "P 43 21 2"
    assert peak.has_lp_applied


def test_names_and_compression(tmp_path):
    text = "# of a server\n\n" + SMALL.replace("intensity_sigma", "intensity_u")
    for name in ("r1abcsf.ent", "a.mmcif"):
        assert [len(d) for d in read(tmp_path / name, text)] == [2, 1]
    (tmp_path / "b.cif.gz").write_bytes(gzip.compress(text.encode()))
    assert [d.name for d in read_table([tmp_path / "b.cif.gz"])] == ["b_WAVE1", "b_WAVE2"]


def test_cell_of_another_block(tmp_path):
    head, _, loops = SMALL.partition("loop_\n")
    text = head + "loop_\n_refln.index_h\n1\n\ndata_unmerged\nloop_\n" + loops
    peak, _ = read(tmp_path / "a.cif", text)
    assert peak.cell.parameters[:3] == pytest.approx((79.3, 79.3, 37.8))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("_diffrn_refln.", "_refln.", "no unmerged observations"),
        ("pdbx_image_id", "pdbx_frame", "which image"),
        ("intensity_net", "counts_net", "no intensity"),
        ("_cell.length_a", "_cell.a", "--unit-cell"),
        ("_symmetry.space_group_name_H-M", "_symmetry.x", "--space-group"),
        ("13.9\n", "13.9 7\n", "not a readable CIF"),
    ],
)
def test_refused(tmp_path, old, new, words):
    assert old in SMALL
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / "a.cif", SMALL.replace(old, new))
    assert "\n" not in str(caught.value)


def test_cell_and_space_group_of_the_user(tmp_path):
    text = SMALL.replace("_cell.length_a", "_cell.a").replace(
        "_symmetry.space_group_name_H-M", "_x.y"
    )
    cell, group = gemmi.UnitCell(80, 80, 38, 90, 90, 90), gemmi.SpaceGroup("P 41 21 2")
    peak, _ = read(tmp_path / "a.cif", text, cell=cell, space_group=group)
    assert peak.cell.parameters == pytest.approx(cell.parameters)
    assert peak.space_group.xhm() == "P 41 21 2"


@pytest.mark.realdata
def test_as_gemmi_writes_it(shared, tmp_path):
    """From an MTZ file by mtz2cif: a scan for each run of images, some thousand rows."""
    xds = shared / "data" / "small" / "xds_ascii.hkl"
    gemmi.read_xds_ascii(str(xds)).to_mtz().write_to_file(str(tmp_path / "a.mtz"))
    mtz = gemmi.read_mtz_file(str(tmp_path / "a.mtz"))
    mtz.switch_to_original_hkl()  # as gemmi-mtz2cif does
    text = gemmi.MtzToCif().write_cif_to_string(mtz)
    (ours,) = read(tmp_path / "a.cif", text)
    columns = {c.label: np.array(c, float) for c in mtz.columns}
    assert len(ours) == mtz.nreflections
    a = np.column_stack([ours.miller_index, ours.metadata["ROT"], ours.intensity, ours.sigma])
    b = np.column_stack([columns[n] for n in ("H", "K", "L", "ROT", "I", "SIGI")])
    a, b = (x[np.lexsort(x.T[::-1])] for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert ours.n_images == len(np.unique(columns["BATCH"]))
    assert ours.labels.wavelength == pytest.approx(1.892)


@pytest.mark.slow
@pytest.mark.dials
@pytest.mark.realdata
@pytest.mark.parametrize("version", ["v5", "v5_next"])
def test_as_dials_exports_it(shared, dials, tmp_path, version):
    n_sweeps = 2 if version == "v5_next" else 1
    table, _ = write_integrated(shared, tmp_path / "a", n_sweeps=n_sweeps, n_rows=800)
    old = read_reflections(table)
    scaled = {
        "flags": old["flags"] | np.uint64(DialsFlag.SCALED),
        "intensity.scale.value": old["intensity.prf.value"],
        "intensity.scale.variance": np.maximum(old["intensity.prf.variance"], 1.0),
        "inverse_scale_factor": np.random.default_rng(1).uniform(0.5, 2, len(old)),
        "inverse_scale_factor_variance": np.zeros(len(old)),
    }
    pair = changed(table, tmp_path / "b", **scaled)
    options = ["format=mmcif", "intensity=scale", f"mmcif.pdb_version={version}"]
    command = [f"{dials}/dials.export", *map(str, pair), *options, "mmcif.hklout=a.cif"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    reference = read_dials(*pair)
    (ours,) = read_table(
        [tmp_path / "a.cif"], space_group=reference.space_group, cell=reference.cell
    )
    # DIALS leaves out rows that are not integrated both ways, and writes three decimals
    key = lambda d: {  # noqa: E731
        (*h, round(rot, 1)): row
        for row, (h, rot) in enumerate(
            zip(d.miller_index.tolist(), d.metadata["ROT"].tolist(), strict=True)
        )
    }
    here, there = key(ours), key(reference)
    shared_keys = here.keys() & there.keys()
    assert len(shared_keys) > 0.9 * len(ours)
    rows, others = ([k[h] for h in shared_keys] for k in (here, there))
    np.testing.assert_allclose(ours.intensity[rows], reference.intensity[others], 3e-5, 2e-3)
    np.testing.assert_allclose(ours.sigma[rows], reference.sigma[others], 3e-5, 2e-3)
    # of v5 the image is that of the observed centroid, of v5_next that of the angle
    off = ours.metadata["BATCH"][rows] - reference.metadata["BATCH"][others]
    assert np.abs(off).max() <= (1 if version == "v5" else 0)
    assert ours.labels.wavelength == pytest.approx(1.03752, abs=1e-5)
