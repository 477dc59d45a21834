"""The stage contract on disk: what comes back is what went in, or a reason."""

from dataclasses import fields

import h5py
import pytest
import torch
from simulated_merge import simulate

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.intensity_file import read_intensities, write_intensities
from braggflux.integrator.types import IntensityTable


@pytest.fixture(scope="module")
def table():
    return simulate(d_min=8.0, span_deg=20.0).table


def test_round_trip_is_exact(table, tmp_path):
    path = tmp_path / "intensities.h5"
    write_intensities(path, table)
    found = read_intensities(path)
    for field in fields(IntensityTable):
        ours, theirs = getattr(table, field.name), getattr(found, field.name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), field.name
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_with_its_graph_can_be_written(table, tmp_path):
    values = {f.name: getattr(table, f.name) for f in fields(IntensityTable)}
    values["effective_counts"] = values["effective_counts"].clone().requires_grad_() * 1
    write_intensities(tmp_path / "x.h5", IntensityTable(**values))
    found = read_intensities(tmp_path / "x.h5")
    assert not found.effective_counts.requires_grad


def test_empty_table(table, tmp_path):
    write_intensities(tmp_path / "x.h5", table[:0])
    assert len(read_intensities(tmp_path / "x.h5")) == 0


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
