"""Boxes, masks and background against plain loops over voxels."""

import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_frames import (
    BOX,
    EXTENT,
    N_IMAGES,
    SHAPES,
    WIDTH,
    ArrayFrames,
    make_experiment,
    make_frames,
    make_prediction,
)

from braggflux.integrator.crystal.geometry import (
    Beam,
)
from braggflux.integrator.errors import UserError
from braggflux.integrator.model.build import mean_background
from braggflux.integrator.prediction.rocking import frame_sigma
from braggflux.integrator.shoebox.background import mean_image, within_resolution
from braggflux.integrator.shoebox.extent import SpotExtent
from braggflux.integrator.shoebox.extract import extract_shoeboxes
from braggflux.integrator.shoebox.mask import MaskBit, MaskSettings
from braggflux.integrator.shoebox.sweep import Sweep
from braggflux.integrator.types import Flag


def squared(spots, sigma, row, panel, z, y, x):
    """Squared distance of a voxel to a spot; infinite on another panel."""
    if spots.panel[row] != panel:
        return np.inf
    offset = np.array([x, y, z]) + 0.5 - spots.xyz_px[row].numpy()
    return float(((offset / sigma[row]) ** 2).sum())


def brute_force(frames, spots, row, others=()):
    """(counts, mask) of one box; ``others`` are further spots beside those of the list."""
    settings = MaskSettings()
    everything = [(spots, i) for i in range(len(spots)) if i != row]
    everything += [(other, i) for other in others for i in range(len(other))]
    sigmas = {id(s): sigma_of(s) for s in (spots, *others)}
    per_layer = layers_of(spots, row)
    corner = np.floor(spots.xyz_px[row].numpy()).astype(int)[::-1] - np.array(BOX) // 2
    corner[0] = np.floor(float(spots.xyz_px[row, 2]) - (per_layer * BOX[0] - 1) / 2)
    panel = int(spots.panel[row])
    slow, fast = SHAPES[panel]
    counts, mask = np.zeros(BOX, int), np.zeros(BOX, int)
    for index in np.ndindex(*BOX):
        y, x = corner[1:] + index[1:]
        of_frames = []
        for z in corner[0] + index[0] * per_layer + np.arange(per_layer):
            value = -1
            is_read = 0 <= z < N_IMAGES
            if is_read and 0 <= y < slow and 0 <= x < fast and frames.usable[panel][y, x]:
                value = frames.panels[panel][z, y, x]
            own = squared(spots, sigmas[id(spots)], row, panel, z, y, x)
            other = min(
                (squared(s, sigmas[id(s)], i, panel, z, y, x) for s, i in everything),
                default=np.inf,
            )
            bits = is_read * MaskBit.FOREGROUND * (own <= settings.foreground**2)
            is_claimed = other <= settings.overlap**2 and other < own
            bits |= is_read * MaskBit.OVERLAPPED * (is_claimed and own > settings.shared**2)
            if value >= 0:
                bits |= MaskBit.VALID
                bits |= MaskBit.BACKGROUND * (min(own, other) > settings.foreground**2)
            of_frames.append((value, bits))
        values, bits = np.array(of_frames).T
        mask[index] = np.bitwise_and.reduce(bits) & (MaskBit.VALID | MaskBit.BACKGROUND)
        mask[index] |= np.bitwise_or.reduce(bits) & (MaskBit.FOREGROUND | MaskBit.OVERLAPPED)
        counts[index] = values.sum() if mask[index] & MaskBit.VALID else 0
    return counts, mask


def layers_of(spots, row):
    """Frames of each layer: the box holds 3.5 standard deviations on both sides."""
    sigma = float(sigma_of(spots)[row, 2])
    return next(k for k in range(1, 99) if k * BOX[0] >= 7 * sigma + 1)


def sigma_of(spots, extent=EXTENT, width=WIDTH):
    along = frame_sigma(extent.sigma_m_deg, spots.zeta.numpy(), width)
    across = np.sqrt(np.array([extent.sigma_x_px, extent.sigma_y_px]) ** 2 + 1 / 12)
    return np.column_stack([np.broadcast_to(across, (len(spots), 2)), along])


