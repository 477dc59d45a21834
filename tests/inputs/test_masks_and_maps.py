"""External masks and maps of DIALS: honoured as dxtbx does, never run."""

import importlib
import os
import pickle
import subprocess

import h5py
import hdf5plugin
import numpy as np
import pytest
from image_cases import copy_of, dxtbx_imageset, edit, frames_of, set_panel, store_frames

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.io.dials.lookup import read_flex
from braggflux.integrator.io.images import open_frames
from braggflux.integrator.prediction.predict import predict_reflections
from braggflux.integrator.shoebox.extent import SpotExtent
from braggflux.integrator.shoebox.extraction import run_extraction
from braggflux.pipelines.cli import main

SHAPE = (288, 280)


@pytest.fixture(scope="module")
def flex(dials, tiny):
    dxtbx_imageset(tiny.expt)  # finds Debian's build
    return importlib.import_module("scitbx.array_family.flex")


def counts_of(expt):
    with open_frames(read_experiments(expt)[0]) as source:
        frames = np.stack([source.read(i)[0] for i in range(source.n_images)])
        return frames, source.static_mask()[0]


def write_flex(flex, path, array, protocol=pickle.DEFAULT_PROTOCOL) -> str:
    kind = flex.bool if array.dtype == bool else flex.double
    path.write_bytes(pickle.dumps((kind(np.ascontiguousarray(array)),), protocol))
    return path.name


def set_lookup(expt, **names) -> None:
    edit(expt, lambda e: e["imageset"][0].update(names))


@pytest.mark.slow
def test_a_mask_of_dials_generate_mask_is_applied(dials, tiny, tmp_path):
    """Under it no voxel is valid, elsewhere every count and voxel is as before, and dxtbx's."""
    expt = copy_of(tiny, tmp_path)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HDF5_PLUGIN_PATH": hdf5plugin.PLUGINS_PATH,
    }
    shapes = ["untrusted.circle=100,100,20", "untrusted.rectangle=200,220,30,90"]
    for command in (
        ["dials.generate_mask", expt.name, *shapes, "output.mask=pixels.mask"],
        ["dials.apply_mask", expt.name, "input.mask=pixels.mask"],
    ):
        command[0] = f"{dials}/{command[0]}"
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    masked = tmp_path / "masked.expt"

    (theirs,) = dxtbx_imageset(masked).get_mask(3)
    frames, mask = counts_of(masked)
    before, old_mask = counts_of(expt)
    np.testing.assert_array_equal(frames, before)
    np.testing.assert_array_equal(mask & (frames[3] >= 0), theirs.as_numpy_array())
    lost = old_mask & ~mask
    assert 2000 < lost.sum() < np.pi * 20**2 + 20 * 60 + 10
    assert (np.argwhere(lost)[:, 1] < 221).all()

    extent = SpotExtent(0.7, 0.6, 0.1, (5, 9, 9))
    boxes = []
    for source in (expt, masked):
        out = tmp_path / f"{source.stem}.h5"
        run_extraction(
            read_experiments(source), 2.7, out, extent_override=extent, find_defects=False
        ).close()
        with h5py.File(out) as store:
            names = ("boxes/counts", "boxes/mask", "reflections/corner")
            boxes.append([store[name][()] for name in names])
    (counts, bits, corner), (masked_counts, masked_bits, masked_corner) = boxes
    np.testing.assert_array_equal(corner, masked_corner)
    padded = np.pad(lost, 9)
    under = np.stack([padded[y : y + 9, x : x + 9] for _, y, x in corner + 9])[:, None]
    valid, masked_valid = (bits & 1).astype(bool), (masked_bits & 1).astype(bool)
    assert (valid & under).sum() > 10_000
    np.testing.assert_array_equal(masked_valid, valid & ~under)
    np.testing.assert_array_equal(masked_counts, np.where(under, 0, counts))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_gain_and_pedestal_maps_equal_dxtbx(flex, tiny, tmp_path, protocol):
    """They replace the panel's own; pixels without a gain are masked, which dxtbx cannot."""
    rng = np.random.default_rng(0)
    gain = rng.choice([1.0, 2.0, 5.0], SHAPE)
    pedestal = rng.integers(0, 50, SHAPE).astype(float)
    raw = frames_of(tiny.master).astype(np.int64)
    adu = np.where(raw > 60000, 2**31 - 1, raw * gain + pedestal).astype("i4")
    expt = copy_of(tiny, tmp_path)
    store_frames(expt, adu, bit_depth_readout=32)
    set_panel(expt, gain=7.0, pedestal=3.0, trusted_range=(-1, 400_000))
    set_lookup(
        expt,
        gain=write_flex(flex, tmp_path / "gain.pickle", gain, protocol),
        pedestal=write_flex(flex, tmp_path / "pedestal.pickle", pedestal, protocol),
    )
    frames, mask = counts_of(expt)
    np.testing.assert_array_equal(frames, counts_of(tiny.expt)[0])
    images = dxtbx_imageset(expt)
    trusted = images.get_mask(2)[0].as_numpy_array()
    np.testing.assert_array_equal((frames[2] >= 0) & mask, trusted)
    theirs = images.get_corrected_data(2)[0].as_numpy_array()
    np.testing.assert_array_equal(frames[2][trusted], theirs[trusted])

    gain[30:40, 50:60], gain[0, 0] = 0.0, np.nan
    write_flex(flex, tmp_path / "gain.pickle", gain)
    _, without = counts_of(expt)
    np.testing.assert_array_equal(without, mask & (gain > 0))


