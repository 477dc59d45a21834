"""Experiment lists with members that have no crystal, with stills, and with scans of no width."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from twin_wedges import Twin, joined

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.crystal.geometry import Experiment, Scan
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    read_experiments,
    read_reflections,
    write_experiments,
    write_reflections,
)
from braggflux.integrator.io.dials.sweeps import require_distinct, sweeps_of
from braggflux.integrator.prediction.predict import predict_reflections
from braggflux.integrator.shoebox.extent import SpotExtent
from braggflux.integrator.shoebox.extraction import run_extraction
from braggflux.integrator.shoebox.mask import MaskBit
from braggflux.merge.io.formats.dials import read_dials


@pytest.fixture(scope="module")
def twin(shared) -> Twin:
    return Twin(shared / "data/hewl_nai", d_min=6.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """16 simulated images."""
    return simulate(tmp_path_factory.mktemp("tiny"), preset="tiny", seed=0)


def read(folder, experiments, table):
    write_experiments(folder / "x.expt", experiments)
    write_reflections(folder / "x.refl", table)
    return read_dials(folder / "x.refl", folder / "x.expt")


def still(experiment: Experiment, image: int, identifier: str, n_images: int = 1) -> Experiment:
    """A scan of no width, as stills of a sequence have."""
    scan = Scan((image, image + n_images - 1), (0.0, 0.0))
    crystal = replace(experiment.crystal, A_at_scan_points=None)
    return replace(experiment, scan=scan, crystal=crystal, images=None, identifier=identifier)


@pytest.mark.parametrize("identifiers", [("a", "b", "c"), ("", "", "")])
def test_members_without_a_crystal_or_a_reflection_are_left_out(twin, tmp_path, identifiers):
    first, wedge, last = identifiers
    experiment, table = twin.wedge(101, 140, identifier=wedge)
    expected = read(tmp_path, [experiment], table.select(np.arange(7, len(table))))
    blank = replace(experiment, crystal=None, identifier=first)
    table.columns["id"][:] = 1
    table.columns["id"][:7] = 0  # strong spots of the lattice that was not indexed
    names = dict(enumerate(identifiers)) if wedge else {}
    table = replace(table, identifiers=names)
    found = read(tmp_path, [blank, experiment, still(experiment, 5, last)], table)
    np.testing.assert_array_equal(found.miller_index, expected.miller_index)
    for name in ("ROT", "frame", "BATCH"):
        np.testing.assert_array_equal(found.metadata[name], expected.metadata[name])


def test_a_list_without_any_crystal_is_refused(twin, tmp_path):
    experiment, table = twin.wedge(101, 140)
    with pytest.raises(UserError, match="no experiment with a crystal"):
        read(tmp_path, [replace(experiment, crystal=None)], table)


def test_stills_may_have_scans_of_no_width(twin, tmp_path):
    """Each is one image, as without a scan; before, angles and frames of width 0."""
    wedges = [twin.wedge(n, n, identifier=f"still{n}") for n in (5, 9, 10)]
    table = joined(wedges)
    with_scan = [still(e, n, e.identifier) for (e, _), n in zip(wedges, (5, 9, 10), strict=True)]
    without = [replace(e, scan=None, goniometer=None) for e in with_scan]
    found, expected = (read(tmp_path, list_, table) for list_ in (with_scan, without))
    assert found.n_images == 3
    assert "ROT" not in found.metadata
    assert found.metadata.keys() == expected.metadata.keys()
    for name, values in expected.metadata.items():
        np.testing.assert_array_equal(found.metadata[name], values, err_msg=name)
    np.testing.assert_array_equal(found.wavelength, expected.wavelength)


def test_a_scan_of_no_width_is_as_many_stills_as_images(twin, tmp_path):
    experiment, table = twin.wedge(5, 9)
    found = read(tmp_path, [still(experiment, 5, "twin", n_images=5)], table)
    assert found.n_images == 5
    on_image = np.unique(np.floor(table["xyzcal.px"][:, 2]), return_counts=True)[1]
    np.testing.assert_array_equal(np.diff(found.image_starts), on_image)


def test_stills_among_sweeps_are_refused(twin, tmp_path):
    wedges = [twin.wedge(n, n, identifier=f"w{n}") for n in (5, 9)]
    experiments = [wedges[0][0], still(wedges[1][0], 9, "w9")]
    with pytest.raises(UserError, match="mixes sweeps and stills"):
        read(tmp_path, experiments, joined(wedges))


def lists_of(tiny, folder) -> dict[str, object]:
    """Experiment lists about the simulated sweep, by what is unusual in them."""
    document = json.loads(tiny.expt.read_text())
    document["imageset"][0]["template"] = str(tiny.master)
    sweep = document["experiment"][0]
    blank = {k: v for k, v in sweep.items() if k != "crystal"} | {"identifier": "blank"}
    image = {k: v for k, v in sweep.items() if k not in ("scan", "goniometer")}
    image |= {"identifier": "still", "imageset": 1}
    images = {"__id__": "ImageSet", "images": [str(tiny.master)], "single_file_indices": [0]}
    flat = document["scan"][0] | {"oscillation": [0.0, 0.0]}
    made = {
        "no crystal": {**document, "experiment": [blank]},
        "one without": {**document, "experiment": [blank, sweep]},
        "a still": {
            **document, "experiment": [sweep, image],
            "imageset": [*document["imageset"], images],
        },
        "no width": {**document, "scan": [flat]},
    }  # fmt: skip
    for name, content in made.items():
        (folder / f"{name}.expt").write_text(json.dumps(content))
    return {name: folder / f"{name}.expt" for name in made}


@pytest.mark.slow
def test_boxes_are_those_of_the_sweep_alone(tiny, tmp_path, caplog):
    lists = lists_of(tiny, tmp_path)
    table = read_reflections(tiny.refl)
    alone = run_extraction(read_experiments(tiny.expt), 4.0, tmp_path / "a.h5", reflections=table)
    for name in ("one without", "a still"):
        caplog.clear()
        experiments = read_experiments(lists[name])
        store = run_extraction(experiments, 4.0, tmp_path / "b.h5", reflections=table)
        assert "1 of 2 experiments, stills or without a crystal, are left out" in caplog.text
        assert len(store.experiments) == 1
        for ours, theirs in zip(
            store.read_raw(slice(0, len(store))), alone.read_raw(slice(0, len(alone))), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        # what was integrated can be written, also where no identifier tells its place
        experiments = [replace(e, identifier="") for e in experiments]
        write_experiments(tmp_path / "source.expt", experiments)
        (kept,) = sweeps_of(experiments)
        write_experiments(tmp_path / "kept.expt", [kept], source=tmp_path / "source.expt")
        (again,) = read_experiments(tmp_path / "kept.expt")
        assert again.crystal is not None
        assert again.scan == kept.scan
        store.close()
    alone.close()


@pytest.mark.parametrize(("name", "says"), [("no crystal", "no crystal"), ("no width", "a still")])
def test_lists_without_a_sweep_are_refused(tiny, tmp_path, name, says):
    expt = lists_of(tiny, tmp_path)[name]
    table = read_reflections(tiny.refl)
    with pytest.raises(UserError, match=says):
        run_extraction(read_experiments(expt), 4.0, tmp_path / "x.h5", reflections=table)


def listed(tiny, *changes: dict[str, object]) -> list[Experiment]:
    """The simulated sweep, changed, as members of one list."""
    (sweep,) = read_experiments(tiny.expt)
    return [replace(sweep, identifier=str(i), **change) for i, change in enumerate(changes)]


def wedge_of(tiny, first: int, last: int) -> dict[str, object]:
    (sweep,) = read_experiments(tiny.expt)
    scan = Scan((first, last), (0.5 * (first - 1), 0.5))
    return {"scan": scan, "images": replace(sweep.images, indices=tuple(range(first - 1, last)))}


def turned(tiny, degrees: float, axes: np.ndarray) -> dict[str, object]:
    """The crystal turned, its axes chosen otherwise."""
    crystal = read_experiments(tiny.expt)[0].crystal
    turn = Rotation.from_rotvec([degrees, degrees, 0], degrees=True).as_matrix()
    return {"crystal": replace(crystal, A=turn @ crystal.A @ axes)}


@pytest.mark.parametrize(
    "kind", ["the same", "overlapping slices", "indexed otherwise", "refined again"]
)
def test_the_same_photons_in_two_members_are_refused(tiny, tmp_path, kind):
    second = {
        "the same": {},
        "overlapping slices": wedge_of(tiny, 9, 16),
        "indexed otherwise": turned(tiny, 0.0, np.diag([-1.0, 1.0, -1.0])),
        "refined again": turned(tiny, 0.05, np.eye(3)),
    }[kind]
    experiments = listed(tiny, wedge_of(tiny, 1, 12), second)
    n = 4 if kind == "overlapping slices" else 12
    with pytest.raises(UserError, match=f"the same lattice and have {n} images"):
        run_extraction(experiments, 4.0, tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_other_lattices_and_other_images_are_no_copies(tiny):
    require_distinct(listed(tiny, {}, turned(tiny, 5.0, np.eye(3))))
    require_distinct(listed(tiny, wedge_of(tiny, 1, 8), wedge_of(tiny, 9, 16)))


def test_spots_integrated_twice_are_refused(twin, tmp_path):
    """Before, each counted twice: redundancy 3.2 of 2.5, CCanom .32 where there is none."""
    wedges = [twin.wedge(a, b, identifier=f"w{a}") for a, b in ((101, 160), (131, 200))]
    slices = read(tmp_path, [e for e, _ in wedges], joined(wedges))  # copies, left to the merge
    assert len(slices) == sum(len(table) for _, table in wedges)
    intensity = wedges[1][1].columns["intensity.prf.value"]
    intensity *= 1 + 0.01 * np.random.default_rng(0).normal(size=len(intensity))
    n_twice = (wedges[1][1]["xyzcal.px"][:, 2] < 160).sum()
    with pytest.raises(UserError, match=f"same 30 images, and {n_twice} reflections"):
        read(tmp_path, [e for e, _ in wedges], joined(wedges))
    # a table shared out between two members of one scan is no repetition
    table = wedges[1][1]
    table.columns["id"] = np.arange(len(table), dtype=np.int32) % 2
    halves = [replace(wedges[1][0], identifier=name) for name in "ab"]
    table = replace(table, identifiers={0: "a", 1: "b"})
    assert len(read(tmp_path, halves, table)) == len(table)


def test_spots_of_another_lattice_are_no_background(tiny, tmp_path):
    """Before, nine in ten of their centres were background of the boxes that they fell into."""
    second = wedge_of(tiny, 5, 16) | turned(tiny, 20.0, np.eye(3))
    experiments = listed(tiny, {}, second)
    extent = SpotExtent(0.8, 0.8, 0.1, (5, 9, 9))
    out = tmp_path / "x.h5"
    with run_extraction(experiments, 4.0, out, extent_override=extent) as store:
        mask, record = store.read_raw(slice(None))[1].numpy(), store.metadata()
    for own, other, shift in ((0, 1, 4), (1, 0, -4)):
        spots = predict_reflections(experiments[other], 4.0).xyz_px.numpy()[:, ::-1]
        is_own = ((record.experiment == own) & (record.frames_per_layer == 1)).numpy()
        corner = record.corner.numpy()[is_own]
        voxel = np.floor(spots + np.array([shift, 0, 0])).astype(int)[:, None] - corner
        spot, box = np.nonzero(((voxel >= 0) & (voxel < extent.box)).all(axis=2))
        bits = mask[is_own][box, *voxel[spot, box].T]
        assert len(bits) > 100
        assert not (bits & MaskBit.BACKGROUND).any()


def test_spots_of_another_lattice_are_neighbours(tiny, tmp_path):
    """They are modelled like the lattice's own: where they are predicted, as what they are."""
    second = wedge_of(tiny, 5, 16) | turned(tiny, 20.0, np.eye(3))
    experiments = listed(tiny, {}, second)
    extent = SpotExtent(0.8, 0.8, 0.3, (5, 9, 9))
    with run_extraction(experiments, 4.0, tmp_path / "x.h5", extent_override=extent) as store:
        batch = store.read(slice(None))
    found, record = batch.neighbours, batch.metadata
    for own, other, shift in ((0, 1, 4.0), (1, 0, -4.0)):
        is_other = found.is_present & (found.experiment == other)
        box, place = np.nonzero((is_other & (record.experiment == own)[:, None]).numpy())
        assert len(box) > 20
        assert (found.store_row[box, place] == -1).all()
        seen = (record.xyz_px[box] + found.offset[box, place]).numpy()
        spots = predict_reflections(experiments[other], 3.5, padding_frames=80.0).xyz_px
        distance, _ = cKDTree(spots.numpy() + np.array([0, 0, shift])).query(seen)
        assert distance.max() < 0.01


