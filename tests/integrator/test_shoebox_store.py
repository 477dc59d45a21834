"""The store: round trip, order, cache, refusal of foreign files; minibatches and the split."""

import shutil
from dataclasses import fields

import h5py
import hdf5plugin  # noqa: F401 - registers the filter of the store
import numpy as np
import pytest
import torch

import braggflux
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.shoebox_store import (
    VERSION,
    BackgroundField,
    ShoeboxStore,
    writing_store,
)
from braggflux.integrator.shoebox import dataset as dataset_module
from braggflux.integrator.shoebox.dataset import ShoeboxDataset
from braggflux.integrator.shoebox.mask import MaskBit
from braggflux.integrator.types import Flag, ReflectionMetadata

BOX = (3, 7, 5)
N = 6000  # several chunks of the file


def make_columns(n: int = N) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    columns = {}
    for field in fields(ReflectionMetadata):
        if field.name in ("refl_row", "experiment", "panel"):
            columns[field.name] = np.arange(n) if field.name == "refl_row" else np.zeros(n, int)
        elif field.name in ("miller_index", "corner"):
            columns[field.name] = rng.integers(-50, 50, (n, 3))
        elif field.name == "frames_per_layer":
            columns[field.name] = rng.integers(1, 4, n)
        elif field.name in ("d", "lp", "zeta", "frame_sigma"):
            columns[field.name] = rng.uniform(0.5, 5, n)
        else:
            columns[field.name] = rng.normal(size=(n, 3)) * 100
    columns["flags"] = np.where(np.arange(n) % 10 == 0, Flag.REJECTED, 0)
    columns["experiment"] = (np.arange(n) >= n // 2).astype(int)
    columns["xyz_px"][:, 2] = np.linspace(0, 200, n, endpoint=False)
    return columns


def write(path, counts, mask, dtype=np.uint16, max_count=60_000, columns=None):
    columns = make_columns(len(counts)) if columns is None else columns
    with writing_store(path, len(counts), BOX, np.dtype(dtype)) as writer:
        for start in range(0, len(counts), 777):
            stop = start + 777
            writer.write_boxes(start, counts[start:stop], mask[start:stop])
        writer.write_columns(columns)
        field = BackgroundField([np.full((4, 5), 2.0)], [np.full((4, 5), 8.0)], np.ones(9))
        writer.write_background(0, field)
        writer.write_header({"max_count": max_count}, [{"wavelength": 1.0}])
    return columns


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("store") / "s.h5"
    counts = rng.poisson(20.0, (N, *BOX))
    counts[5, 0, 0, 0] = 60_000  # above the signed 16-bit range
    mask = rng.choice([0, MaskBit.VALID, MaskBit.VALID | MaskBit.OVERLAPPED], (N, *BOX)).astype(
        np.uint8
    )
    mask[5, 0, 0, 0] = MaskBit.VALID
    columns = write(path, counts, mask)
    return path, counts, mask, columns


def test_the_public_opener_knows_it(written):
    with braggflux.open_store(written[0]) as store:
        assert isinstance(store, ShoeboxStore)
        assert len(store) == N


@pytest.mark.parametrize("cached", [False, True])
def test_round_trip_in_any_order(written, cached):
    path, counts, mask, columns = written
    with ShoeboxStore.open(path) as store:
        assert len(store) == N
        assert store.box == BOX
        if cached:
            assert store.cache_in_memory()
        rows = torch.tensor([5, N - 1, 0, 2741, 5])
        batch = store.read(rows)
        is_valid = mask[rows] == MaskBit.VALID
        np.testing.assert_array_equal(batch.is_valid, is_valid)
        np.testing.assert_array_equal(batch.counts, counts[rows] * is_valid)
        np.testing.assert_array_equal(batch.metadata.miller_index, columns["miller_index"][rows])
        kept = store.read(rows, exclude=0)
        np.testing.assert_array_equal(kept.is_valid, (mask[rows] & MaskBit.VALID) > 0)
        raw, bits = store.read_raw(slice(100, 5000))
        np.testing.assert_array_equal(raw, counts[100:5000])
        np.testing.assert_array_equal(bits, mask[100:5000])


def test_metadata_keeps_every_column_in_double_precision(written):
    path, _, _, columns = written
    with ShoeboxStore.open(path) as store:
        metadata = store.metadata(torch.float64)
        for field in fields(ReflectionMetadata):
            np.testing.assert_array_equal(getattr(metadata, field.name), columns[field.name])
        assert store.metadata().d.dtype == torch.float32
        np.testing.assert_array_equal(store.flags, columns["flags"])


def test_an_open_store_holds_no_column_in_double_precision_that_single_serves(written):
    """173 bytes a reflection on 2026-11-30, 325 before: 19 numbers of 4, 11 of 8, 9 beside."""
    with ShoeboxStore.open(written[0]) as store:
        metadata = store.metadata().columns()
        held = sum(v.numel() * v.element_size() for v in metadata.values())
        names = ("flags", "entering", "recorded_fraction")
        held += sum(store.column(name).nbytes for name in names if name in store._columns)
        assert held / N <= 176
        for name, values in metadata.items():
            # one memory for both
            assert values.data_ptr() == store.column(name).__array_interface__["data"][0]


def test_background_and_header_survive(written):
    with ShoeboxStore.open(written[0]) as store:
        field = store.background(0)
        np.testing.assert_array_equal(field.total[0], np.full((4, 5), 2.0))
        np.testing.assert_array_equal(field.count[0], np.full((4, 5), 8.0))
        np.testing.assert_array_equal(field.frame_ratio, np.ones(9))
        assert store.experiments == [{"wavelength": 1.0}]


def test_cache_obeys_its_limit(written):
    with ShoeboxStore.open(written[0]) as store:
        voxels = N * int(np.prod(BOX))
        assert not store.cache_in_memory(3 * voxels - 1)
        assert not store.is_cached
        assert store.cache_in_memory(3 * voxels)


def test_counts_beyond_the_type_are_refused_and_leave_no_file(tmp_path):
    counts = np.full((3, *BOX), 70_000)
    with pytest.raises(UserError, match="70000 does not fit"):
        write(tmp_path / "s.h5", counts, np.ones((3, *BOX), np.uint8))
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "s.h5", counts, np.ones((3, *BOX), np.uint8), np.int32, 70_000)
    with ShoeboxStore.open(tmp_path / "s.h5") as store:
        store.cache_in_memory()
        assert store.read(slice(0, 3)).counts.eq(70_000).all()


