"""Frames of experiments against dxtbx, and photons from counts."""

import importlib
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import hdf5plugin
import numpy as np
import pytest
from image_cases import dxtbx_imageset, edit, set_panel

from braggflux.integrator.crystal.geometry import Beam, Experiment, ImageFiles, Panel, Scan
from braggflux.integrator.errors import UserError
from braggflux.integrator.io import dxtbx_frames
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.io.hdf5.photons import INVALID
from braggflux.integrator.io.images import ExperimentFrames, open_frames

DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")


@pytest.fixture(scope="module")
def experiment_list(dials):
    """dxtbx's factory of experiment lists."""
    if DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(DEBIAN_BUILD))
    os.environ.setdefault("HDF5_PLUGIN_PATH", hdf5plugin.PLUGINS_PATH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that dxtbx imports
        return importlib.import_module("dxtbx.model.experiment_list").ExperimentListFactory


def assert_frames_equal(ours, static_mask, imageset) -> None:
    """Wherever dxtbx trusts a pixel we have its count, and -1 or a mask elsewhere."""
    for i, panels in ours.items():
        theirs = imageset.get_raw_data(i)
        trusted = imageset.get_mask(i)
        for panel, raw, good, static in zip(panels, theirs, trusted, static_mask, strict=True):
            raw, good = raw.as_numpy_array(), good.as_numpy_array()
            assert panel.dtype in (np.int16, np.int32)
            np.testing.assert_array_equal((panel >= 0) & static, good)
            np.testing.assert_array_equal(panel[good], raw[good])
            assert set(np.unique(panel[panel < 0])) <= {-1}


def test_hdf5_frames_equal_dxtbx(experiment_list, shared):
    expt = shared / "data" / "hewl_nai" / "refined.expt"
    (ours,) = read_experiments(expt)
    with open_frames(ours) as source:  # closed before dxtbx opens the file in its own mode
        assert source.n_images == 400
        assert source.panel_shapes == [(619, 487)]
        frames = {i: source.read(i) for i in (0, 1, 199, 399)}
        static_mask = source.static_mask()
    assert (frames[0][0] == -1).any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = experiment_list.from_filenames([str(expt.with_name("twin_master.h5"))])
    assert_frames_equal(frames, static_mask, theirs[0].imageset)


@pytest.fixture(scope="module")
def cysteine(experiment_list, shared, tmp_path_factory):
    files = sorted((shared / "data" / "l_cysteine").glob("l-cyst_01_*.cbf.gz"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = experiment_list.from_filenames([str(f) for f in files])
    path = tmp_path_factory.mktemp("cysteine") / "imported.expt"
    theirs.as_file(str(path))
    return read_experiments(path)[0], theirs[0]


def test_compressed_cbf_frames_equal_dxtbx(cysteine):
    ours, theirs = cysteine
    assert ours.images.paths == tuple(theirs.imageset.paths())
    with open_frames(ours) as source:
        assert source.n_images == 15
        frames = {i: source.read(i) for i in (0, 7, 14)}
        assert_frames_equal(frames, source.static_mask(), theirs.imageset)


def test_cbf_frames_with_a_mask_and_a_trusted_range_equal_dxtbx(cysteine, tmp_path):
    _, theirs = cysteine
    flex = importlib.import_module("scitbx.array_family.flex")
    fast, slow = theirs.detector[0].get_image_size()
    mask = flex.bool(flex.grid(slow, fast), True)
    mask[100:200, 300:500] = flex.bool(flex.grid(100, 200), False)
    (tmp_path / "pixels.mask").write_bytes(pickle.dumps((mask,)))
    path = tmp_path / "x.expt"
    importlib.import_module("dxtbx.model").ExperimentList([theirs]).as_file(str(path))
    edit(path, lambda e: e["imageset"][0].update(mask="pixels.mask"))
    set_panel(path, trusted_range=(-1, 7))
    with open_frames(read_experiments(path)[0]) as source:
        frames = {i: source.read(i) for i in (0, 9)}
        static_mask = source.static_mask()
        assert source.n_overloads > 0
    assert not static_mask[0][100:200, 300:500].any()
    assert_frames_equal(frames, static_mask, dxtbx_imageset(path))


def test_smv_frames(experiment_list, tmp_path):
    """A minimal ADSC file, written here byte by byte."""
    pixels = np.random.default_rng(2).poisson(7, (24, 20)).astype("<u2")
    pixels[3, 4] = 65535
    header = {
        "HEADER_BYTES": 512, "DIM": 2, "BYTE_ORDER": "little_endian", "TYPE": "unsigned_short",
        "SIZE1": 20, "SIZE2": 24, "PIXEL_SIZE": 0.1, "BIN": "1x1", "ADC": "slow",
        "DETECTOR_SN": 999, "DATE": "Mon Jan 01 00:00:00 2024", "TIME": 1.0, "DISTANCE": 100.0,
        "PHI": 0.0, "OSC_START": 0.0, "OSC_RANGE": 1.0, "WAVELENGTH": 1.0,
        "BEAM_CENTER_X": 1.0, "BEAM_CENTER_Y": 1.2, "TWOTHETA": 0.0, "AXIS": "phi", "GONIO": "",
    }  # fmt: skip
    text = "{\n" + "".join(f"{k}={v};\n" for k, v in header.items()) + "}\n"
    for n in (1, 2):
        stored = np.where(pixels < 100, pixels + n, pixels).astype("<u2")
        path = tmp_path / f"a_1_{n:03d}.img"
        path.write_bytes(text.encode().ljust(512) + stored.tobytes())
    panel = Panel(
        name="p",
        fast_axis=np.array([1.0, 0, 0]),
        slow_axis=np.array([0, -1.0, 0]),
        origin=np.array([0, 0, -100.0]),
        pixel_size=(0.1, 0.1),
        image_size=(20, 24),
        trusted_range=(0, 65534),
    )
    experiment = Experiment(
        beam=Beam(np.array([0, 0, 1.0]), 1.0),
        panels=(panel,),
        scan=Scan((1, 2), (0.0, 1.0)),
        images=ImageFiles(tuple(str(tmp_path / f"a_1_{n:03d}.img") for n in (1, 2)), (0, 1)),
    )
    with open_frames(experiment) as source:
        for n in (1, 2):
            image = pixels.astype(int) + n
            image[3, 4] = -1
            np.testing.assert_array_equal(source.read(n - 1)[0], image)


def test_missing_files_are_counted(cysteine, tmp_path):
    ours, _ = cysteine
    paths = (*ours.images.paths[:-2], str(tmp_path / "x_14.cbf"), str(tmp_path / "x_15.cbf"))
    moved = replace(ours, images=replace(ours.images, paths=paths))
    with pytest.raises(UserError, match=r"no image file .*x_14.cbf \(2 of 15 files"):
        open_frames(moved)


def test_truncated_cbf(cysteine, tmp_path):
    ours, _ = cysteine
    path = tmp_path / "l-cyst_01_00001.cbf.gz"
    path.write_bytes(Path(ours.images.paths[0]).read_bytes()[:50_000])
    cut = replace(ours, scan=None, images=ImageFiles((ours.images.paths[1], str(path)), (0, 1)))
    with open_frames(cut) as source:
        source.read(0)
        with pytest.raises(UserError, match="cannot read") as error:
            source.read(1)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_format(cysteine, tmp_path):
    path = tmp_path / "image.cbf"
    path.write_text("nothing that anybody can read")
    ours, _ = cysteine
    with pytest.raises(UserError, match="no image format that dxtbx knows"):
        open_frames(replace(ours, scan=None, images=ImageFiles((str(path),), (0,))))


def test_panels_of_another_detector(cysteine):
    ours, _ = cysteine
    other = replace(ours, panels=(replace(ours.panels[0], image_size=(100, 100)),))
    with open_frames(other) as source, pytest.raises(UserError, match="has panels of"):
        source.read(0)


def test_without_dxtbx_the_remedy_is_named(cysteine, monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(dxtbx_frames.importlib, "import_module", absent)
    ours, _ = cysteine
    with pytest.raises(UserError, match=r"apt install dials.*conda-forge") as error:
        open_frames(ours)
    assert "\n" not in str(error.value)


def test_images_must_be_as_many_as_the_scan(shared):
    (ours,) = read_experiments(shared / "data" / "hewl_nai" / "refined.expt")
    with pytest.raises(UserError, match="names 400 images, and its scan has 10"):
        open_frames(replace(ours, scan=Scan((1, 10), (0, 0.25))))
    longer = replace(
        ours,
        scan=Scan((1, 500), (0, 0.25)),
        images=replace(ours.images, indices=tuple(range(500))),
    )
    with pytest.raises(UserError, match="has 400 images, and image 500 is asked for"):
        open_frames(longer)
    with pytest.raises(UserError, match="names no images"):
        open_frames(replace(ours, images=None))


class Made:
    """Raw frames made up: one row of counts."""

    def __init__(self, row) -> None:
        self.row = np.array([row])
        if self.row.dtype.kind == "i":
            self.row = self.row.astype(np.int32)

    def read(self, number):
        return [self.row]

    def read_stored(self, number):
        return None

    def pixel_mask(self):
        mask = np.ones(self.row.shape, bool)
        mask[0, 1] = False
        return [mask]

    def close(self):
        pass


def frames_of(row, **panel) -> ExperimentFrames:
    made = Panel(
        name="p",
        fast_axis=np.array([1.0, 0, 0]),
        slow_axis=np.array([0, -1.0, 0]),
        origin=np.zeros(3),
        pixel_size=(0.1, 0.1),
        image_size=(len(row), 1),
        **panel,
    )
    return ExperimentFrames(Made(row), [0, 1], [made])


def test_trusted_range_and_overloads():
    source = frames_of([-1, 101, 99, 101, 0], trusted_range=(-1, 100))
    assert source.read(0)[0].tolist() == [[-1, -1, 99, -1, 0]]
    assert source.n_overloads == 1  # the other overload is in the static mask
    source.read(1)
    assert source.n_overloads == 2
    with pytest.raises(IndexError, match="frame 2 of 2"):
        source.read(2)


@pytest.mark.parametrize(
    ("trusted_range", "row", "photons"),
    [
        # up to DIALS 3.12 the ends are not trusted, and counters start at -1
        ((-1, 100), [-2, 0, -1, 0, 99, 100, 101], [-1, 0, -1, 0, 99, -1, -1]),
        # since 3.13 they are, and counters start at 0
        ((0, 100), [-2, 0, -1, 0, 99, 100, 101], [-1, 0, -1, 0, 99, 100, -1]),
        ((10, 100), [9, 0, 10, 11, 100], [-1, -1, 10, 11, 100]),
        # wider than the codes of a file
        ((-(2.0**31), 2.0**31), [INVALID, 0, 2**31 - 3, 5], [-1, 0, 2**31 - 3, 5]),
        ((-1e9, 1e10), [5.0, 0.0, float(INVALID), 4e9], [5, 0, -1, 2**31 - 1]),
    ],
)
def test_ends_of_the_trusted_range(trusted_range, row, photons):
    assert frames_of(row, trusted_range=trusted_range).read(0)[0].tolist() == [photons]


@pytest.mark.parametrize("trusted_range", [(0, 0), (-1, 0), (-5, -2), (100, 10)])
def test_an_empty_trusted_range_is_named(trusted_range):
    with pytest.raises(UserError, match=r"trusted range of the \.expt, .* holds no count"):
        frames_of([1, 2], trusted_range=trusted_range)


def test_gain_and_pedestal():
    source = frames_of([-1, 10, 14, 18, 2], gain=4.0, pedestal=2.0, trusted_range=(0, 1000))
    assert source.read(0)[0].tolist() == [[-1, 2, 3, 4, 0]]


def test_rounding_to_photons_keeps_the_mean():
    """Where (ADU - pedestal) / gain is no whole number, its mean is what dxtbx has."""
    adu = np.random.default_rng(1).poisson(1.2, 100_000) + 10
    source = frames_of(adu, gain=1.7, pedestal=10.0, trusted_range=(-1, 1e6))
    photons = source.read(0)[0]
    np.testing.assert_array_equal(source.read(0)[0], photons)  # the same whenever it is read
    exact = (adu - 10) / 1.7
    fractions = exact % 1
    error = np.sqrt((fractions * (1 - fractions)).sum())
    assert abs(photons.sum() - exact.sum()) < 5 * error
    assert np.abs(photons - exact).max() < 1
    # np.rint would give 14 % more
    assert np.rint(exact).sum() > 1.1 * exact.sum()


def test_resolved_photons_are_rounded_to_the_nearest():
    rng = np.random.default_rng(2)
    truth = rng.poisson(2.0, 20_000) + 1  # no zeros: their noise would be negative
    adu = truth * 12.4 + rng.normal(0, 1.2, truth.size)
    source = frames_of(adu, gain=12.4, trusted_range=(-10, 1e6))
    np.testing.assert_array_equal(source.read(0)[0], truth[None])


def test_rectangles_of_the_panel_are_masked_as_in_dxtbx(experiment_list):
    rectangles = ((2, 0, 4, 1), (7, -3, 20, 9))
    source = frames_of(range(9), mask=rectangles)
    assert source.static_mask()[0].tolist() == [[1, 0, 0, 0, 1, 1, 1, 0, 0]]
    panel = importlib.import_module("dxtbx.model").Panel()
    panel.set_image_size((9, 1))
    panel.add_mask(2, 0, 4, 1)
    panel.add_mask(7, 0, 9, 1)
    theirs = panel.get_untrusted_rectangle_mask().as_numpy_array()
    np.testing.assert_array_equal(source.static_mask()[0] | [[0, 1] + [0] * 7], theirs)