def test_one_identifier_for_two_members_is_refused(tiny, tmp_path):
    """As in dxtbx; reflections of one would be given the frames of the other."""
    document = json.loads(tiny.expt.read_text())
    document["experiment"] *= 2
    (tmp_path / "x.expt").write_text(json.dumps(document))
    with pytest.raises(UserError, match="stands for 2 experiments"):
        read_experiments(tmp_path / "x.expt")


def test_images_that_dials_excludes_are_left_out(tiny, tmp_path, caplog):
    """By the centroid, as in dials.scale; the spots left out still are no background."""
    document = json.loads(tiny.expt.read_text())
    name = document["experiment"][0]["identifier"]
    document["scan"][0]["valid_image_ranges"] = {name: [[1, 4], [9, 16]], "another": [[1, 2]]}
    (tmp_path / "x.expt").write_text(json.dumps(document))
    table, extent = read_reflections(tiny.refl), SpotExtent(0.8, 0.8, 0.1, (5, 9, 9))
    keys, boxes = [], []
    for expt in (tmp_path / "x.expt", tiny.expt):
        out = tmp_path / f"{expt.stem}.h5"
        experiments = read_experiments(expt)
        with run_extraction(
            experiments, 4.0, out, reflections=table, extent_override=extent
        ) as store:
            record = store.metadata()
            key = np.column_stack([record.miller_index.numpy(), record.xyz_px[:, 2].numpy()])
            order = np.lexsort(key.T)
            keys.append(key[order])
            boxes.append(store.read(slice(None)).counts.numpy()[order])
    frame = keys[1][:, 3]
    keep = (frame < 4) | (frame >= 8)
    assert f"{(~keep).sum()} of {len(keep)} reflections are on images that the" in caplog.text
    assert 100 < keep.sum() < len(keep) - 100
    np.testing.assert_array_equal(keys[0], keys[1][keep])
    np.testing.assert_array_equal(boxes[0], boxes[1][keep])
