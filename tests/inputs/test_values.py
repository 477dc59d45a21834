"""What pixel values mean, as in dxtbx: trusted range, mask codes, noise below zero, gain."""

import h5py
import numpy as np
import pytest
from image_cases import copy_of, dxtbx_imageset, edit, frames_of, set_panel, store_frames

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.io.images import open_frames
from braggflux.pipelines.cli import main

GAP = 65533  # from here on the simulated frames hold mask codes


@pytest.fixture(scope="module")
def raw(tiny) -> np.ndarray:
    """(image, slow, fast) int32; INT_MIN in gaps."""
    frames = frames_of(tiny.master).astype(np.int32)
    frames[frames >= GAP] = np.iinfo(np.int32).min
    return frames


def counts_of(expt) -> tuple[np.ndarray, np.ndarray]:
    """All frames, -1 where there is no count, and the static mask."""
    with open_frames(read_experiments(expt)[0]) as source:
        frames = np.stack([source.read(i)[0] for i in range(source.n_images)])
        return frames.astype(np.int32), source.static_mask()[0]


def dxtbx_counts(expt) -> np.ndarray:
    """(raw - pedestal) / gain of dxtbx, NaN where its mask says so."""
    images = dxtbx_imageset(expt)
    frames = []
    for i in range(len(images)):
        (image,), (mask,) = images.get_corrected_data(i), images.get_mask(i)
        frames.append(np.where(mask.as_numpy_array(), image.as_numpy_array(), np.nan))
    return np.stack(frames)


def assert_as_dxtbx(expt) -> None:
    ours, mask = counts_of(expt)
    theirs = dxtbx_counts(expt)
    np.testing.assert_array_equal((ours >= 0) & mask, np.isfinite(theirs))
    good = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[good], theirs[good])


@pytest.mark.slow
def test_the_expt_decides_what_is_saturated(dials, tiny, tmp_path):
    """The file says 20, the .expt 65533: every voxel of every box is dxtbx's."""
    expt = copy_of(tiny, tmp_path)
    store_frames(expt, frames_of(tiny.master), saturation_value=20)
    out = tmp_path / "boxes.h5"
    command = ["extract", str(expt), str(expt.with_suffix(".refl")), "--out", str(out)]
    assert main([*command, "--set", "extraction.find_defects=false"]) == 0
    with h5py.File(out) as store:
        boxes, corners = store["boxes/counts"][()], store["reflections/corner"][()]
        valid = (store["boxes/mask"][()] & 1).astype(bool)
        single = store["reflections/frames_per_layer"][()] == 1
    depth, height, width = boxes.shape[1:]
    margin = 16
    theirs = np.pad(dxtbx_counts(expt), margin, constant_values=np.nan)
    assert boxes.sum() > 1_500_000  # 387,936 where the file's value is believed
    boxes, valid, corners = boxes[single], valid[single], corners[single]
    assert len(boxes) > 1000
    cut = [theirs[t : t + depth, y : y + height, x : x + width] for t, y, x in corners + margin]
    np.testing.assert_array_equal(valid, np.isfinite(cut))
    np.testing.assert_array_equal(boxes, np.nan_to_num(cut))


@pytest.mark.parametrize("trusted_range", [(-1, 65533), (-1, 20), (-1, 2**31), (-(2.0**31), 3.0)])
@pytest.mark.parametrize("saturation", [20, 65533])
def test_trusted_ranges_equal_dxtbx(dials, tiny, tmp_path, trusted_range, saturation):
    expt = copy_of(tiny, tmp_path)
    store_frames(expt, frames_of(tiny.master), saturation_value=saturation)
    set_panel(expt, trusted_range=trusted_range)
    ours, mask = counts_of(expt)
    theirs = dxtbx_counts(expt)
    # 65535 becomes -1 in dxtbx, which a range from -2^31 trusts; here it is a code
    good = np.where(theirs >= 0, theirs, np.nan)
    np.testing.assert_array_equal(np.where((ours >= 0) & mask, ours, np.nan), good)
    assert np.nanmax(good) < trusted_range[1]


