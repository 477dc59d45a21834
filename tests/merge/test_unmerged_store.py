"""Observations on disk: what goes in comes out, image range by image range."""

from __future__ import annotations

import os
from dataclasses import replace

import gemmi
import h5py
import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.crystfel_stream import read_stream
from braggflux.merge.io.formats.mtz_observations import read_mtz
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.read import read_table
from braggflux.merge.io.stores.store_conversion import convert_to_store
from braggflux.merge.io.stores.unmerged_store import UnmergedStore, write_unmerged_store

CELL = gemmi.UnitCell(79.0, 79.0, 38.0, 90, 90, 90)


def make(n_images, seed, *, wavelength=True, cell=CELL):
    """Make images of 0 to 40 observations, the last one not empty; float32 values."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 40, n_images)
    counts[-1] += 1
    n = counts.sum()
    values = rng.normal(size=(5, n)).astype(np.float32).astype(float)
    return UnmergedData(
        miller_index=rng.integers(-300, 300, (n, 3)).astype(np.int32),
        intensity=values[0],
        sigma=np.abs(values[1]),
        image=np.repeat(np.arange(n_images), counts),
        wavelength=values[2] if wavelength else None,
        metadata={"x": values[3], "ewald_offset": values[4]},
        cell=cell,
        space_group=gemmi.SpaceGroup("R 3:R"),
        name=f"part{seed}",
        has_lp_applied=True,
    )


def assert_equal(first: UnmergedData, second: UnmergedData):
    for name in ("miller_index", "intensity", "sigma", "image", "wavelength"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.metadata.keys() == second.metadata.keys()
    for name in first.metadata:
        np.testing.assert_array_equal(first.metadata[name], second.metadata[name])
    assert first.space_group.xhm() == second.space_group.xhm()
    assert first.has_lp_applied == second.has_lp_applied


@pytest.mark.parametrize("wavelength", [True, False])
def test_round_trip(tmp_path, wavelength):
    parts = [make(n, seed, wavelength=wavelength) for seed, n in enumerate((5, 1, 9))]
    write_unmerged_store(tmp_path / "a.h5", parts)
    with UnmergedStore(tmp_path / "a.h5") as store:
        assert (store.n_images, len(store)) == (15, sum(map(len, parts)))
        assert store.name == "part0"
        assert store.has_wavelength is wavelength
        assert store.cell.parameters == pytest.approx(CELL.parameters)
        for first, part in zip((0, 5, 6), parts, strict=True):
            assert_equal(store.read(first, first + part.n_images), part)
        whole = store.read()
        np.testing.assert_array_equal(
            whole.intensity, np.concatenate([part.intensity for part in parts])
        )
        np.testing.assert_array_equal(whole.image_starts, store.image_starts)
    (again,) = read_table([tmp_path / "a.h5"])
    assert_equal(again, whole)


def test_blocks_cover_every_image_once(tmp_path):
    write_unmerged_store(tmp_path / "a.h5", [make(10, 0), make(7, 1)])
    with UnmergedStore(tmp_path / "a.h5") as store:
        blocks = list(store.blocks(4))
        assert [first for first, _ in blocks] == [0, 4, 8, 12, 16]
        rows = np.concatenate([first + data.image for first, data in blocks])
        np.testing.assert_array_equal(rows, store.read().image)


def test_the_cell_is_the_mean_over_images(tmp_path):
    other = gemmi.UnitCell(80.0, 80.0, 38.0, 90, 90, 90)
    write_unmerged_store(tmp_path / "a.h5", [make(30, 0), make(10, 1, cell=other)], name="both")
    with UnmergedStore(tmp_path / "a.h5") as store:
        assert store.cell.a == pytest.approx(79.25)
        assert store.name == "both"


def test_a_range_outside_is_refused(tmp_path):
    write_unmerged_store(tmp_path / "a.h5", [make(3, 0)])
    with UnmergedStore(tmp_path / "a.h5") as store:
        assert len(store.read(1, 1)) == 0
        for first, last in ((-1, 2), (2, 1), (0, 4)):
            with pytest.raises(IndexError):
                store.read(first, last)


def test_nothing_is_left_of_a_store_that_failed(tmp_path):
    def chunks():
        yield make(3, 0)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_unmerged_store(tmp_path / "a.h5", chunks())
    with pytest.raises(UserError, match="no observations"):
        write_unmerged_store(tmp_path / "a.h5", [])
    different = replace(make(3, 0), metadata={})
    with pytest.raises(ValueError, match="differ in columns"):
        write_unmerged_store(tmp_path / "a.h5", [make(3, 0), different])
    wild = make(3, 0)
    with pytest.raises(UserError, match="beyond 32767"):
        write_unmerged_store(
            tmp_path / "a.h5", [replace(wild, miller_index=wild.miller_index * 1000)]
        )
    assert os.listdir(tmp_path) == []


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        UnmergedStore(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(UserError, match="damaged or incomplete"):
        UnmergedStore(tmp_path / "text.h5")
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(UserError, match="not a store"):
        UnmergedStore(tmp_path / "other.h5")


class TestConversion:
    @pytest.mark.realdata
    @pytest.mark.parametrize("rows", [5_000, 1_000_000])
    def test_an_mtz_file_gives_what_the_reader_gives(self, shared, tmp_path, rows):
        path = shared / "data" / "thermolysin_xfel" / "friedel_minus_n395.mtz"
        convert_to_store(path, tmp_path / "a.h5", rows_at_a_time=rows)
        with UnmergedStore(tmp_path / "a.h5") as store:
            assert_equal(store.read(), read_mtz(path))
            assert store.cell.parameters == pytest.approx(read_mtz(path).cell.parameters)
        assert os.listdir(tmp_path) == ["a.h5"]

    @pytest.mark.realdata
    def test_rows_in_the_order_of_indices_and_of_the_other_byte_order(self, shared, tmp_path):
        path = shared / "data" / "thermolysin_xfel" / "friedel_minus_n395.mtz"
        mtz = gemmi.read_mtz_file(str(path))
        rows = np.array(mtz)
        mtz.set_data(rows[np.lexsort(rows[:, 2::-1].T)])
        content = mtz.write_to_bytes()
        n = 4 * rows.size
        swapped = np.frombuffer(content[80 : 80 + n], np.uint32).byteswap().tobytes()
        header = b"MTZ " + np.frombuffer(content[4:8], np.uint32).byteswap().tobytes()
        header += b"\x11\x11\x00\x00" + content[12:80]
        (tmp_path / "b.mtz").write_bytes(header + swapped + content[80 + n :])
        convert_to_store(tmp_path / "b.mtz", tmp_path / "b.h5", rows_at_a_time=7_000)
        with UnmergedStore(tmp_path / "b.h5") as store:
            assert_equal(store.read(), replace(read_mtz(tmp_path / "b.mtz"), name="b"))
            assert store.n_images == 395

    @pytest.mark.realdata
    def test_a_stream(self, shared, tmp_path):
        path = shared / "data" / "small" / "crystfel.stream"
        group = gemmi.SpaceGroup("P 43 21 2")
        convert_to_store(path, tmp_path / "a.h5", space_group=group)
        with UnmergedStore(tmp_path / "a.h5") as store:
            data, whole = store.read(), read_stream(path, group)
        np.testing.assert_array_equal(data.miller_index, whole.miller_index)
        np.testing.assert_allclose(data.intensity, whole.intensity, rtol=1e-6)

    @pytest.mark.realdata
    def test_refused(self, shared, tmp_path):
        source = shared / "data" / "thermolysin_xfel" / "friedel_minus_n395.mtz"
        mtz = gemmi.read_mtz_file(str(source))
        rows = np.array(mtz)
        rows[9, -1] += 256
        mtz.set_data(rows)
        mtz.write_to_file(str(tmp_path / "partial.mtz"))
        (tmp_path / "cut.mtz").write_bytes(source.read_bytes()[:90_000])
        (tmp_path / "a.hkl").touch()
        for name, words in (
            ("partial.mtz", "holds partials"),
            ("cut.mtz", "not a complete MTZ"),
            ("a.hkl", "none of the files"),
            ("none.mtz", "does not exist"),
        ):
            with pytest.raises(UserError, match=words):
                convert_to_store(tmp_path / name, tmp_path / "a.h5", rows_at_a_time=5000)
        assert not (tmp_path / "a.h5").exists()