@pytest.fixture(scope="module")
def random_store(tmp_path_factory):
    """Store of 60 crowded reflections on two panels with 20 neighbours that are not cut."""
    rng = np.random.default_rng(7)
    frames, spots, around = make_frames(rng), make_prediction(60, rng), make_prediction(20, rng)
    around.xyz_px[:10, 2] -= N_IMAGES  # before the scan
    sweep = Sweep(make_experiment(), frames, spots, around)
    path = tmp_path_factory.mktemp("store") / "random.h5"
    ticks = []
    store = extract_shoeboxes([sweep], EXTENT, path, progress=lambda *t: ticks.append(t))
    assert ticks == [(i + 1, N_IMAGES) for i in range(N_IMAGES)]
    return store, frames, spots, around


def rows_of(store, spots):
    """Row of the store of each reflection of the list."""
    xyz = store.metadata(torch.float64).xyz_px
    return [int(torch.nonzero((xyz == p).all(1))) for p in spots.xyz_px]


@pytest.mark.slow
def test_boxes_and_masks_equal_a_loop_over_voxels(random_store):
    store, frames, spots, around = random_store
    counts, mask = store.read_raw(slice(0, len(store)))
    seen = set()
    assert store.metadata().frames_per_layer.unique().tolist() == [2, 3]
    for row, stored in list(enumerate(rows_of(store, spots)))[::3]:
        expected_counts, expected_mask = brute_force(frames, spots, row, (around,))
        np.testing.assert_array_equal(counts[stored].numpy(), expected_counts)
        np.testing.assert_array_equal(mask[stored].numpy(), expected_mask)
        seen |= set(np.unique(expected_mask).tolist())
    assert len(seen) >= 8  # every kind of voxel occurred


def test_every_frame_is_read_once(random_store):
    _, frames, _, _ = random_store
    assert sorted(frames.frames_read) == list(range(N_IMAGES))


def test_flags_follow_from_the_masks(random_store):
    store, _, spots, _ = random_store
    counts, mask = store.read_raw(slice(0, len(store)))
    metadata, flags = store.metadata(torch.float64), store.flags
    shapes = torch.tensor(SHAPES)[metadata.panel]
    low = metadata.corner
    layer = metadata.frames_per_layer[:, None]
    high = low + torch.tensor(BOX) * torch.cat([layer, torch.ones(len(low), 2).long()], 1)
    limit = torch.cat([torch.full((len(store), 1), N_IMAGES), shapes], dim=1)
    is_cut = (low < 0).any(1) | (high > limit).any(1)
    torch.testing.assert_close((flags & Flag.PARTIAL_EDGE) > 0, is_cut)
    is_overlapped = ((mask & MaskBit.OVERLAPPED) > 0).flatten(1).any(1)
    # a box whose claimed voxels are all shared with the neighbour is flagged too
    assert ((flags & Flag.OVERLAPPED) > 0)[is_overlapped].all()
    assert counts.shape == (len(spots), *BOX)
    recorded = torch.from_numpy(store.column("recorded_fraction"))
    torch.testing.assert_close((flags & Flag.REJECTED) > 0, recorded < 0.1)
    whole = (flags & Flag.MASKED_CORE) == 0
    assert recorded[whole].min() > 0.85
    assert whole.any()
    assert not whole.all()