def test_strong_photons_of_a_small_gain_are_kept(flex, tiny, tmp_path):
    """A gain of 0.01 makes more photons than 16 bits hold."""
    expt = copy_of(tiny, tmp_path)
    set_lookup(expt, gain=write_flex(flex, tmp_path / "g.pickle", np.full(SHAPE, 0.01)))
    out = tmp_path / "boxes.h5"
    command = ["extract", str(expt), str(tiny.refl), "--out", str(out)]
    assert main([*command, "--set", "extraction.find_defects=false"]) == 0
    with h5py.File(out) as store:
        strongest = store["boxes/counts"][()].max()
    assert strongest == 100 * counts_of(tiny.expt)[0].max() > 2**16


def test_distortion_maps_move_predictions_as_in_dxtbx(flex, tiny, tmp_path):
    slow, fast = np.mgrid[: SHAPE[0], : SHAPE[1]]
    dx = 1.5 * np.sin(fast / 40) * np.cos(slow / 60)
    dy = 0.8 * np.cos(fast / 50) + 0.3
    expt = copy_of(tiny, tmp_path)
    set_lookup(
        expt,
        dx=write_flex(flex, tmp_path / "dx.pickle", dx),
        dy=write_flex(flex, tmp_path / "dy.pickle", dy),
    )
    (experiment,) = read_experiments(expt)
    ours = predict_reflections(experiment, 2.5)
    panel = dxtbx_imageset(expt).get_detector()[0]
    theirs = np.array([panel.millimeter_to_pixel(mm) for mm in ours.xyz_mm[:, :2].tolist()])
    np.testing.assert_allclose(ours.xyz_px[:, :2], theirs, atol=1e-6)
    ideal = predict_reflections(read_experiments(tiny.expt)[0], 2.5)
    moved = (ours.xyz_px - ideal.xyz_px).abs().amax(0)
    assert moved[0] > 1.4
    assert moved[1] > 1.0


@pytest.mark.parametrize("missing", ["dx", "dy"])
def test_one_distortion_map_is_not_enough(tiny, tmp_path, missing):
    expt = copy_of(tiny, tmp_path)
    set_lookup(expt, dx="dx.pickle", dy="dy.pickle")
    set_lookup(expt, **{missing: None})
    with pytest.raises(UserError, match=r"names only .*pickle; import again with both"):
        predict_reflections(read_experiments(expt)[0], 3.0)


def test_lost_distortion_maps_are_asked_for(tiny, tmp_path):
    expt = copy_of(tiny, tmp_path)
    set_panel(expt, px_mm_strategy={"type": "OffsetParallaxCorrectedPxMmStrategy"})
    with pytest.raises(UserError, match="refined with distortion maps, but its image set names"):
        predict_reflections(read_experiments(expt)[0], 3.0)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4)])
def test_flex_arrays_are_read_exactly(flex, tmp_path, shape):
    rng = np.random.default_rng(len(shape))
    doubles = rng.normal(size=shape) * 10.0 ** rng.integers(-300, 300, shape)
    special = np.array([0.0, -0.0, 1, -1, 0.1, 255 / 256, 5e-324, 1.7e308, 2**53 - 1])
    for array in (np.atleast_1d(doubles), special, np.atleast_1d(doubles) > 0):
        write_flex(flex, tmp_path / "x.pickle", array)
        (read,) = read_flex(tmp_path / "x.pickle")
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def wrong_files(flex):
    """Content of a mask file, and what is said of it."""
    return {
        "missing": (None, "cannot read .*pixels.mask, the mask of the images"),
        "empty": (b"", "is no pickle of DIALS' flex arrays"),
        "text": (b"all pixels are good", "is no pickle of DIALS' flex arrays"),
        "harmful": (pickle.dumps((Harmful(),)), r"it names posix\.system"),
        "numpy": (pickle.dumps(np.ones(SHAPE, bool)), r"it names numpy\."),
        "cut": (pickle.dumps(flex.bool(flex.grid(SHAPE), True))[:-500], "is no pickle of DIALS'"),
        "other": (pickle.dumps({"mask": None}), "is no pickle of DIALS' flex arrays"),
        "doubles": (pickle.dumps(flex.double(flex.grid(SHAPE), 1)), "holds float64 .* need bool"),
        "size": (pickle.dumps(flex.bool(flex.grid(9, 8), True)), r"arrays of \[\(9, 8\)\]"),
        "panels": (pickle.dumps((flex.bool(flex.grid(SHAPE), True),) * 2), "for this detector"),
    }


@pytest.mark.parametrize(
    "kind",
    "missing empty text harmful numpy cut other doubles size panels".split(),
)
def test_wrong_mask_files_are_named(flex, tiny, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    expt = copy_of(tiny, tmp_path)
    set_lookup(expt, mask="pixels.mask")
    content, message = wrong_files(flex)[kind]
    if content is not None:
        (tmp_path / "pixels.mask").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        counts_of(expt)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "harmed").exists()
    assert main(["extract", str(expt), str(tiny.refl), "--out", "boxes.h5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
