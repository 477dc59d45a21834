"""Scans that do not start at image 1: every result is that of the same images counted from 1.

DIALS' frame coordinate is an array index that starts at ``image_range[0] - 1``. Public reports of
the kind: dials/dials #587 (image_range= of multi-image files), #2011 (images from 0), xia2/xia2
#138 (several wedges of one sweep).
"""

from __future__ import annotations

import csv
import json
import os
import warnings
from dataclasses import replace

import h5py
import numpy as np
import pytest
import reciprocalspaceship as rs
import torch
from twin_wedges import Twin, joined
from wedges import cut, run_dials

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    ReflectionTable,
    place_on_scans,
    read_experiments,
    read_reflections,
    to_array_index,
    write_experiments,
    write_reflections,
)
from braggflux.integrator.io.images import open_frames
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.shoebox.extraction import run_extraction
from braggflux.merge.io.formats.dials import read_dials
from braggflux.merge.io.sweep_columns import FRAME, SWEEP
from braggflux.pipelines import cli

DEBIAN_BUILD = "/usr/lib/cctbx/python3.11"


@pytest.fixture(scope="module")
def twin(shared) -> Twin:
    return Twin(shared / "data/hewl_nai", d_min=3.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """16 simulated images."""
    return simulate(tmp_path_factory.mktemp("tiny"), preset="tiny", seed=0)


@pytest.fixture(scope="module")
def dxtbx_list(dials):
    """Give dxtbx's reader of experiment lists."""
    os.environ.setdefault("LIBTBX_BUILD", DEBIAN_BUILD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dxtbx.model.experiment_list import ExperimentListFactory
    return ExperimentListFactory


def read(folder, name, wedges):
    """Unmerged observations of wedges after a way through files."""
    write_experiments(folder / f"{name}.expt", [experiment for experiment, _ in wedges])
    write_reflections(folder / f"{name}.refl", joined(wedges))
    return read_dials(folder / f"{name}.refl", folder / f"{name}.expt")


def assert_same_observations(found, expected):
    """All that the scale and the merge see, whatever the images are called."""
    for name in ("miller_index", "intensity", "sigma", "image"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.metadata.keys() == expected.metadata.keys()
    for name in found.metadata.keys() - {"BATCH"}:
        np.testing.assert_allclose(
            found.metadata[name], expected.metadata[name], atol=1e-9, err_msg=name
        )


def test_a_wedge_reads_as_if_counted_from_1(twin, tmp_path):
    found = read(tmp_path, "found", [twin.wedge(101, 200)])
    expected = read(tmp_path, "expected", [twin.wedge(101, 200, call_first=1)])
    assert_same_observations(found, expected)
    assert found.n_images == 100  # one, before
    assert set(found.metadata["BATCH"]) == set(range(101, 201))
    np.testing.assert_array_equal(found.metadata["BATCH"], expected.metadata["BATCH"] + 100)
    # 0.25 degrees an image: image 101 begins at 25 degrees
    np.testing.assert_allclose(found.metadata["ROT"], 25.0 + 0.25 * found.metadata[FRAME])
    assert 0 <= found.metadata[FRAME].min() < found.metadata[FRAME].max() < 100


@pytest.mark.slow
def test_a_wedge_merges_to_the_truth(twin, shared, tmp_path):
    """Before: one batch, CC .983 and .979, R_pim .085; counted from 1 it was as it is now."""
    read(tmp_path, "wedge", [twin.wedge(101, 200)])
    out = tmp_path / "merged"
    argv = ["merge", tmp_path / "wedge.refl", tmp_path / "wedge.expt", "--anomalous"]
    argv += ["--epochs", "30", "--device", "cpu", "--out", out]
    assert cli.main([str(word) for word in argv]) == 0
    truth = rs.read_mtz(str(shared / "data/hewl_nai/truth.mtz"))
    merged = rs.read_mtz(str(out / "merged.mtz"))
    both = merged.join(truth, rsuffix="_true", how="inner", check_isomorphous=False)
    for mate in ("F(+)", "F(-)"):
        seen = both[both[f"N({mate[2]})"] > 0]
        # Seen 2026-11: .9991 of both
        assert np.corrcoef(seen[mate] ** 2, seen[f"{mate}_true"] ** 2)[0, 1] > 0.998
    with (out / "statistics.csv").open() as file:
        overall = next(row for row in csv.DictReader(file) if row["shell"] == "overall")
    assert float(overall["r_pim"]) < 0.02


def test_wedges_with_different_starts_in_any_order(twin, tmp_path):
    ranges = ((1, 40), (101, 200), (301, 350))
    wedges = [twin.wedge(a, b, identifier=f"w{a}") for a, b in ranges]
    ones = [twin.wedge(a, b, identifier=f"w{a}", call_first=1) for a, b in ranges]
    assert_same_observations(read(tmp_path, "a", wedges), read(tmp_path, "b", ones))
    swapped = read(tmp_path, "c", wedges[::-1])
    straight = read(tmp_path, "d", wedges)
    order, back = (np.lexsort((*d.miller_index.T, d.metadata["ROT"])) for d in (straight, swapped))
    for name in ("ROT", FRAME):
        np.testing.assert_array_equal(
            straight.metadata[name][order], swapped.metadata[name][back], err_msg=name
        )
    np.testing.assert_array_equal(
        straight.metadata[SWEEP][order], 2 - swapped.metadata[SWEEP][back]
    )
    np.testing.assert_array_equal(straight.intensity[order], swapped.intensity[back])


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_any_order_on_any_numbers(twin, tmp_path, seed):
    """What is read does not depend on row order, and on image numbers only in BATCH."""
    rng = np.random.default_rng(seed)
    first = int(rng.integers(1, 300))
    last = first + int(rng.integers(5, 90))
    call_first = int(rng.integers(0, 5000))
    experiment, table = twin.wedge(first, last, call_first=call_first)
    experiment = replace(experiment, images=None)
    found = read(tmp_path, "a", [(experiment, table.select(rng.permutation(len(table))))])
    expected = read(tmp_path, "b", [twin.wedge(first, last)])

    def ordered(data):
        order = np.lexsort((*data.miller_index.T, data.metadata["ROT"].round(6)))
        return data.metadata["BATCH"][order], data.metadata["ROT"][order], data.intensity[order]

    batch, *rest = ordered(found)
    old_batch, *old_rest = ordered(expected)
    np.testing.assert_allclose(rest, old_rest, atol=1e-9)
    np.testing.assert_array_equal(batch - call_first, old_batch - first)


def test_through_dials_and_back(dxtbx_list, twin, tmp_path):
    from dials.array_family import flex

    ranges = ((101, 130), (301, 320))
    wedges = [twin.wedge(a, b, identifier=f"w{a}") for a, b in ranges]
    expected = read(tmp_path, "ours", wedges)
    table = flex.reflection_table.from_file(str(tmp_path / "ours.refl"))
    experiments = dxtbx_list.from_json_file(str(tmp_path / "ours.expt"), check_format=False)
    table.assert_experiment_identifiers_are_consistent(experiments)
    table.as_file(str(tmp_path / "theirs.refl"))
    experiments.as_file(str(tmp_path / "theirs.expt"))
    found = read_dials(tmp_path / "theirs.refl", tmp_path / "theirs.expt")
    assert_same_observations(found, expected)
    np.testing.assert_array_equal(found.metadata["BATCH"], expected.metadata["BATCH"])


@pytest.mark.parametrize("start", [-4, 0, 1, 2, 7, 20001])
def test_z_goes_to_the_scan_and_back(twin, start):
    experiment, table = twin.wedge(11, 30, call_first=start)
    table.columns["bbox"] = np.tile([0, 3, 0, 3, start - 1, start + 19], (len(table), 1))
    placed, number = place_on_scans(table, [experiment])
    assert (number == 0).all()
    angle = np.degrees(table["xyzcal.mm"][:, 2])
    np.testing.assert_allclose(experiment.scan.phi_deg(placed["xyzcal.px"][:, 2]), angle)
    assert placed["xyzobs.px.value"][:, 2].min() >= 0
    np.testing.assert_array_equal(placed["bbox"][0], [0, 3, 0, 3, 0, 20])
    again = to_array_index(placed, [experiment])
    for name, column in table.columns.items():
        np.testing.assert_allclose(again[name], column, err_msg=name, atol=1e-9)


def test_z_of_stills_and_of_rows_without_an_experiment(twin):
    experiment, table = twin.wedge(11, 30)
    still = replace(experiment, scan=None, goniometer=None, identifier="still")
    rows = np.arange(4)
    columns = {name: column[rows] for name, column in table.columns.items()}
    columns["id"] = np.array([0, 1, -1, 0], np.int32)
    table = ReflectionTable(columns, {0: "twin", 1: "still"})
    placed, number = place_on_scans(table, [experiment, still])
    assert number.tolist() == [0, 1, -1, 0]
    shift = placed["xyzcal.px"][:, 2] - table["xyzcal.px"][:, 2]
    assert shift.tolist() == [-10, 0, 0, -10]


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (
            101,
            r"falls on the frames: .* are 0\.0 to 100\.0, those of images 101-200 are 100 to 200",
        ),
        (2, r"lie \+1\.0 frames from .* from 1 on for images 2-101"),
    ],
)
def test_a_table_that_counts_from_0_is_refused(twin, first, says):
    """As earlier versions wrote integrated.refl of such a scan."""
    experiment, table = twin.wedge(first, first + 99)
    table.columns["xyzcal.px"] = table["xyzcal.px"] - [0.0, 0.0, first - 1.0]
    with pytest.raises(UserError, match=says):
        place_on_scans(table, [experiment])


def extracted(tmp_path, name, expt, refl, **options):
    store = run_extraction(
        read_experiments(expt), 3.0, tmp_path / f"{name}.h5", reflections=refl, **options
    )
    return store


def full_table(table: ReflectionTable) -> ReflectionTable:
    """The same reflections as predicted ones."""
    columns = dict(table.columns) | {"flags": np.ones(len(table), np.uint64)}
    return ReflectionTable(columns, table.identifiers, "predicted.refl")


@pytest.mark.slow
def test_boxes_of_a_wedge_lie_on_its_frames(tiny, tmp_path):
    """Predicted, refined and the frames themselves agree; the extent is that of the whole."""
    table = read_reflections(tiny.refl)
    expt = cut(tiny, tmp_path, 6, 16, "wedge")
    refined = extracted(tmp_path, "refined", expt, table)
    predicted = extracted(tmp_path, "predicted", expt, full_table(table))
    whole = extracted(tmp_path, "whole", tiny.expt, table)
    with h5py.File(tiny.master) as file:
        frames = file["entry/data/data"][5:16].astype(int)
    for store in (refined, predicted):
        assert store.attributes["extent"] == pytest.approx(whole.attributes["extent"], rel=0.05)
        assert store.experiments[0]["image_range"] == [6, 16]
        metadata = store.metadata()
        inside = (metadata.corner[:, 0] >= 0) & (metadata.frames_per_layer == 1)
        inside &= metadata.corner[:, 0] + store.box[0] <= 11
        rows = torch.nonzero(inside & (store.flags == 0))[:, 0]
        assert len(rows) > 50
        counts = store.read_raw(rows)[0].numpy()
        for box, (z, y, x) in zip(counts, metadata.corner[rows].tolist(), strict=True):
            d, h, w = store.box
            raw = frames[z : z + d, y : y + h, x : x + w]
            np.testing.assert_array_equal(box, np.where(raw == 65535, 0, raw))
    keys = [sorted(map(tuple, s.metadata().miller_index.tolist())) for s in (refined, predicted)]
    assert len(set(keys[1]) - set(keys[0])) < 0.02 * len(keys[1])


def frames_by_dxtbx(dxtbx_list, path) -> list[list[int]]:
    found = []
    for experiment in dxtbx_list.from_json_file(str(path)):
        images = experiment.imageset
        first = images.get_array_range()[0]
        indices = list(images.indices())
        begin, end = experiment.scan.get_array_range()
        found.append(indices[begin - first : end - first])
    return found


@pytest.mark.parametrize(
    ("image_range", "file_indices", "frames"),
    [
        ([9, 16], list(range(8, 16)), range(8, 16)),  # image set cut
        ([9, 16], list(range(16)), range(8, 16)),  # not cut
        ([9, 16], None, range(8, 16)),
        ([9, 16], list(range(8)), range(8, 16)),
        ([1, 8], list(range(8, 16)), range(8)),  # renumbered
    ],
)
def test_images_of_one_file_are_those_that_dxtbx_reads(
    dxtbx_list, tiny, tmp_path, image_range, file_indices, frames
):
    document = json.loads(cut(tiny, tmp_path, *image_range, "wedge").read_text())
    document["imageset"][0]["single_file_indices"] = file_indices
    if file_indices is None:
        del document["imageset"][0]["single_file_indices"]
    path = tmp_path / "wedge.expt"
    path.write_text(json.dumps(document))
    (experiment,) = read_experiments(path)
    assert experiment.images.indices == tuple(frames)
    assert frames_by_dxtbx(dxtbx_list, path) == [list(frames)]
    with open_frames(experiment) as ours, h5py.File(tiny.master) as file:
        raw = file["entry/data/data"][frames[3]].astype(int)
        np.testing.assert_array_equal(ours.read(3)[0], np.where(raw == 65535, -1, raw))


def test_indices_that_are_not_used_are_named(tiny, tmp_path, caplog):
    document = json.loads(cut(tiny, tmp_path, 1, 8, "wedge").read_text())
    document["imageset"][0]["single_file_indices"] = list(range(8, 16))
    (tmp_path / "wedge.expt").write_text(json.dumps(document))
    with caplog.at_level("WARNING"):
        read_experiments(tmp_path / "wedge.expt")
    assert "images 1 to 8 are read from frames 0 to 7" in caplog.text
    assert "which say 8 to 15" in caplog.text


@pytest.mark.parametrize("first", [0, 1, 101])
def test_files_that_are_numbered_on_keep_their_numbers(tiny, tmp_path, first):
    """A template of files whose first image is not 1."""
    document = json.loads(cut(tiny, tmp_path, 1, 3, "numbered").read_text())
    document["scan"][0]["image_range"] = [first, first + 2]
    document["imageset"] = [{"__id__": "ImageSequence", "template": "img_####.cbf"}]
    (tmp_path / "numbered.expt").write_text(json.dumps(document))
    (experiment,) = read_experiments(tmp_path / "numbered.expt")
    names = [os.path.basename(p) for p in experiment.images.paths]
    assert names == [f"img_{n:04d}.cbf" for n in range(first, first + 3)]
    assert experiment.images.indices == (0, 1, 2)


def test_image_0_of_one_file_is_refused(tiny, tmp_path):
    document = json.loads(cut(tiny, tmp_path, 1, 3, "zero").read_text())
    document["scan"][0]["image_range"] = [0, 2]
    (tmp_path / "zero.expt").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"image 0 of .* count from 1"):
        read_experiments(tmp_path / "zero.expt")