def test_neighbours_are_the_spots_whose_ellipsoids_touch(random_store):
    """Against a loop over all pairs; spots that have no box have no row."""
    store, _, spots, around = random_store
    rows, reach = rows_of(store, spots), MaskSettings().shared
    found = store.read(slice(0, len(store))).neighbours
    everything = [(spots, i) for i in range(len(spots))]
    everything += [(around, i) for i in range(len(around))]
    n_pairs = 0
    for own, row in enumerate(rows):
        expected = {}
        for other, k in everything:
            apart = other.xyz_px[k].double() - spots.xyz_px[own].double()
            sigma = sigma_of(spots)[own] + sigma_of(other)[k]
            is_near = float(((apart.numpy() / sigma) ** 2).sum()) < reach**2
            is_itself = other is spots and k == own
            if is_near and other.panel[k] == spots.panel[own] and not is_itself:
                place = tuple(apart.numpy().round(4))
                expected[place] = (rows[k] if other is spots else -1, float(other.zeta[k]))
        present = found.is_present[row]
        places = [tuple(p.round(4)) for p in found.offset[row][present].double().numpy()]
        has = zip(found.store_row[row][present], found.zeta[row][present], strict=True)
        known = {
            place: (int(index), float(zeta))
            for place, (index, zeta) in zip(places, has, strict=True)
        }
        assert len(known) == len(expected)
        for place, (index, zeta) in expected.items():
            near = min(known, key=lambda p: np.abs(np.subtract(p, place)).max())
            np.testing.assert_allclose(near, place, atol=1e-3)
            assert known[near] == (index, pytest.approx(zeta, rel=1e-6))
        n_pairs += len(expected)
    assert n_pairs > 20


def test_neighbours_can_be_masked(random_store, tmp_path):
    """Without shared voxels: what another spot claims is left out, and none is modelled."""
    shared, _, spots, around = random_store
    sweep = Sweep(make_experiment(), make_frames(np.random.default_rng(7)), spots, around)
    settings = MaskSettings(shared=0.0)
    with extract_shoeboxes([sweep], EXTENT, tmp_path / "s.h5", settings=settings) as store:
        batch, before = (s.read(slice(0, len(s))) for s in (store, shared))
    assert batch.neighbours is None
    assert not (batch.is_valid & ~before.is_valid).any()
    assert (before.is_valid & ~batch.is_valid).sum() > 50


def test_recorded_fraction_of_masked_spots(tmp_path):
    """Half a spot under a gap, and one wholly inside of it: kept, flagged, not dropped."""
    panels = [np.ones((11, 40, 40), np.int32)]
    usable = np.ones((40, 40), bool)
    usable[:, :20] = False
    frames = ArrayFrames(panels, [usable])
    spots = make_prediction(3, np.random.default_rng(0), ((40, 40),), 11, zeta=1.0)
    spots.xyz_px[:] = torch.tensor([[20.0, 20.5, 5.5], [10.5, 20.5, 5.5], [30.5, 20.5, 5.5]])
    experiment = make_experiment(((40, 40),), 11)
    store = extract_shoeboxes([Sweep(experiment, frames, spots)], EXTENT, tmp_path / "s.h5")
    half, none, whole = (int(torch.nonzero(store.metadata().xyz_px[:, 0] == x)) for x in
                         (20.0, 10.5, 30.5))  # fmt: skip
    recorded = store.column("recorded_fraction")
    # the box of a centroid on a pixel edge reaches one pixel farther to the right
    assert recorded[half] == pytest.approx(0.5, abs=1e-3)
    assert recorded[[none, whole]] == pytest.approx([0.0, 1.0], abs=1e-12)
    flags = store.flags
    assert flags[half] & Flag.MASKED_CORE
    assert not flags[half] & Flag.REJECTED
    assert flags[none] & Flag.REJECTED
    assert flags[whole] == 0


@pytest.mark.parametrize(("zeta", "is_rejected"), [(0.03, True), (0.15, False)])
def test_spots_that_graze_the_ewald_sphere_are_rejected(zeta, is_rejected, tmp_path):
    frames = ArrayFrames([np.ones((120, 40, 40), np.int32)], [np.ones((40, 40), bool)])
    spots = make_prediction(1, np.random.default_rng(0), ((40, 40),), 120, zeta=zeta)
    spots.xyz_px[:] = torch.tensor([[20.5, 20.5, 60.5]])
    sweep = Sweep(make_experiment(((40, 40),), 120), frames, spots)
    store = extract_shoeboxes([sweep], EXTENT, tmp_path / "s.h5")
    assert bool(store.flags[0] & Flag.REJECTED) == is_rejected


