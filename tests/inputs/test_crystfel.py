"""Streams as indexamajig writes them when not everything went well."""

from __future__ import annotations

import gzip

import gemmi
import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.crystfel_stream import stream_chunks
from braggflux.merge.io.read import read_table

SPACE_GROUP = gemmi.SpaceGroup("P 43 21 2")
pytestmark = pytest.mark.realdata


@pytest.fixture
def stream(shared) -> bytes:
    return (shared / "data" / "small" / "crystfel.stream").read_bytes()


def read(path, content):
    path.write_bytes(content)
    (data,) = read_table([path], space_group=SPACE_GROUP)
    return data


def same(a, b, rows=slice(None)):
    np.testing.assert_array_equal(a.miller_index, b.miller_index[rows])
    np.testing.assert_array_equal(a.intensity, b.intensity[rows])
    np.testing.assert_array_equal(a.wavelength, b.wavelength[rows])
    for name in a.metadata:
        np.testing.assert_array_equal(a.metadata[name], b.metadata[name][rows])


def without_list(stream: bytes, crystal: int) -> bytes:
    """Crystal number ``crystal`` indexed but not integrated (``--integration=none``)."""
    parts = stream.split(b"Reflections measured after indexing\n")
    parts[crystal + 1] = parts[crystal + 1].partition(b"End of reflections\n")[2]
    joints = [b"Reflections measured after indexing\n"] * 3
    joints[crystal] = b"No integrated reflections.\n"
    return b"".join(p + j for p, j in zip(parts, [*joints, b""], strict=True))


def test_a_crystal_without_integrated_reflections(stream, tmp_path, caplog):
    whole = read(tmp_path / "a.stream", stream)
    with caplog.at_level("INFO"):
        data = read(tmp_path / "b.stream", without_list(stream, 1))
    assert (len(whole), len(data), data.n_images) == (618, 618 - 102, 2)
    same(data, whole, whole.image != 1)
    assert "1 crystals have no integrated reflections" in caplog.text


def test_no_crystal_was_integrated(stream, tmp_path):
    none = stream.replace(
        b"Reflections measured after indexing\n", b"No integrated reflections.\n"
    )
    with pytest.raises(UserError, match="no integrated crystal"):
        read(tmp_path / "a.stream", none)


def test_photon_energy_of_zero(stream, tmp_path, caplog):
    whole = read(tmp_path / "a.stream", stream)
    data = read(tmp_path / "b.stream", stream.replace(b"eV = 9700.0", b"eV = 0.0", 1))
    same(data, whole, whole.image != 0)
    assert np.isfinite(data.wavelength).all()
    assert "1 crystals without photon energy" in caplog.text
    with pytest.raises(UserError, match="known photon energy"):
        read(tmp_path / "c.stream", stream.replace(b"eV = 9700.0", b"eV = 0.0"))


def test_line_ends_of_other_systems_and_compression(stream, tmp_path, monkeypatch):
    whole = read(tmp_path / "a.stream", stream)
    crlf = stream.replace(b"\n", b"\r\n")
    same(read(tmp_path / "b.stream", crlf), whole)
    same(read(tmp_path / "c.stream.gz", gzip.compress(stream)), whole)
    # line ends that fall between two reads
    monkeypatch.setattr("braggflux.merge.io.formats.crystfel_stream._PIECE", 61)
    (again,) = stream_chunks(tmp_path / "b.stream", SPACE_GROUP)
    same(again, whole)
