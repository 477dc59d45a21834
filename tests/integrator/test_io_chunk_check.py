"""Packed chunks: sound ones pass, and no damaged one reaches a decoder that could crash."""

import h5py
import hdf5plugin
import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.decoding.chunk_check import require_decodable
from braggflux.integrator.io.hdf5.nxmx import NxmxFrames

PACKINGS = {
    "bitshuffle-lz4": hdf5plugin.Bitshuffle(cname="lz4"),
    "bitshuffle-lz4 in small blocks": hdf5plugin.Bitshuffle(nelems=64, cname="lz4"),
    "bitshuffle-zstd": hdf5plugin.Bitshuffle(cname="zstd"),
    "bitshuffle": hdf5plugin.Bitshuffle(cname="none"),
    "lz4": hdf5plugin.LZ4(),
    "lz4 in small blocks": hdf5plugin.LZ4(nbytes=64),
    "gzip": {"compression": "gzip"},
    "none": {},
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f8"])
def test_sound_chunks_pass(tmp_path, packing, dtype):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for k, shape in enumerate([(3, 12, 10), (3, 5, 7), (2, 100, 130), (4, 3, 1)]):
            for mean in (0.05, 20.0, 100.0):
                values = rng.poisson(mean, shape).astype(dtype)
                for chunks in ((1, *shape[1:]), (2, -(-shape[1] // 2), shape[2])):
                    name = f"{k} {mean} {chunks}"
                    file.create_dataset(name, data=values, chunks=chunks, **PACKINGS[packing])
        for dataset in file.values():
            require_decodable(dataset)
            require_decodable(dataset, range(1, 2))


def test_any_damage_of_lengths_is_found(tmp_path):
    """The header, the lengths of blocks, and tokens and offsets of LZ4 within them."""
    values = np.random.default_rng(0).poisson(0.3, (1, 64, 64)).astype("u2")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset(
            "a", data=values, chunks=values.shape, **hdf5plugin.Bitshuffle(cname="lz4")
        )
        _, content = dataset.id.read_direct_chunk((0, 0, 0))
        for end in (5, 12, 14, len(content) // 2, len(content) - 1):
            dataset.id.write_direct_chunk((0, 0, 0), content[:end])
            with pytest.raises(OSError, match="damaged"):
                require_decodable(dataset)
        for place in range(8):
            wrong = bytearray(content)
            wrong[place] ^= 0x41
            dataset.id.write_direct_chunk((0, 0, 0), bytes(wrong))
            with pytest.raises(OSError, match="damaged"):
                require_decodable(dataset)
        for place in [*range(8, 20), *range(20, len(content), 7)]:
            wrong = bytearray(content)
            wrong[place] ^= 0xFF
            dataset.id.write_direct_chunk((0, 0, 0), bytes(wrong))
            try:
                require_decodable(dataset)
            except OSError:
                continue
            assert dataset[()].shape == values.shape  # what passes does not crash the decoder


def test_the_frame_is_named(tmp_path):
    path = tmp_path / "a_master.h5"
    values = np.random.default_rng(0).poisson(3.0, (3, 12, 10)).astype("u2")
    with h5py.File(path, "w") as file:
        file.create_group("entry").attrs["NX_class"] = "NXentry"
        file.create_group("entry/data").attrs["NX_class"] = "NXdata"
        frames = file.create_dataset(
            "entry/data/data",
            data=values,
            chunks=(1, 12, 10),
            **hdf5plugin.Bitshuffle(cname="lz4"),
        )
        _, content = frames.id.read_direct_chunk((1, 0, 0))
        frames.id.write_direct_chunk((1, 0, 0), content[:-9])
    with NxmxFrames(path, ["p"], [(12, 10)]) as source:
        np.testing.assert_array_equal(source.read(0)[0], values[0])
        with pytest.raises(UserError, match=r"frame 1 of .*a_master.h5 cannot be decoded"):
            source.read(1)
        np.testing.assert_array_equal(source.read(2)[0], values[2])