# per kind: (ADU of photons and standard normal noise, trusted range, further values of the panel)
NOISY = {
    "int32, trusted from -100": (lambda n, e: np.rint(n + 0.8 * e), (-100, 65533), {}),
    "int32, only -1 and -2": (lambda n, e: np.rint(n + 0.45 * e), (-100, 65533), {}),
    "int32, no range given": (lambda n, e: np.rint(n + 0.8 * e), (-(2.0**31), 2.0**31 - 1), {}),
    "int32, range cuts the noise": (lambda n, e: np.rint(n + 0.8 * e), (-1, 65533), {}),
    "int16, range from 0": (lambda n, e: np.rint(n + e).clip(-9).astype("i2"), (0, 30000), {}),
    "float32": (lambda n, e: (n + 0.4 * e).astype("f4"), (-10, 65533), {}),
    "float32, range from 0": (lambda n, e: (n + 0.4 * e).astype("f4"), (0, 65533), {}),
    "float64 ADU with gain": (lambda n, e: 12.4 * n + 8 * e, (-1000, 1e6), {"gain": 12.4}),
    "CCD": (
        lambda n, e: np.rint(1.7 * n + 40 + 3 * e).clip(0, 65000).astype("u2"),
        (-1, 65000),
        {"gain": 1.7, "pedestal": 40.0},
    ),
    "pedestal too large": (lambda n, e: np.rint(n + 10), (-1, 65533), {"pedestal": 13.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISY)
def test_noise_below_zero_is_refused(tiny, raw, tmp_path, capsys, kind):
    make, trusted_range, panel = NOISY[kind]
    noise = np.random.default_rng(0).normal(size=raw.shape)
    adu = make(raw, noise)
    gap = raw < 0
    if adu.dtype.kind == "f" and kind.startswith("int"):
        adu = np.where(gap, raw, adu).astype(np.int32)
    else:
        adu[gap] = np.iinfo(adu.dtype).max if adu.dtype.kind in "iu" else np.nan
    expt = copy_of(tiny, tmp_path)
    store_frames(expt, adu)
    set_panel(expt, trusted_range=trusted_range, **panel)
    out = tmp_path / "boxes.h5"
    assert main(["extract", str(expt), str(expt.with_suffix(".refl")), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "image 1 has" in message
    assert "below zero" in message
    assert "dials.integrate" in message
    assert not out.exists()


@pytest.mark.parametrize("dtype", ["i4", "f4"])
@pytest.mark.parametrize("low", [0, -1, -3, -100, -(2.0**31)])
def test_codes_of_bad_pixels_go_on(tiny, raw, tmp_path, dtype, low):
    """-1 in gaps, -2 at dead pixels, on every image: as the unsigned original."""
    expected, mask = counts_of(tiny.expt)
    adu = raw.astype(dtype)
    adu[raw < 0] = -1
    dead = np.random.default_rng(3).random(raw.shape[1:]) < 0.01
    adu[:, dead] = -2
    flashing = np.random.default_rng(4).random(raw.shape) < 2e-5
    adu[flashing] = -2  # hot on some images
    expt = copy_of(tiny, tmp_path)
    store_frames(expt, adu)
    set_panel(expt, trusted_range=(low, 65533))
    frames, same_mask = counts_of(expt)
    expected = np.where(dead | flashing, -1, expected)
    np.testing.assert_array_equal(frames, expected)
    np.testing.assert_array_equal(same_mask, mask)


def test_static_dark_corners_go_on(tiny, raw, tmp_path):
    """The unexposed corners of a round CCD are 0, below the pedestal, on every image."""
    expected, _ = counts_of(tiny.expt)
    adu = np.where(raw < 0, 0, raw + 40).astype("u2")
    expt = copy_of(tiny, tmp_path)
    store_frames(expt, adu)
    set_panel(expt, pedestal=40.0, trusted_range=(-1, 65000))
    np.testing.assert_array_equal(counts_of(expt)[0], expected)


@pytest.mark.parametrize("dtype", ["i4", "u4", "f4", "f8"])
def test_types_that_hold_the_same_photons(dials, tiny, raw, tmp_path, dtype):
    expected, _ = counts_of(tiny.expt)
    code = {"u": 2**32 - 1, "i": -1, "f": -1.0}[np.dtype(dtype).kind]
    adu = np.where(raw < 0, code, raw).astype(dtype)
    adu[5, 30, 40] = expected[5, 30, 40] = 1_000_000
    expt = copy_of(tiny, tmp_path)
    store_frames(expt, adu, bit_depth_readout=32)
    set_panel(expt, trusted_range=(-1, 2_000_000))
    np.testing.assert_array_equal(counts_of(expt)[0], expected)
    assert_as_dxtbx(expt)


@pytest.mark.parametrize("gain", [0.5, 1.05, 1.7, 3.0])
def test_gain_keeps_the_mean_of_dxtbx(dials, tiny, raw, tmp_path, gain):
    """In weak and in strong pixels; rounding to the nearest would give up to 70 % more."""
    expt = copy_of(tiny, tmp_path)
    set_panel(expt, gain=gain)
    ours, mask = counts_of(expt)
    theirs = dxtbx_counts(expt)
    good = np.isfinite(theirs)
    np.testing.assert_array_equal((ours >= 0) & mask, good)
    for adu in ((raw < 2) & good, (raw >= 2) & (raw < 10) & good, (raw >= 10) & good):
        fraction = theirs[adu] % 1
        error = np.sqrt((fraction * (1 - fraction)).sum())
        assert abs(ours[adu].sum() - theirs[adu].sum()) <= 5 * error + 1e-6


def test_few_negative_pixels_are_left_out(tiny, raw, tmp_path, caplog):
    """Less than 1 in 10,000 changes no mean: as many as were dropped are missing, no more."""
    caplog.set_level("INFO")
    expected, mask = counts_of(tiny.expt)
    adu = np.where(raw < 0, -1, raw)
    rare = (np.random.default_rng(5).random(raw.shape) < 5e-5) & (raw >= 0) & mask
    adu[rare] = -7
    expt = copy_of(tiny, tmp_path)
    store_frames(expt, adu.astype("i4"))
    set_panel(expt, trusted_range=(-100, 65533))
    frames, _ = counts_of(expt)
    np.testing.assert_array_equal(frames, np.where(rare, -1, expected))
    assert f"image 1 has {rare[0].sum()} negative of {mask.sum()} pixels" in caplog.text
    assert caplog.text.count("left out") == 1


@pytest.mark.parametrize("is_absent", [False, True])
def test_a_trusted_range_of_nothing_is_named(tiny, tmp_path, is_absent):
    """dxtbx takes an absent one for (0, 0), too."""
    expt = copy_of(tiny, tmp_path)
    set_panel(expt, trusted_range=(0.0, 0.0))
    if is_absent:
        edit(expt, lambda e: e["detector"][0]["panels"][0].pop("trusted_range"))
    with pytest.raises(UserError, match=r"trusted range of the \.expt, 0 to 0, holds no count"):
        counts_of(expt)