def test_neighbours_are_told_apart_in_rotation(tmp_path):
    """At the same place on the detector, ten frames apart: no overlap; two frames apart: one."""
    frames = ArrayFrames([np.ones((30, 40, 40), np.int32)], [np.ones((40, 40), bool)])
    spots = make_prediction(4, np.random.default_rng(0), ((40, 40),), 30, zeta=1.0)
    spots.xyz_px[:] = torch.tensor(
        [[10.5, 10.5, 5.5], [12.5, 10.5, 15.5], [30.5, 30.5, 20.5], [32.5, 30.5, 22.5]]
    )
    experiment = make_experiment(((40, 40),), 30)
    store = extract_shoeboxes([Sweep(experiment, frames, spots)], EXTENT, tmp_path / "s.h5")
    order = [int(torch.nonzero(store.metadata().xyz_px[:, 2] == z)) for z in spots.xyz_px[:, 2]]
    assert [bool(store.flags[i] & Flag.OVERLAPPED) for i in order] == [False, False, True, True]


def test_background_statistic_equals_a_loop(random_store):
    store, frames, spots, around = random_store
    field = store.background(0)
    sigmas = [(spots, sigma_of(spots)), (around, sigma_of(around))]
    total = [np.zeros(shape) for shape in SHAPES]
    count = [np.zeros(shape) for shape in SHAPES]
    for panel, (slow, fast) in enumerate(SHAPES):
        y, x = np.mgrid[:slow, :fast] + 0.5
        for z in range(N_IMAGES):
            is_dark = frames.usable[panel] & (frames.panels[panel][z] >= 0)
            for prediction, sigma in sigmas:
                for row in np.nonzero(prediction.panel.numpy() == panel)[0]:
                    centre = prediction.xyz_px[row].numpy()
                    distance = ((x - centre[0]) / sigma[row, 0]) ** 2
                    distance = distance + ((y - centre[1]) / sigma[row, 1]) ** 2
                    distance = distance + ((z + 0.5 - centre[2]) / sigma[row, 2]) ** 2
                    is_dark &= distance > MaskSettings().foreground ** 2
            total[panel] += np.where(is_dark, frames.panels[panel][z], 0)
            count[panel] += is_dark
    for panel in range(2):
        np.testing.assert_array_equal(field.count[panel], count[panel])
        np.testing.assert_array_equal(field.total[panel], total[panel])


def test_frame_ratio_and_expected_background_recover_a_known_field(tmp_path):
    """Background = image x frame factor, seen between spots that hide a third of it."""
    rng = np.random.default_rng(3)
    shape, n = (60, 70), 40
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = 4.0 + 3.0 * np.exp(-((x - 20.0) ** 2 + (y - 30.0) ** 2) / 500)
    factor = 1 + 0.3 * np.sin(np.arange(n) / 3)
    panel = rng.poisson(image * factor[:, None, None]).astype(np.int32)
    spots = make_prediction(150, rng, (shape,), n)
    frames = ArrayFrames([panel], [np.ones(shape, bool)])
    experiment = make_experiment((shape,), n)
    store = extract_shoeboxes([Sweep(experiment, frames, spots)], EXTENT, tmp_path / "s.h5")
    field = store.background(0)
    expected = factor / factor.mean()
    # 4,000 pixels of 5 photons: 0.7 % noise
    np.testing.assert_allclose(field.frame_ratio / field.frame_ratio.mean(), expected, atol=0.035)
    smooth = mean_image(field.total[0], field.count[0])
    np.testing.assert_allclose(smooth / (image * factor.mean()), 1, atol=0.15)
    metadata = store.metadata()
    boxes = mean_background(store, smoothing_px=2.0)(metadata)
    inside = torch.nonzero(store.flags & Flag.PARTIAL_EDGE == 0)[:, 0]
    for row in inside[:20].tolist():
        f, s, q = metadata.corner[row].tolist()
        k = int(metadata.frames_per_layer[row])
        level = factor[f : f + k * BOX[0]].reshape(-1, k).sum(1)
        truth = image[s : s + BOX[1], q : q + BOX[2]] * level[:, None, None]
        np.testing.assert_allclose(boxes[row], truth, rtol=0.15)


