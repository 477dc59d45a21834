"""Image files that were moved, linked, cut short or not closed: the right frames or a reason.

The frames of one small sweep are stored in every way met in the field; whatever the way, frame i
must be that of the plain data set, or refused, and never zeros or another frame.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.io.hdf5.nxmx import INVALID, NxmxFrames
from braggflux.integrator.io.images import open_frames
from braggflux.pipelines.cli import main

SLOW, FAST = SHAPE = (288, 280)
N = 16
DATA = "entry/data"
FIRST, SECOND = "tiny_data_000001.h5", "tiny_data_000002.h5"  # images 1-10 and 11-16


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    simulate(folder, "tiny", 0)
    return folder


@pytest.fixture(scope="module")
def frames(base) -> np.ndarray:
    """Frames as they are stored, read by h5py alone."""
    with h5py.File(base / "tiny_master.h5") as file:
        return file[DATA]["data"][()]


def boxes(store: Path) -> tuple[np.ndarray, np.ndarray]:
    with h5py.File(store) as file:
        return file["boxes/counts"][()], file["boxes/mask"][()]


def extracted(folder: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Counts and mask of `braggflux extract`."""
    files = [str(folder / name) for name in ("tiny.expt", "tiny.refl")]
    assert main(["extract", *files, "--out", str(out)]) == 0
    return boxes(out)