def test_stores_of_earlier_versions(tiny, tmp_path):
    """Of version 2 they are right for scans from image 1 only; version 3 masked neighbours."""
    expt = cut(tiny, tmp_path, 6, 16, "wedge")
    table = read_reflections(tiny.refl)
    for name, experiment in (("whole", tiny.expt), ("wedge", expt)):
        extracted(tmp_path, name, experiment, table).close()
        with h5py.File(tmp_path / f"{name}.h5", "r+") as file:
            file.attrs["version"] = 2
            del file["neighbours"]
    ShoeboxStore.open(tmp_path / "whole.h5").close()
    with pytest.raises(UserError, match=r"starts at image 6: make it again"):
        ShoeboxStore.open(tmp_path / "wedge.h5")
    with h5py.File(tmp_path / "wedge.h5", "r+") as file:
        file.attrs["version"] = 3
    with ShoeboxStore.open(tmp_path / "wedge.h5") as store:
        assert store.read(slice(None)).neighbours is None


@pytest.mark.slow
def test_a_slice_by_dials(dials, tiny, tmp_path):
    """dials.slice_sequence and dials.predict: their tables are cut as our own predictions."""
    expt = cut(tiny, tmp_path, 1, 16, "refined")
    names = ["refined.expt", str(tiny.refl), "image_range=6 16"]
    run_dials("slice_sequence", *names, folder=tmp_path)
    sliced, refl = tmp_path / "refined_6_16.expt", tmp_path / f"{tiny.refl.stem}_6_16.refl"
    run_dials("predict", sliced.name, "d_min=3", folder=tmp_path)
    assert read_experiments(sliced)[0].scan.image_range == (6, 16)
    predicted = read_reflections(tmp_path / "predicted.refl")
    ours = extracted(tmp_path, "ours", sliced, read_reflections(refl))
    theirs = extracted(tmp_path, "theirs", sliced, predicted)
    assert theirs.attributes["extent"] == pytest.approx(ours.attributes["extent"], rel=0.02)
    assert theirs.box == ours.box
    sums = [by_index(store) for store in (ours, theirs)]
    common = sums[0].keys() & sums[1].keys()
    assert len(common) > 0.97 * len(sums[0])
    differ = sum(sums[0][k] != sums[1][k] for k in common)
    assert differ < 0.02 * len(common)  # a box whose centre rounds to the next pixel
    assert expt.is_file()


def by_index(store: ShoeboxStore) -> dict[tuple[int, ...], int]:
    metadata = store.metadata()
    counts = store.read_raw(slice(0, len(store)))[0].sum(dim=(1, 2, 3)).tolist()
    frame = metadata.xyz_px[:, 2].floor().tolist()
    hkl = metadata.miller_index.tolist()
    return {(*h, round(f / 4)): n for h, f, n in zip(hkl, frame, counts, strict=True)}
