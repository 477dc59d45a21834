"""What is no defect costs nothing; a bright place costs itself."""

from __future__ import annotations

import numpy as np
import pytest
from image_cases import copy_of, frames_of, store_frames

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.io.dials import read_experiments, read_reflections
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.shoebox.background import mean_image
from braggflux.integrator.shoebox.extraction import run_extraction

BLOBS = {
    "salt": (4, 3000),
    "overflowing salt": (4, 60_000),
    "cluster": (3, 500),
    "ice": (8, 400),
}


def extracted(expt, out, **options) -> ShoeboxStore:
    refl = next(expt.parent.glob("*.refl"))
    return run_extraction(
        read_experiments(expt), None, out, reflections=read_reflections(refl), **options
    )


def valid(store) -> np.ndarray:
    return store.read(slice(0, len(store)), exclude=0).is_valid.numpy()


def boxes_at(store, blob) -> np.ndarray:
    """Voxels of the blob, (N, D, H, W): frame, slow and fast ranges."""
    metadata = store.read(slice(0, len(store))).metadata
    inside = []
    for axis, (low, high) in enumerate(blob):
        step = metadata.frames_per_layer.numpy()[:, None] if axis == 0 else 1
        place = metadata.corner.numpy()[:, axis, None] + np.arange(store.box[axis]) * step
        inside.append((place + step > low) & (place < high))
    return np.einsum("nd,nh,nw->ndhw", *inside)


@pytest.fixture(scope="module")
def control(tiny, tmp_path_factory):
    return extracted(tiny.expt, tmp_path_factory.mktemp("control") / "boxes.h5")


def test_a_sound_sweep_loses_nothing(tiny, control, tmp_path, caplog):
    """The tiny sweep has no defect: the search changes no voxel (18 tiles were shaded once)."""
    with caplog.at_level("WARNING"):
        off = extracted(tiny.expt, tmp_path / "off.h5", find_defects=False)
    assert np.array_equal(valid(control), valid(off))
    assert not caplog.records
    ratios = [store.background(0).frame_ratio for store in (control, off)]
    np.testing.assert_allclose(*ratios, rtol=0.02)


@pytest.mark.parametrize(("size", "counts"), BLOBS.values(), ids=BLOBS)
def test_a_bright_blob_costs_itself(tiny, control, tmp_path, caplog, size, counts):
    """Salt, ice, a zinger's cluster on one image: half of the frame's counts and more."""
    expt = copy_of(tiny, tmp_path)
    frames = frames_of(tiny.master)
    blob = ((3, 4), (120, 120 + size), (100, 100 + size))
    frames[3, slice(*blob[1]), slice(*blob[2])] = counts
    store_frames(expt, frames)
    with caplog.at_level("WARNING"):
        store = extracted(expt, tmp_path / "boxes.h5")
    assert not caplog.records
    lost = valid(control) & ~valid(store)
    assert not (lost & ~boxes_at(store, blob)).any()
    # the frame is not brighter, its neighbours are no darker
    ratio, expected = store.background(0).frame_ratio, control.background(0).frame_ratio
    np.testing.assert_allclose(ratio, expected, rtol=0.02)
    # and on the other 15 frames the place has its own background
    images = [
        mean_image(s.background(0).total[0], s.background(0).count[0]) for s in (store, control)
    ]
    near = (slice(105, 140), slice(85, 120))
    np.testing.assert_allclose(images[0][near], images[1][near], atol=0.1, rtol=0.3)


@pytest.mark.slow
def test_spots_smaller_than_a_pixel_keep_their_peaks(tmp_path, caplog):
    """0.13 pixels and 0.01 degrees, as of a microfocus beam on a Pilatus."""
    sharp = {
        "crystal.psf": 0.05,
        "crystal.mosaicity": 0.02,
        "crystal.block_tilt": 0.01,
        "crystal.size": (0.015, 0.015, 0.015),
        "crystal.divergence": (0.003, 0.003),
        "intensity.photons_per_f2": 3e-3,
    }
    files = simulate(tmp_path, preset="tiny", seed=0, overrides=sharp)
    with caplog.at_level("INFO"):
        on = extracted(files.expt, tmp_path / "on.h5")
        off = extracted(files.expt, tmp_path / "off.h5", find_defects=False)
    assert on.box == off.box
    assert caplog.text.count("spot extent 0.13 x 0.13 px") == 2
    assert np.array_equal(valid(on), valid(off))


@pytest.mark.slow
def test_frames_of_another_simulator(shared, tmp_path, caplog):
    """Sharp spots with long tails, no shadow: 7,845 tiles and frames were lost near the beam."""
    folder = shared / "data/nanobragg"
    with caplog.at_level("INFO"):
        run_extraction(
            read_experiments(folder / "refined.expt"),
            3.5,
            tmp_path / "boxes.h5",
            reflections=read_reflections(folder / "refined.refl"),
        )
    assert "0 zingers" in caplog.text
    assert ", 0 of 188160 tiles and frames in a shadow" in caplog.text
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
