"""Observations on disk: what goes in comes out, image range by image range."""

from __future__ import annotations

import os
from dataclasses import replace

import gemmi
import h5py
import numpy as np
import pytest

from integrator.errors import UserError
from merge.io.unmerged_data import UnmergedData, read_unmerged
from merge.io.unmerged_store import UnmergedStore, write_unmerged_store

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
    (again,) = read_unmerged([tmp_path / "a.h5"])
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
    with pytest.raises(UserError, match="cannot open"):
        UnmergedStore(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(UserError, match="cannot open"):
        UnmergedStore(tmp_path / "text.h5")
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(UserError, match="not a store"):
        UnmergedStore(tmp_path / "other.h5")
