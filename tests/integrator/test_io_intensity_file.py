"""The stage contract on disk: what comes back is what went in, or a reason."""

import re
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch
from simulated_merge import simulate

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.intensity_file import read_intensities, write_intensities


@pytest.fixture(scope="module")
def table():
    return simulate(d_min=8.0, span_deg=20.0).table


def test_round_trip_is_exact(table, tmp_path):
    path = tmp_path / "intensities.h5"
    write_intensities(path, table)
    found = read_intensities(path)
    for name, ours in table.columns().items():
        theirs = found.columns()[name]
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_with_its_graph_can_be_written(table, tmp_path):
    counts = table.likelihood.effective_counts.clone().requires_grad_() * 1
    likelihood = replace(table.likelihood, effective_counts=counts)
    write_intensities(tmp_path / "x.h5", replace(table, likelihood=likelihood))
    found = read_intensities(tmp_path / "x.h5")
    assert not found.likelihood.effective_counts.requires_grad


def test_empty_table(table, tmp_path):
    write_intensities(tmp_path / "x.h5", table[:0])
    assert len(read_intensities(tmp_path / "x.h5")) == 0


def test_the_document_lists_every_column(table):
    """Names, shapes and types of docs/files.md."""
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w, ]+) \| \(N,( 3)?\) \| (\w+) \|", text, re.MULTILINE)
    listed = {n: (w, kind) for names, w, kind in rows for n in names.split(", ")}
    assert listed.keys() == table.columns().keys()
    for name, values in table.columns().items():
        width = " 3" if values.dim() == 2 else ""
        assert listed[name] == (width, str(values.dtype).removeprefix("torch.")), name


def make_older(path, version):
    """Make it what an earlier version wrote."""
    with h5py.File(path, "a") as handle:
        handle.attrs["version"] = version
        for name in ("zeta", "corner", "frames_per_layer"):
            del handle[name]


@pytest.mark.parametrize(("version", "start"), [(2, 1), (2, 6), (1, 1), (1, 6)])
def test_earlier_versions(table, tmp_path, version, start):
    """Version 1 came from boxes that may lie on wrong frames of scans from another image."""
    path = tmp_path / "x.h5"
    records = [{"image_range": [start, 99], "oscillation_deg": [0.0, 1.0]}]
    write_intensities(path, table, records)
    make_older(path, version)
    if (version, start) == (1, 6):
        with pytest.raises(UserError, match=r"scans from \[6\]\); make it again"):
            read_intensities(path)
        return
    found = read_intensities(path)
    assert torch.equal(found.intensity, table.intensity)
    assert not found.metadata.frames_per_layer.any(), "unknown"


def test_zeta_of_a_file_before_version_3_is_guessed(table, tmp_path):
    """The widths of rocking curves are as 1 / zeta, in degrees; the narrowest one has zeta 1."""
    path = tmp_path / "x.h5"
    rocking = torch.tensor([0.4, 0.8, 0.4])  # frames, of 1, 1 and 0.5 degrees
    metadata = replace(
        table.metadata[:3],
        frame_sigma=(rocking**2 + 1 / 12).sqrt(),
        experiment=torch.tensor([0, 0, 1]),
    )
    records = [{"oscillation_deg": [0.0, 1.0]}, {"oscillation_deg": [0.0, -0.5]}]
    write_intensities(path, replace(table[:3], metadata=metadata), records)
    make_older(path, 2)
    found = read_intensities(path)
    expected = torch.tensor([0.5, 0.25, 1.0]).double()
    torch.testing.assert_close(found.metadata.zeta, expected, rtol=1e-5, atol=0)
    assert torch.equal(found.metadata.xyz_px, metadata.xyz_px)
    with h5py.File(path, "a") as handle:
        handle.attrs["version"] = 3
    with pytest.raises(UserError, match="zeta"):
        read_intensities(path)


def spoil_version(handle):
    handle.attrs["version"] = 99


def spoil_column(handle):
    del handle["exposure"]


@pytest.mark.parametrize(
    ("spoil", "says"), [(spoil_version, "version"), (spoil_column, "exposure")]
)
def test_other_files_are_refused(table, tmp_path, spoil, says):
    path = tmp_path / "x.h5"
    write_intensities(path, table)
    with h5py.File(path, "a") as handle:
        spoil(handle)
    with pytest.raises(UserError, match=says) as error:
        read_intensities(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_hdf5_at_all(tmp_path):
    path = tmp_path / "x.h5"
    path.write_text("not HDF5")
    with pytest.raises(UserError, match=r"x\.h5"):
        read_intensities(path)
