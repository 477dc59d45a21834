"""NXmx masters of every storage layout: the frames, the codes, and what is wrong with a file."""

import h5py
import hdf5plugin
import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.hdf5.frames import FrameStack
from braggflux.integrator.io.hdf5.nxmx import NxmxFrames
from braggflux.integrator.io.hdf5.photons import INVALID

N, SLOW, FAST = 7, 12, 10
SHAPE = (SLOW, FAST)
COMPRESSION = {
    "bitshuffle-lz4": hdf5plugin.Bitshuffle(cname="lz4"),
    "bitshuffle-zstd": hdf5plugin.Bitshuffle(cname="zstd"),
    "lz4": hdf5plugin.LZ4(),
    "gzip": {"compression": "gzip"},
    "none": {},
}


def counts(dtype="u2", n=N, shape=SHAPE) -> np.ndarray:
    """Frames that differ everywhere, with a mask code in one corner where the type has one."""
    values = np.random.default_rng(5).poisson(20, (n, *shape)) + np.arange(n).reshape(
        -1, *[1] * len(shape)
    )
    frames = values.astype(dtype)
    if frames.dtype.kind == "u":
        frames[:, ..., 0, 0] = np.iinfo(dtype).max
        frames[:, ..., 0, 1] = np.iinfo(dtype).max - 1
    else:
        frames[:, ..., 0, 0] = -1
        frames[:, ..., 0, 1] = -2
    return frames


def expected(frames: np.ndarray) -> np.ndarray:
    """Codes of unsigned types are INVALID; -1 may be noise in signed ones, and stays."""
    image = frames.astype(np.int64)
    if frames.dtype.kind == "u":
        image[..., 0, :2] = INVALID
    return image


def master(tmp_path, **fields) -> h5py.File:
    file = h5py.File(tmp_path / "x_master.h5", "w")
    file.create_group("entry/data").attrs["NX_class"] = "NXdata"
    file["entry"].attrs["NX_class"] = "NXentry"
    detector = file.create_group("entry/instrument/detector")
    detector.attrs["NX_class"] = "NXdetector"
    for name, value in fields.items():
        detector[name.replace("__", "/")] = value
    return file


def add_data_files(tmp_path, file, frames, per_file, **storage) -> list[str]:
    """data_000001 ... behind external links, named so that file order is not link order."""
    names = []
    for number, start in enumerate(range(0, len(frames), per_file), 1):
        name = f"{'zyxwvu'[number]}_data.h5"
        part = frames[start : start + per_file]
        with h5py.File(tmp_path / name, "w") as data:
            data.create_dataset("entry/data/data", data=part, **storage)
        file[f"entry/data/data_{number:06d}"] = h5py.ExternalLink(name, "/entry/data/data")
        names.append(name)
    return names


def read_all(path, n=N, names=("p",), shapes=(SHAPE,), **keywords) -> np.ndarray:
    with NxmxFrames(path, names, shapes, **keywords) as source:
        assert source.n_images == n
        return np.array([source.read(i)[0] for i in range(n)])


@pytest.mark.parametrize("compression", COMPRESSION)
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "i4"])
def test_linked_files_of_every_type_and_compression(tmp_path, compression, dtype):
    frames = counts(dtype)
    with master(tmp_path) as file:
        add_data_files(tmp_path, file, frames, 3, chunks=(1, *SHAPE), **COMPRESSION[compression])
    image = read_all(tmp_path / "x_master.h5")
    assert image.dtype == np.int32
    np.testing.assert_array_equal(image, expected(frames))


def test_one_linked_data_set(tmp_path):
    frames = counts()
    with h5py.File(tmp_path / "x_000001.h5", "w") as data:
        data["data"] = frames
    with master(tmp_path) as file:
        file["entry/data/data"] = h5py.ExternalLink("x_000001.h5", "/data")
    np.testing.assert_array_equal(read_all(tmp_path / "x_master.h5"), expected(frames))