def pixel_inv_d(experiment, panel: int) -> np.ndarray:
    """1/d at the pixel centres of a panel, (slow, fast) [1/A], from the vectors themselves."""
    geometry, s0 = experiment.panels[panel], experiment.beam.s0
    y, x = np.indices(geometry.shape) + 0.5
    mm = np.stack([x * geometry.pixel_size[0], y * geometry.pixel_size[1], np.ones_like(x)], -1)
    lab = mm @ geometry.d_matrix.T
    s1 = lab / np.linalg.norm(lab, axis=-1, keepdims=True) * np.linalg.norm(s0)
    return np.linalg.norm(s1 - s0, axis=-1)


def test_pixels_beyond_the_resolution_limit_are_no_background(tmp_path):
    rng = np.random.default_rng(0)
    experiment = make_experiment()
    inv_d = [pixel_inv_d(experiment, panel) for panel in range(2)]
    spots = make_prediction(5, rng)
    d_min = 1 / np.median(inv_d[0])
    spots = replace(spots, d=torch.full_like(spots.d, d_min))
    sweep = Sweep(experiment, make_frames(rng), spots)
    store = extract_shoeboxes([sweep], EXTENT, tmp_path / "s.h5")
    count = store.background(0).count[0]
    assert not count[inv_d[0] > 1 / d_min].any()
    assert count[inv_d[0] < 0.9 / d_min].any()


def test_pixel_resolution_is_that_of_the_geometry():
    tilt = np.array([[0.8, 0.0, 0.6], [0.0, 1.0, 0.0], [-0.6, 0.0, 0.8]])
    base = make_experiment()
    panel = replace(
        base.panels[1],
        fast_axis=tilt @ base.panels[1].fast_axis,
        origin=tilt @ base.panels[1].origin,
    )
    experiment = replace(base, panels=(base.panels[0], panel), beam=Beam(tilt[:, 2], 0.8))
    inv_d = pixel_inv_d(experiment, 1)
    for limit in np.quantile(inv_d, (0.02, 0.5, 0.98)):
        inside = within_resolution(experiment, 1, 1 / limit)
        apart = np.abs(inv_d - limit) > 1e-9  # one pixel may be the limit itself
        assert np.array_equal(inside[apart], inv_d[apart] < limit)
    rows = slice(5, 9)
    assert np.array_equal(within_resolution(experiment, 1, 1 / limit, rows), inside[rows])


def test_two_sweeps_share_a_store(tmp_path):
    rng = np.random.default_rng(1)
    sweeps = [
        Sweep(make_experiment(identifier=name), make_frames(rng), make_prediction(n, rng))
        for name, n in (("first", 30), ("second", 20))
    ]
    together = extract_shoeboxes(sweeps, EXTENT, tmp_path / "both.h5")
    assert torch.bincount(together.metadata().experiment).tolist() == [30, 20]
    assert [e["identifier"] for e in together.experiments] == ["first", "second"]
    second = extract_shoeboxes(sweeps[1:], EXTENT, tmp_path / "second.h5")
    for ours, alone in zip(together.read_raw(slice(30, 50)), second.read_raw(slice(0, 20)),
                           strict=True):  # fmt: skip
        torch.testing.assert_close(ours, alone)
    torch.testing.assert_close(together.metadata().refl_row, torch.arange(50))


