"""Frames whose packing cannot be checked first are decoded in a process that may crash."""

import h5py
import hdf5plugin
import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.decoding import apart
from braggflux.integrator.io.decoding.chunk_check import is_guarded
from braggflux.integrator.io.file_kinds import MASTER, SHOEBOXES, file_kind
from braggflux.integrator.io.hdf5.checked import write_attributes, writing_checked
from braggflux.integrator.io.hdf5.nxmx import NxmxFrames

VALUES = np.random.default_rng(0).poisson(3.0, (4, 12, 10)).astype("u2")
PACKINGS = {
    "blosc": hdf5plugin.Blosc(cname="lz4", shuffle=hdf5plugin.Blosc.BITSHUFFLE),
    "gzip after shuffle": {"compression": "gzip", "shuffle": True},
}


def group_of_frames(file: h5py.File) -> h5py.Group:
    file.create_group("entry").attrs["NX_class"] = "NXentry"
    group = file.create_group("entry/data")
    group.attrs["NX_class"] = "NXdata"
    return group


@pytest.mark.parametrize("packing", PACKINGS)
def test_frames_of_other_packings(tmp_path, packing):
    """Each as it was written, in any order; the damaged one named."""
    path = tmp_path / "a_master.h5"
    with h5py.File(path, "w") as file:
        frames = group_of_frames(file).create_dataset(
            "data", data=VALUES, chunks=(1, 12, 10), **PACKINGS[packing]
        )
        assert not is_guarded(frames)
        _, content = frames.id.read_direct_chunk((1, 0, 0))
        frames.id.write_direct_chunk((1, 0, 0), content[:-9])
    with NxmxFrames(path, ["p"], [(12, 10)]) as source:
        for number in (3, 0, 2):
            np.testing.assert_array_equal(source.read(number)[0], VALUES[number])
        with pytest.raises(UserError, match=r"frame 1 of .*a_master.h5 cannot be decoded"):
            source.read(1)
        np.testing.assert_array_equal(source.read(3)[0], VALUES[3])


def test_tiles_with_a_damaged_one(tmp_path):
    path = tmp_path / "a_master.h5"
    layout = h5py.VirtualLayout(VALUES.shape, VALUES.dtype)
    with h5py.File(tmp_path / "tiles.h5", "w") as file:
        for name, rows in (("top", slice(None, 6)), ("bottom", slice(6, None))):
            tile = VALUES[:, rows]
            packing = hdf5plugin.Bitshuffle(cname="lz4")
            made = file.create_dataset(name, data=tile, chunks=(1, 6, 10), **packing)
            layout[:, rows] = h5py.VirtualSource("tiles.h5", name, tile.shape)
        _, content = made.id.read_direct_chunk((2, 0, 0))
        made.id.write_direct_chunk((2, 0, 0), content[:14] + b"\xff\xff" + content[16:])
    with h5py.File(path, "w") as file:
        group_of_frames(file).create_virtual_dataset("data", layout)
    with NxmxFrames(path, ["p"], [(12, 10)]) as source:
        np.testing.assert_array_equal(source.read(0)[0], VALUES[0])
        with pytest.raises(UserError, match="frame 2 of "):
            source.read(2)
        np.testing.assert_array_equal(source.read(3)[0], VALUES[3])


def test_a_process_that_ends_is_told_of_and_the_next_file_is_read(tmp_path):
    path = tmp_path / "a_master.h5"
    with h5py.File(path, "w") as file:
        group_of_frames(file).create_dataset("data", data=VALUES)
    reader = apart.Apart()
    assert (
        "exit code" in reader.ask({"open": str(path), "needed": [], "seconds": "no number"})["end"]
    )
    request = {"open": str(path), "names": ["p"], "shapes": [(12, 10)], "needed": [0]}
    assert reader.ask(request | {"seconds": 9})["content"].all()


def test_the_mask_is_decoded_in_the_other_process_alone(tmp_path):
    path = tmp_path / "a_master.h5"
    mask = np.zeros((12, 10), "u4")
    mask[3, 4] = 1
    with h5py.File(path, "w") as file:
        group_of_frames(file).create_dataset("data", data=VALUES)
        detector = file.create_group("entry/instrument/detector")
        detector.attrs["NX_class"] = "NXdetector"
        detector.create_dataset("pixel_mask", data=mask, chunks=(5, 6), compression="gzip")
    good = apart.opened_apart(path, ["p"], [(12, 10)], range(4))
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/pixel_mask"].id.write_direct_chunk((0, 0), b"damaged")
    with NxmxFrames(path, ["p"], [(12, 10)], good=good) as source:
        np.testing.assert_array_equal(source.pixel_mask()[0], mask == 0)


def test_masks_by_image_are_left_to_the_reader_of_the_frames(tmp_path):
    path = tmp_path / "a_master.h5"
    masks = np.zeros(VALUES.shape, "u4")
    masks[1, 3, 4] = 1
    with h5py.File(path, "w") as file:
        group_of_frames(file).create_dataset("data", data=VALUES)
        file["entry/instrument/detector/pixel_mask"] = masks
    assert apart.opened_apart(path, ["p"], [(12, 10)], range(4)) is None
    assert apart.opened_apart(path, ["p"], [(12, 10)], [0, 2]).all()


def test_kinds_of_files_of_others_are_told_by_the_other_process(tmp_path, monkeypatch):
    """A store of this program by this one, whose structure has checksums."""
    frames, store = tmp_path / "a_master.h5", tmp_path / "s.h5"
    with h5py.File(frames, "w") as file:
        group_of_frames(file).create_dataset("data", data=VALUES)
        file.create_group("entry/instrument")
    with writing_checked(store) as file:
        write_attributes(file, {"format": "braggflux-shoeboxes"})
    assert file_kind(frames) == MASTER
    monkeypatch.setattr(apart, "CPU_SECONDS", "no number")
    assert file_kind(store) == SHOEBOXES
    with pytest.raises(UserError, match=r"a_master.h5 is damaged: reading it crashed .*copy it"):
        file_kind(frames)


def test_a_crash_is_one_line(tmp_path, monkeypatch):
    """The suite of damaged files has real ones; here the process ends for another reason."""
    path = tmp_path / "a_master.h5"
    path.write_bytes(b"")
    monkeypatch.setattr(apart, "CPU_SECONDS", "no number")
    with pytest.raises(
        UserError, match=r"a_master.h5 or a file that it names is damaged: reading"
    ):
        apart.opened_apart(path, ["p"], [(12, 10)], range(4))