def virtual_master(tmp_path, frames, layout, sources) -> None:
    for name, part in sources.items():
        with h5py.File(tmp_path / name, "w") as data:
            data.create_dataset("data", data=part, chunks=(1, *part.shape[1:]))
    with master(tmp_path) as file:
        file["entry/data"].create_virtual_dataset("data", layout)


@pytest.mark.parametrize("way", ["blocks", "interleaved", "tiles"])
def test_virtual_data_set(tmp_path, way):
    frames = counts(n=8)
    layout = h5py.VirtualLayout(frames.shape, frames.dtype)
    if way == "blocks":
        parts = {"a.h5": np.s_[:5], "b.h5": np.s_[5:]}
    elif way == "interleaved":
        parts = {"a.h5": np.s_[0::2], "b.h5": np.s_[1::2]}
    else:
        parts = {"a.h5": np.s_[:, :5], "b.h5": np.s_[:, 5:]}
    for name, part in parts.items():
        layout[part] = h5py.VirtualSource(name, "data", frames[part].shape, frames.dtype)
    virtual_master(tmp_path, frames, layout, {k: frames[v] for k, v in parts.items()})
    np.testing.assert_array_equal(read_all(tmp_path / "x_master.h5", 8), expected(frames))

    (tmp_path / "b.h5").unlink()  # HDF5 itself would return zeros
    with pytest.raises(UserError, match=r"no image file .*b\.h5"):
        NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE])


def test_virtual_data_set_with_a_hole(tmp_path):
    frames = counts()
    layout = h5py.VirtualLayout(frames.shape, frames.dtype)
    layout[:4] = h5py.VirtualSource("a.h5", "data", (4, *SHAPE), frames.dtype)
    virtual_master(tmp_path, frames, layout, {"a.h5": frames[:4]})
    with pytest.raises(UserError, match=r"frame 4 of the virtual data set .* has no source"):
        NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE])


def add_module(file, name, origin, size) -> None:
    module = file.create_group(f"entry/instrument/detector/{name}")
    module.attrs["NX_class"] = "NXdetector_module"
    module["data_origin"], module["data_size"] = origin, size


@pytest.mark.parametrize("by_name", [True, False])
def test_modules_are_slices_of_one_image(tmp_path, by_name):
    frames = counts()
    mask = np.zeros(SHAPE, "u4")
    mask[7, 2] = 1
    with master(tmp_path, pixel_mask=mask) as file:
        file["entry/data/data"] = frames
        add_module(file, "module_a", [0, 0], [5, FAST])
        add_module(file, "module_b", [6, 1], [6, 8])
    prefix = "/entry/instrument/detector/" if by_name else "panel "
    names = [f"{prefix}module_b", f"{prefix}module_a"]
    shapes = [(6, 8), (5, FAST)]
    cuts = [np.s_[6:12, 1:9], np.s_[0:5, :]]
    if not by_name:
        names, shapes, cuts = names[::-1], shapes[::-1], cuts[::-1]
    with NxmxFrames(tmp_path / "x_master.h5", names, shapes) as source:
        for panel, cut in zip(source.read(3), cuts, strict=True):
            np.testing.assert_array_equal(panel, expected(frames)[3][cut])
        for good, cut in zip(source.pixel_mask(), cuts, strict=True):
            np.testing.assert_array_equal(good, mask[cut] == 0)


@pytest.mark.parametrize("with_modules", [True, False])
def test_leading_panel_dimension(tmp_path, with_modules):
    frames = counts(shape=(3, *SHAPE))
    mask = np.zeros((3, *SHAPE), "u4")
    mask[1, 4, 4] = 8
    with master(tmp_path, pixel_mask=mask) as file:
        file["entry/data/data"] = frames
        for i in range(3 * with_modules):
            add_module(file, f"module_{i}", [i, 0, 0], [1, *SHAPE])
    with NxmxFrames(tmp_path / "x_master.h5", list("abc"), [SHAPE] * 3) as source:
        np.testing.assert_array_equal(source.read(2), expected(frames)[2])
        assert [int((~good).sum()) for good in source.pixel_mask()] == [0, 1, 0]