def peak_of_spots(tmp_path, n: int, n_images: int) -> int:
    """Largest allocation during an extraction of ``n`` boxes from frames that are never held."""

    class Endless(ArrayFrames):
        def __init__(self):
            self.n_images, self.panel_shapes = n_images, [(64, 64)]

        def static_mask(self):
            return [np.ones((64, 64), bool)]

        def read(self, frame):
            return [np.full((64, 64), frame % 7, np.int16)]

    spots = make_prediction(n, np.random.default_rng(0), ((64, 64),), n_images, zeta=1.0)
    extent = SpotExtent(0.8, 0.8, 0.25, (7, 9, 9))
    sweep = Sweep(make_experiment(((64, 64),), n_images), Endless(), spots)
    tracemalloc.start()
    extract_shoeboxes([sweep], extent, tmp_path / f"{n}.h5").close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


BYTES_PER_SPOT = 640
"""On 2026-11-30: 460 to 520 beside the prediction, of boxes of 1,700 bytes (1,110 before)."""


def test_memory_stays_far_below_the_output(tmp_path):
    """A longer scan with as many spots a frame: what is known of each spot is all that grows."""
    peak_of_spots(tmp_path, 20, 100)  # what the compiler of the loops holds
    short, long = (peak_of_spots(tmp_path, *size) for size in ((2500, 125), (10_000, 500)))
    assert (long - short) / 7500 < BYTES_PER_SPOT
    assert long < 9.5e6, long  # 8.0 MB, of a store of 28


def test_user_errors_leave_no_file(tmp_path):
    rng = np.random.default_rng(0)
    frames, spots = make_frames(rng), make_prediction(5, rng)
    for usable in frames.usable:
        usable[:] = False
    sweep = Sweep(make_experiment(), frames, spots)
    with pytest.raises(UserError, match="no pixel of any shoebox"):
        extract_shoeboxes([sweep], EXTENT, tmp_path / "s.h5")
    with pytest.raises(UserError, match="no reflection falls"):
        extract_shoeboxes([replace(sweep, prediction=spots[:0])], EXTENT, tmp_path / "s.h5")
    assert list(tmp_path.iterdir()) == []


BYTES_PER_PIXEL = 32.0
"""On 2026-11-30: 29.0 of numpy's arrays, four buffers of 2 bytes for frames among them."""


def peak_bytes(tmp_path, side: int, n_images: int) -> int:
    """Largest allocation during an extraction of 50 boxes from square frames of 16 bits."""

    class Flat(ArrayFrames):
        def __init__(self):
            self.n_images, self.panel_shapes = n_images, [(side, side)]

        def static_mask(self):
            return [np.ones((side, side), bool)]

        def read(self, frame):
            return [np.full((side, side), frame % 2, np.int16)]

    spots = make_prediction(50, np.random.default_rng(0), ((side, side),), n_images, zeta=1.0)
    sweep = Sweep(make_experiment(((side, side),), n_images), Flat(), spots)
    tracemalloc.start()
    extract_shoeboxes([sweep], EXTENT, tmp_path / f"{side}_{n_images}.h5").close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_per_pixel_does_not_grow_with_the_scan(tmp_path):
    peak_bytes(tmp_path, 100, 5)  # what is loaded once
    small, large, long = (peak_bytes(tmp_path, *s) for s in ((400, 12), (1000, 12), (1000, 60)))
    per_pixel = (large - small) / (1000**2 - 400**2)
    assert per_pixel < BYTES_PER_PIXEL
    assert long < 1.1 * large


class Failing(ArrayFrames):
    """Frames of which one cannot be read."""

    def read(self, frame):
        if frame == 7:
            raise UserError("cannot read frame 7")
        return super().read(frame)


def test_a_reader_that_fails_ends_the_extraction(tmp_path):
    frames = Failing([np.zeros((12, 60, 60), np.int32)], [np.ones((60, 60), bool)])
    spots = make_prediction(20, np.random.default_rng(0), ((60, 60),), 12, zeta=1.0)
    sweep = Sweep(make_experiment(((60, 60),), 12), frames, spots)
    with pytest.raises(UserError, match="cannot read frame 7"):
        extract_shoeboxes([sweep], EXTENT, tmp_path / "s.h5")
    assert list(tmp_path.iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("frames")]