def test_foreign_and_damaged_files(written, tmp_path):
    with pytest.raises(UserError, match="no shoebox store"):
        ShoeboxStore.open(tmp_path / "none.h5")
    content = written[0].read_bytes()
    short = tmp_path / "short.h5"
    short.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"damaged or incomplete .*truncated"):
        ShoeboxStore.open(short)
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    with pytest.raises(UserError, match="file signature not found"):
        ShoeboxStore.open(text)
    newer = tmp_path / "newer.h5"
    newer.write_bytes(content)
    with h5py.File(newer, "r+") as file:
        file.attrs["version"] = 99
    with pytest.raises(UserError, match="version 99, but this program reads"):
        ShoeboxStore.open(newer)
    with h5py.File(newer, "r+") as file:
        file.attrs["version"] = VERSION
        del file["reflections/d"]
    with pytest.raises(UserError, match="incomplete"):
        ShoeboxStore.open(newer)
    with h5py.File(newer, "r+") as file:
        file.attrs["format"] = "other"
    with pytest.raises(UserError, match="format 'other'"):
        ShoeboxStore.open(newer)


@pytest.mark.parametrize("is_large", [False, True])
def test_an_epoch_has_every_row_once_and_follows_its_seed(written, monkeypatch, is_large):
    if is_large:
        monkeypatch.setattr(dataset_module, "POOLED_BYTES", 0)
    with ShoeboxStore.open(written[0]) as store, ShoeboxStore.open(written[0]) as held:
        dataset = ShoeboxDataset(store, byte_limit=0)
        in_memory = ShoeboxDataset(held)
        assert (store.is_cached, held.is_cached) == (False, True)

        def epoch(seed, dataset=dataset):
            generator = torch.Generator().manual_seed(seed)
            batches = list(dataset.batches(500, generator))
            assert len(batches) == dataset.n_batches(500)
            return torch.cat([b.metadata.refl_row for b in batches])

        first = epoch(0)
        expected = torch.tensor([i for i in range(N) if i % 10])  # rejected ones are left out
        torch.testing.assert_close(first.sort().values, expected)
        torch.testing.assert_close(first, epoch(0))
        # processes of one run may differ in what they have room for
        torch.testing.assert_close(first, epoch(0, in_memory))
        assert not torch.equal(first, epoch(1))
        in_order = torch.cat([b.metadata.refl_row for b in dataset.batches(500)])
        torch.testing.assert_close(in_order, expected)


def test_no_store_is_begun_without_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    shape = (N, *BOX)
    write(tmp_path / "fits.h5", np.zeros(shape, np.int32), np.ones(shape, np.uint8))
    message = r"1000000 shoeboxes need about .* GB, .* has 0.01 GB free; make room"
    with (
        pytest.raises(UserError, match=message),
        writing_store(tmp_path / "a.h5", 1_000_000, BOX, np.dtype(np.uint16)),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["fits.h5"]