@pytest.mark.parametrize("names", [["a", "b"], ["a"]])
def test_panels_of_another_detector(tmp_path, names):
    with master(tmp_path) as file:
        file["entry/data/data"] = counts()
    with pytest.raises(UserError, match="do not fit"):
        NxmxFrames(tmp_path / "x_master.h5", names, [(SLOW + 1, FAST)] * len(names))


def test_frames_in_order_are_decompressed_once(tmp_path, monkeypatch):
    frames = counts(n=10)
    with master(tmp_path) as file:
        packing = {"compression": "gzip", "fletcher32": True}
        add_data_files(tmp_path, file, frames, 5, chunks=(2, *SHAPE), **packing)
    loads = []
    load = FrameStack._load
    monkeypatch.setattr(
        FrameStack, "_load", lambda self, *a: (loads.append(a[1:]), load(self, *a))[1]
    )
    np.testing.assert_array_equal(read_all(tmp_path / "x_master.h5", 10), expected(frames))
    assert loads == [(0, 2), (2, 2), (4, 2)] * 2  # start and depth of the chunks of two files


def test_code_of_a_smaller_bit_depth(tmp_path):
    frames = counts("u2").astype("u4")  # 65535 and 65534 kept while stored with 32 bits
    with master(tmp_path, bit_depth_image=16) as file:
        file["entry/data/data"] = frames
    np.testing.assert_array_equal(read_all(tmp_path / "x_master.h5"), expected(frames))


def test_readout_depth_is_no_code(tmp_path):
    """Eiger counts with 12 bits and sums into 32: 4095 photons are 4095 photons."""
    frames = counts("u4")
    frames[:, 5, 5] = 2**12 - 1
    with master(tmp_path, bit_depth_readout=12, bit_depth_image=32) as file:
        file["entry/data/data"] = frames
    np.testing.assert_array_equal(read_all(tmp_path / "x_master.h5"), expected(frames))


def test_floating_point_frames(tmp_path):
    frames = counts("i4").astype("f4")
    frames[:, 0, 0] = np.nan
    frames[:, 3, 3] += 0.3
    with master(tmp_path) as file:
        file["entry/data/data"] = frames
    frames[:, 0, 0] = INVALID
    np.testing.assert_array_equal(read_all(tmp_path / "x_master.h5"), frames)


@pytest.mark.parametrize(
    ("dtype", "codes"),
    [("i2", (-(2**15), 2**15 - 1)), ("i4", (-(2**31), 2**31 - 1, 2**31 - 2)), ("i8", (-(2**40),))],
)
def test_codes_of_signed_types(tmp_path, dtype, codes):
    frames = counts(dtype)
    frames[:, 1, : len(codes)] = codes
    with master(tmp_path) as file:
        file["entry/data/data"] = frames
    image = frames.astype(np.int64)
    image[:, 1, : len(codes)] = INVALID
    np.testing.assert_array_equal(read_all(tmp_path / "x_master.h5"), image)


@pytest.mark.parametrize(
    ("name", "linked"),
    [("pixel_mask", False), ("detectorSpecific__pixel_mask", False), ("pixel_mask", True)],
)
def test_pixel_mask(tmp_path, name, linked):
    mask = np.zeros(SHAPE, "u4")
    mask[2, 3], mask[4, 5] = 1, 2**31
    with h5py.File(tmp_path / "meta.h5", "w") as meta:
        meta["mask"] = mask
    value = h5py.ExternalLink("meta.h5", "/mask") if linked else mask
    with master(tmp_path, **{name: value}) as file:
        file["entry/data/data"] = counts()
    with NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE]) as source:
        np.testing.assert_array_equal(source.pixel_mask()[0], mask == 0)


def test_pixel_mask_of_another_size(tmp_path):
    with master(tmp_path, pixel_mask=np.zeros((3, 4), "u4")) as file:
        file["entry/data/data"] = counts()
    with (
        NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE]) as source,
        pytest.raises(UserError, match="pixel mask"),
    ):
        source.pixel_mask()