@pytest.fixture(scope="module")
def control(base, tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    """Shoeboxes of the untouched sweep."""
    return extracted(base, tmp_path_factory.mktemp("control") / "control.h5")


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """Copy of the sweep without its virtual data set and links."""
    copy = tmp_path / "sweep"
    shutil.copytree(base, copy)
    with h5py.File(copy / "tiny_master.h5", "r+") as file:
        for name in list(file[DATA]):
            del file[DATA][name]
    return copy


def link(folder: Path, name: str, target: str, path: str = "/entry/data/data") -> None:
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        file[DATA][name] = h5py.ExternalLink(target, path)


def store(path: Path, part: np.ndarray, **options) -> None:
    with h5py.File(path, "w") as file:
        chunks = {"chunks": (1, *part.shape[1:])} if part.ndim == 3 else {}
        file.create_dataset("data", data=part, **chunks, **options)


def virtual(path: Path, name: str, n: int, pieces) -> None:
    """Write a virtual data set of ``n`` frames; a piece is (where, file, path, shape, part)."""
    layout = h5py.VirtualLayout((n, *SHAPE), "u2")
    for where, file, inner, shape, part in pieces:
        layout[where] = h5py.VirtualSource(file, inner, shape, "u2")[part]
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset(name, layout, fillvalue=0)


def read(master: Path, wanted=range(N)) -> np.ndarray:
    with NxmxFrames(master, ["module"], [SHAPE], needed=wanted) as source:
        return np.array([source.read(i)[0] for i in wanted])


def assert_reads(master: Path, frames: np.ndarray, wanted=range(N)) -> None:
    expected = frames[list(wanted)].astype(np.int32)
    expected[expected > 65533] = INVALID  # the codes of 16 bits
    np.testing.assert_array_equal(read(master, wanted), expected)


def assert_equals_dxtbx(dials, master: Path) -> None:
    """Every count that dxtbx reads is ours. It keeps the files open, in a mode of its own."""
    os.environ.setdefault("LIBTBX_BUILD", "/usr/lib/cctbx/python3.11")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that dxtbx imports
        from dxtbx.model.experiment_list import ExperimentListFactory

        experiments = ExperimentListFactory.from_filenames([str(master)])
        ours = read(master)
        for i in range(N):
            theirs = experiments[0].imageset.get_raw_data(i)[0].as_numpy_array()
            is_count = experiments[0].imageset.get_mask(i)[0].as_numpy_array()
            np.testing.assert_array_equal(ours[i][is_count], theirs[is_count])


# names and links


def test_absolute_links_of_a_moved_data_set(folder, frames):
    for number, name in enumerate((FIRST, SECOND), 1):
        link(folder, f"data_{number:06d}", f"/beamline/raw/2026/{name}")
    assert_reads(folder / "tiny_master.h5", frames)


def test_virtual_data_set_of_a_moved_data_set(dials, folder, frames):
    pieces = [
        (np.s_[:10], f"/beamline/{FIRST}", "/entry/data/data", (10, *SHAPE), np.s_[:]),
        (np.s_[10:], f"/beamline/{SECOND}", "/entry/data/data", (6, *SHAPE), np.s_[:]),
    ]
    virtual(folder / "tiny_master.h5", f"{DATA}/data", N, pieces)
    assert_reads(folder / "tiny_master.h5", frames)
    assert_equals_dxtbx(dials, folder / "tiny_master.h5")


def test_an_absolute_link_that_is_right_stays_right(folder, frames, tmp_path):
    """Files of the same name beside the master are of another crystal."""
    (tmp_path / "raw").mkdir()
    for number, name in enumerate((FIRST, SECOND), 1):
        shutil.move(folder / name, tmp_path / "raw" / name)
        with h5py.File(folder / name, "w") as file:
            file["entry/data/data"] = np.zeros((10, *SHAPE), "u2")
        link(folder, f"data_{number:06d}", str(tmp_path / "raw" / name))
    assert_reads(folder / "tiny_master.h5", frames)


@pytest.mark.parametrize("where", ["beside the link", "beside the target", "chain"])
def test_symbolic_links_to_the_master(dials, base, frames, tmp_path, where):
    store_folder, view = tmp_path / "store", tmp_path / "view"
    shutil.copytree(base, store_folder)
    view.mkdir()
    target = store_folder / "tiny_master.h5"
    if where == "chain":
        (tmp_path / "middle.h5").symlink_to(target)
        target = tmp_path / "middle.h5"
    (view / "tiny_master.h5").symlink_to(target)
    if where == "beside the link":
        for name in (FIRST, SECOND):
            shutil.move(store_folder / name, view / name)
    assert_reads(view / "tiny_master.h5", frames)
    assert_equals_dxtbx(dials, view / "tiny_master.h5")


def test_a_link_upwards_from_a_linked_folder(folder, frames, tmp_path):
    """The system resolves ``..`` after the symbolic link, not before."""
    deep = tmp_path / "disk" / "deep"
    deep.mkdir(parents=True)
    shutil.copy(folder / "tiny_master.h5", deep)
    for name in (FIRST, SECOND):
        shutil.copy(folder / name, deep.parent / name)
    for number, name in enumerate((FIRST, SECOND), 1):
        link(deep, f"data_{number:06d}", f"../{name}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "view").symlink_to(deep)
    assert_reads(tmp_path / "elsewhere" / "view" / "tiny_master.h5", frames)


def test_a_folder_that_hdf5_is_told_of(folder, frames, tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    for number, name in enumerate((FIRST, SECOND), 1):
        shutil.move(folder / name, tmp_path / "far" / name)
        link(folder, f"data_{number:06d}", name)
    with pytest.raises(UserError, match=f"no image file .*{FIRST}, linked by .*tiny_master"):
        read(folder / "tiny_master.h5")
    monkeypatch.setenv("HDF5_EXT_PREFIX", f"/none:{tmp_path}/far")
    assert_reads(folder / "tiny_master.h5", frames)


def test_links_within_the_file(folder, frames, tmp_path):
    """Soft links to external links to soft links, the data group itself in another file."""
    shutil.move(folder / FIRST, folder / "moved.h5")
    with h5py.File(folder / "moved.h5", "r+") as file:
        file["alias"] = h5py.SoftLink("/entry/data/data")
    with h5py.File(folder / "meta.h5", "w") as file:
        file["group/parts/one"] = h5py.ExternalLink("/gone/moved.h5", "/alias")
        file["group/data_000001"] = h5py.SoftLink("parts/one")
        file["group/data_000002"] = h5py.ExternalLink(SECOND, "/entry/data/data")
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        del file[DATA]
        file[DATA] = h5py.ExternalLink("meta.h5", "/group")
    assert_reads(folder / "tiny_master.h5", frames)


def test_links_in_a_circle(folder):
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        file[DATA]["data"] = h5py.SoftLink("/entry/data/other")
        file[DATA]["other"] = h5py.SoftLink("/entry/data/data")
    with pytest.raises(UserError, match="never end"):
        read(folder / "tiny_master.h5")


# numbered data sets


def numbered(folder: Path, frames: np.ndarray, names: list[str], per_file: int = 1) -> None:
    for k, name in enumerate(names):
        store(folder / f"part_{k}.h5", frames[k * per_file : (k + 1) * per_file])
        link(folder, name, f"part_{k}.h5", "/data")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("width", [1, 2, 6])
def test_data_sets_in_the_order_of_their_numbers(folder, frames, first, width):
    names = [f"data_{k:0{width}d}" for k in range(first, N + first)]
    numbered(folder, frames, names)
    assert_reads(folder / "tiny_master.h5", frames)


@pytest.mark.parametrize("lost", ["data_000001", "data_000003"])
def test_a_gap_in_the_numbers_shifts_nothing(folder, frames, lost):
    numbered(folder, frames, [f"data_{k:06d}" for k in range(1, 9)], per_file=2)
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        del file[DATA][lost]
    with pytest.raises(UserError, match=f"no {lost} "):
        read(folder / "tiny_master.h5", range(6, 8))
    if lost == "data_000003":
        assert_reads(folder / "tiny_master.h5", frames, range(4))


def test_the_same_number_twice(folder, frames):
    numbered(folder, frames, ["data_1", "data_000001"], per_file=8)
    with pytest.raises(UserError, match="two data sets of one number, data_000001 and data_1"):
        read(folder / "tiny_master.h5")


def test_data_sets_that_know_their_images(folder, frames):
    """Detectors write the number of a file's first image: it replaces what is missing."""
    link(folder, "data_000001", FIRST)
    link(folder, "data_000002", SECOND)
    with h5py.File(folder / SECOND) as file:
        assert file["entry/data/data"].attrs["image_nr_low"] == 11
    (folder / FIRST).rename(folder / "away.h5")
    assert_reads(folder / "tiny_master.h5", frames, range(10, 16))
    with pytest.raises(UserError, match=f"no image file .*{FIRST}"):
        read(folder / "tiny_master.h5", range(9, 11))
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        del file[DATA]["data_000001"]
    assert_reads(folder / "tiny_master.h5", frames, range(10, 16))
    with pytest.raises(UserError, match="has no data_000001"):
        read(folder / "tiny_master.h5", range(9, 11))


def test_links_in_a_wrong_order(folder):
    link(folder, "data_000001", SECOND)
    link(folder, "data_000002", FIRST)
    with pytest.raises(UserError, match=f"{FIRST} begins with image 1 .* with image 17"):
        read(folder / "tiny_master.h5")


def test_numbers_of_each_file_are_no_contradiction(folder, frames):
    numbered(folder, frames, [f"data_{k:06d}" for k in range(1, 9)], per_file=2)
    for k in range(8):
        with h5py.File(folder / f"part_{k}.h5", "r+") as file:
            file["data"].attrs["image_nr_low"] = 1
    assert_reads(folder / "tiny_master.h5", frames)
    (folder / "part_0.h5").unlink()
    with pytest.raises(UserError, match=r"no image file .*part_0\.h5"):
        read(folder / "tiny_master.h5", range(2, 4))


def test_links_to_files_that_were_never_made(folder, frames):
    """The detector's server links what the scan asks for, however few images come."""
    numbered(folder, frames, [f"data_{k:06d}" for k in range(1, 9)], per_file=2)
    for k in range(9, 37):
        link(folder, f"data_{k:06d}", f"part_{k}.h5", "/data")
    assert_reads(folder / "tiny_master.h5", frames)
    with pytest.raises(UserError, match=r"no image file .*part_9\.h5"):
        read(folder / "tiny_master.h5", range(17))


def test_an_attribute_that_names_the_first_file_only(folder, frames):
    numbered(folder, frames, [f"data_{k:06d}" for k in range(1, 9)], per_file=2)
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        file[DATA].attrs["signal"] = "data_000001"
    assert_reads(folder / "tiny_master.h5", frames)


def test_a_data_group_of_another_name(folder, frames):
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        file[DATA].create_dataset("data", data=frames)
        file.move(DATA, "entry/eiger_1")
    assert_reads(folder / "tiny_master.h5", frames)


# virtual data sets


def test_a_source_that_was_not_copied(base, frames, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    (folder / SECOND).unlink()
    assert_reads(folder / "tiny_master.h5", frames, range(10))
    with pytest.raises(UserError, match=f"no image file .*{SECOND}"):
        read(folder / "tiny_master.h5", range(8, 12))


def nested(folder: Path) -> None:
    """Master of a virtual data set of two virtual data sets of two files."""
    source = ((10, *SHAPE), np.s_[5:10])
    virtual(
        folder / "inner.h5",
        "late",
        11,
        [
            (np.s_[:5], FIRST, "/entry/data/data", *source),
            (np.s_[5:], SECOND, "/entry/data/data", (6, *SHAPE), np.s_[:]),
        ],
    )
    with h5py.File(folder / "inner.h5") as file:
        assert file["late"].is_virtual
    pieces = [
        (np.s_[:5], FIRST, "/entry/data/data", (10, *SHAPE), np.s_[:5]),
        (np.s_[5:], "inner.h5", "late", (11, *SHAPE), np.s_[:]),
    ]
    virtual(folder / "tiny_master.h5", f"{DATA}/data", N, pieces)


def test_virtual_data_set_of_virtual_data_sets(dials, folder, frames):
    nested(folder)
    assert_reads(folder / "tiny_master.h5", frames)
    assert_equals_dxtbx(dials, shutil.copytree(folder, folder / "copy") / "tiny_master.h5")
    (folder / SECOND).unlink()
    assert_reads(folder / "tiny_master.h5", frames, range(10))
    with pytest.raises(UserError, match=f"no image file .*{SECOND}"):
        read(folder / "tiny_master.h5")


def test_sources_in_the_file_itself_and_below(folder, frames):
    (folder / "raw").mkdir()
    shutil.move(folder / FIRST, folder / "raw" / FIRST)
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        file["stored"] = frames[10:]
    pieces = [
        (np.s_[:10], f"./raw/{FIRST}", "/entry/data/data", (10, *SHAPE), np.s_[:]),
        (np.s_[10:], ".", "stored", (6, *SHAPE), np.s_[:]),
    ]
    virtual(folder / "tiny_master.h5", f"{DATA}/data", N, pieces)
    assert_reads(folder / "tiny_master.h5", frames)


def test_chosen_frames(folder, frames):
    """Selections that are no slice: every other frame, and a list."""
    whole = (N, *SHAPE)
    store(folder / "all.h5", frames)
    pieces = [
        (np.s_[:8], "all.h5", "data", whole, np.s_[1::2]),
        (np.s_[[8, 9, 11]], "all.h5", "data", whole, np.s_[2:5]),
    ]
    virtual(folder / "tiny_master.h5", f"{DATA}/data", 12, pieces)
    order = [*range(1, 16, 2), 2, 3, 0, 4]
    assert_reads(folder / "tiny_master.h5", frames[order], [*range(10), 11])
    with pytest.raises(UserError, match=r"frame 10 .* has no source"):
        read(folder / "tiny_master.h5", range(12))


def tiles(folder: Path, frames: np.ndarray) -> None:
    for name, cut in (("top.h5", np.s_[:, :100]), ("bottom.h5", np.s_[:, 100:])):
        store(folder / name, frames[cut])
    pieces = [
        (np.s_[:, :100], "top.h5", "data", (N, 100, FAST), np.s_[:]),
        (np.s_[:, 100:], "bottom.h5", "data", (N, SLOW - 100, FAST), np.s_[:]),
    ]
    virtual(folder / "tiny_master.h5", f"{DATA}/data", N, pieces)


def test_tiles(dials, folder, frames):
    tiles(folder, frames)
    assert_reads(folder / "tiny_master.h5", frames)
    assert_equals_dxtbx(dials, shutil.copytree(folder, folder / "copy") / "tiny_master.h5")
    store(folder / "bottom.h5", frames[:12, 100:])  # the module that stopped first
    assert_reads(folder / "tiny_master.h5", frames, range(12))
    with pytest.raises(UserError, match=r"frame 12 .* beyond the end of its source bottom\.h5"):
        read(folder / "tiny_master.h5")
    (folder / "bottom.h5").unlink()
    with pytest.raises(UserError, match=r"no image file .*bottom\.h5"):
        read(folder / "tiny_master.h5", range(1))


def test_a_tile_that_was_never_written(folder, frames):
    tiles(folder, frames)
    with h5py.File(folder / "top.h5", "w") as file:
        data = file.create_dataset("data", (N, 100, FAST), "u2", chunks=(1, 50, FAST))
        data[:] = frames[:, :100]
        part = file.create_dataset("other", (N, 100, FAST), "u2", chunks=(1, 50, FAST))
        part[:9] = frames[:9, :100]
        part[9, :50] = frames[9, :50]
        del file["data"]
        file.move("other", "data")
    assert_reads(folder / "tiny_master.h5", frames, range(9))
    with pytest.raises(UserError, match=r"frame 9 of .*top\.h5 was never written"):
        read(folder / "tiny_master.h5", range(10))


def test_one_image_per_file(folder, frames):
    for i in range(N):
        store(folder / f"image_{i}.h5", frames[i])
    pieces = [(i, f"image_{i}.h5", "data", SHAPE, np.s_[:]) for i in range(N)]
    virtual(folder / "tiny_master.h5", f"{DATA}/data", N, pieces)
    (folder / "image_5.h5").unlink()
    assert_reads(folder / "tiny_master.h5", frames, [0, 4, 6, 15])
    with pytest.raises(UserError, match=r"no image file .*image_5\.h5"):
        read(folder / "tiny_master.h5", [4, 5])


def test_numbered_sources(folder, frames):
    """One mapping for the files part_0.h5, part_1.h5 ... ("printf style")."""
    for k in range(4):
        store(folder / f"part_{k}.h5", frames[4 * k : 4 * k + 4])
    space = h5py.h5s.create_simple((N, *SHAPE), (h5py.h5s.UNLIMITED, *SHAPE))
    space.select_hyperslab((0, 0, 0), (h5py.h5s.UNLIMITED, 1, 1), (4, 1, 1), (4, *SHAPE))
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    source = h5py.h5s.create_simple((4, *SHAPE))
    properties.set_virtual(space, b"/gone/part_%b.h5", b"data", source)
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        kind = h5py.h5t.NATIVE_UINT16
        h5py.h5d.create(file[DATA].id, b"data", kind, space, properties)
    assert_reads(folder / "tiny_master.h5", frames)
    (folder / "part_2.h5").unlink()
    assert_reads(folder / "tiny_master.h5", frames, range(8))
    with pytest.raises(UserError, match="and image 12 is asked for"):
        read(folder / "tiny_master.h5", range(12))


def test_extracted_from_what_is_there(base, control, tmp_path):
    """The aborted scan: twenty images foreseen, sixteen made; the result is that of the whole."""
    folder = tmp_path / "aborted"
    shutil.copytree(base, folder)
    with h5py.File(folder / "tiny_master.h5", "r+") as file:
        del file[DATA]["data"]
    pieces = [
        (np.s_[:10], FIRST, "/entry/data/data", (10, *SHAPE), np.s_[:]),
        (np.s_[10:16], SECOND, "/entry/data/data", (6, *SHAPE), np.s_[:]),
    ]
    virtual(folder / "tiny_master.h5", f"{DATA}/data", 20, pieces)
    expt = (folder / "tiny.expt").read_text().replace(str(base), str(folder))
    (folder / "tiny.expt").write_text(expt)
    for found, expected in zip(extracted(folder, tmp_path / "out.h5"), control, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(expected) == 1309


# files that were not closed

WRITER = """
import h5py, os, signal, sys
import numpy as np
frames = np.load(sys.argv[3])
file = h5py.File(sys.argv[1], "w", libver="latest")
data = file.create_dataset("data", frames.shape, "u2", chunks=(1, *frames.shape[1:]))
file.flush()
if sys.argv[2] == "swmr":
    file.swmr_mode = True
for i in range(12):
    data[i] = frames[i]
data.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("mode", ["swmr", "plain"])
def test_a_writer_that_was_killed(folder, frames, tmp_path, mode):
    """What a SWMR writer has flushed is consistent; without SWMR the mark must be cleared."""
    np.save(tmp_path / "frames.npy", frames)
    path = folder / "killed.h5"
    arguments = [sys.executable, "-c", WRITER, path, mode, tmp_path / "frames.npy"]
    subprocess.run([str(x) for x in arguments], check=False)
    link(folder, "data", "killed.h5", "/data")
    if mode == "plain":
        with pytest.raises(UserError, match=r"h5clear -s .*killed\.h5"):
            read(folder / "tiny_master.h5", range(4))
        return
    assert_reads(folder / "tiny_master.h5", frames, range(12))
    with pytest.raises(UserError, match=r"frame 12 of .*killed\.h5 was never written"):
        read(folder / "tiny_master.h5", range(13))


def test_a_file_that_another_program_writes(folder):
    link(folder, "data", "live.h5", "/data")
    hold = (
        "import h5py, sys; f = h5py.File(sys.argv[1], 'w'); f['data'] = [[[1]]]; "
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / "live.h5")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as writer:
        writer.stdout.readline()
        with pytest.raises(UserError, match=r"live\.h5 is locked by a program that writes it"):
            read(folder / "tiny_master.h5")
        writer.communicate()


# masks and modules


def detector(folder: Path) -> h5py.File:
    return h5py.File(folder / "tiny_master.h5", "r+")


@pytest.mark.parametrize("kind", ["equal", "differ", "too few"])
def test_a_pixel_mask_for_each_image(base, frames, tmp_path, kind):
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    with detector(folder) as file:
        group = file["entry/instrument/detector"]
        masks = np.repeat(group["pixel_mask"][()][None], N, axis=0)
        if kind == "differ":
            masks[3, 50, 60] = masks[:, 70, 80] = 8
        del group["pixel_mask"]
        group["pixel_mask"] = masks[: 8 if kind == "too few" else N]
    with NxmxFrames(folder / "tiny_master.h5", ["m"], [SHAPE], needed=range(2, 12)) as source:
        if kind == "too few":
            with pytest.raises(UserError, match=r"mask is \(8, 288, 280\)"):
                source.pixel_mask()
            return
        (good,) = source.pixel_mask()
        counts = {i: source.read(i)[0] for i in (2, 3, 11)}
    np.testing.assert_array_equal(good, (masks[2:12] == 0).any(0))
    for i, image in counts.items():
        usable = (frames[i] < 65534) & (masks[i] == 0)
        np.testing.assert_array_equal((image >= 0) & good, usable)
        np.testing.assert_array_equal(image[usable], frames[i][usable])


@pytest.mark.parametrize("field", ["data_origin", "data_size"])
def test_a_module_without_its_place(base, frames, tmp_path, field):
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    with detector(folder) as file:
        module = file["entry/instrument/detector/module"]
        del module[field]
    assert_reads(folder / "tiny_master.h5", frames)
    with detector(folder) as file:
        file.copy("entry/instrument/detector/module", "entry/instrument/detector/module_2")
    with pytest.raises(UserError, match=f"has no {field}, which tells it from the other"):
        NxmxFrames(folder / "tiny_master.h5", ["a", "b"], [SHAPE, SHAPE])


def test_a_module_with_a_leading_number(base, frames, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    with detector(folder) as file:
        module = file["entry/instrument/detector/module"]
        for field, values in (("data_origin", [0, 10, 20]), ("data_size", [1, 200, 210])):
            del module[field]
            module[field] = values
    names = ["/entry/instrument/detector/module"]
    with NxmxFrames(folder / "tiny_master.h5", names, [(200, 210)], needed=range(1)) as source:
        inside = frames[0, 10:210, 20:230]
        counts = np.where(inside > 65533, INVALID, inside.astype(np.int32))
        np.testing.assert_array_equal(source.read(0)[0], counts)


@pytest.mark.parametrize("has_module", [True, False])
def test_a_panel_with_a_dimension_of_its_own(base, frames, tmp_path, has_module):
    """Frames of (image, 1, slow, fast), as of a detector with a single module."""
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    with detector(folder) as file:
        del file["entry/data"]
        file.create_group("entry/data").create_dataset("data", data=frames[:, None])
        if not has_module:
            del file["entry/instrument/detector/module"]
    assert_reads(folder / "tiny_master.h5", frames)


def test_a_file_for_each_image_is_refused(base, tmp_path):
    """As in dxtbx; before, frames of the first file stood for those of all."""
    (experiment,) = read_experiments(base / "tiny.expt")
    paths = tuple(
        str(shutil.copy(base / "tiny_master.h5", tmp_path / f"x_{i:04d}.h5")) for i in range(N)
    )
    images = replace(experiment.images, paths=paths)
    with pytest.raises(UserError, match=f"one of {N} HDF5 files that the .expt takes for one"):
        open_frames(replace(experiment, images=images))


# plugins of HDF5


@pytest.mark.slow
def test_plugins_that_hdf5_finds_by_itself(base, control, tmp_path):
    """As with Debian's DIALS: the store is written, and reads back equal."""
    out = tmp_path / "out.h5"
    command = [sys.executable, "-m", "braggflux.pipelines.cli", "extract", base / "tiny.expt"]
    environment = os.environ | {"HDF5_PLUGIN_PATH": hdf5plugin.PLUGINS_PATH}
    command += [base / "tiny.refl", "--out", out]
    subprocess.run([str(x) for x in command], env=environment, check=True)
    for found, expected in zip(boxes(out), control, strict=True):
        np.testing.assert_array_equal(found, expected)
    with h5py.File(out) as file:
        assert "32008" in file["boxes/counts"]._filters  # bitshuffle