def assert_one_line(error, path) -> None:
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_linked_file(tmp_path):
    frames = counts()
    with master(tmp_path) as file:
        names = add_data_files(tmp_path, file, frames, 3)
    (tmp_path / names[2]).unlink()
    with pytest.raises(UserError, match=r"no image file .* linked by .*x_master") as error:
        NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE])
    assert_one_line(error, tmp_path / names[2])
    # what is there can still be read
    with NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE], needed=range(6)) as source:
        np.testing.assert_array_equal(source.read(5)[0], expected(frames)[5])


def test_truncated_linked_file(tmp_path):
    with master(tmp_path) as file:
        names = add_data_files(tmp_path, file, counts(), 3)
    data = tmp_path / names[1]
    data.write_bytes(data.read_bytes()[:-400])
    with pytest.raises(UserError, match="truncated") as error:
        NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE])
    assert_one_line(error, data)


def test_damaged_chunk(tmp_path):
    frames = counts()
    with master(tmp_path) as file:
        (name,) = add_data_files(
            tmp_path, file, frames, N, chunks=(1, *SHAPE), **COMPRESSION["bitshuffle-lz4"]
        )
    with h5py.File(tmp_path / name) as data:
        chunk = data["entry/data/data"].id.get_chunk_info(4)
    with (tmp_path / name).open("r+b") as data:
        data.seek(chunk.byte_offset)
        data.write(b"\xff" * chunk.size)
    with NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE]) as source:
        source.read(3)
        with pytest.raises(UserError, match=r"frame 4 of .* cannot be decoded") as error:
            source.read(4)
    assert_one_line(error, tmp_path / name)


def test_frames_that_were_never_written(tmp_path):
    with master(tmp_path) as file:
        data = file.create_dataset("entry/data/data", (N, *SHAPE), "u2", chunks=(1, *SHAPE))
        data[:5] = counts()[:5]
    with pytest.raises(UserError, match=r"frame 5 of .* never written"):
        NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE])
    NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE], needed=range(5)).close()


def test_fewer_images_than_asked_for(tmp_path):
    with master(tmp_path) as file:
        add_data_files(tmp_path, file, counts(), 4)
    with pytest.raises(UserError, match="has 7 images, and image 9 is asked for"):
        NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE], needed=range(9))


def test_files_that_do_not_belong_together(tmp_path):
    with master(tmp_path) as file:
        add_data_files(tmp_path, file, counts(), N)
        file["entry/data/data_000002"] = counts("u4")
    with pytest.raises(UserError, match="different data sets"):
        NxmxFrames(tmp_path / "x_master.h5", ["p"], [SHAPE])


def test_what_is_not_a_master_file(tmp_path):
    path = tmp_path / "x_master.h5"
    with pytest.raises(UserError, match="no image file"):
        NxmxFrames(path, ["p"], [SHAPE])
    path.write_text("not HDF5")
    with pytest.raises(UserError, match="not a readable HDF5 file") as error:
        NxmxFrames(path, ["p"], [SHAPE])
    assert_one_line(error, path)
    with h5py.File(path, "w") as file:
        file["volume"] = np.zeros(3)
    with pytest.raises(UserError, match="no group entry/data"):
        NxmxFrames(path, ["p"], [SHAPE])
    master(tmp_path).close()
    with pytest.raises(UserError, match="no data, data_000001"):
        NxmxFrames(path, ["p"], [SHAPE])
    with master(tmp_path) as file:
        file["entry/data/data"] = np.zeros(5)
    with pytest.raises(UserError, match="not a stack of frames"):
        NxmxFrames(path, ["p"], [SHAPE])
    with master(tmp_path) as file:
        file["entry/data/data_000001"] = h5py.ExternalLink("x_master.h5", "/nowhere")
    with pytest.raises(UserError, match="no readable object /nowhere"):
        NxmxFrames(path, ["p"], [SHAPE])
