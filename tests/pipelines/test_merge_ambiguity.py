"""`braggflux simulate --preset stills --reindexed` and `braggflux merge --stills` on it."""

from __future__ import annotations

import csv
import json

import gemmi
import numpy as np
import pytest
from simulated_unmerged import FAST, toy_model, write_mtz

from braggflux.fixtures.stills import StillsSettings, stills
from braggflux.integrator.crystal.symmetry import to_asu
from braggflux.merge.indexing import stores as ambiguity_store
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.io.stores.reindexed_store import ReindexedStore
from braggflux.merge.io.stores.unmerged_store import UnmergedStore
from braggflux.pipelines import cli
from braggflux.pipelines.simulate.stills_store import write_stills

HEXAGONAL = (50, 50, 60, 90, 90, 120)
FLIP = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]])


def run(*argv):
    return cli.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """150 images in P 63, half of them under other indices."""
    folder = tmp_path_factory.mktemp("stills")
    model = toy_model(folder / "toy.pdb", "P 63", HEXAGONAL)
    experiment = stills(150, model=model, d_min=3.5, width=4e-4, reindexed=0.5)
    return write_stills(folder, experiment)


def true_amplitudes(files):
    mtz = gemmi.read_mtz_file(str(files.truth_mtz))
    return mtz.make_miller_array(), np.array(mtz.column_with_label("F(+)")), mtz.spacegroup


def correlation(path, files, turn):
    """Of merged with true amplitudes, the merged ones under other indices if asked."""
    table = read_merged_mtz(path).table
    hkl, f, group = true_amplitudes(files)
    lookup = dict(zip(map(tuple, hkl.tolist()), f, strict=True))
    index = to_asu(table.miller_index @ turn, group).miller_index
    true = np.array([lookup.get(tuple(h), np.nan) for h in index.tolist()])
    known = np.isfinite(true) & np.isfinite(table.f)
    return np.corrcoef(true[known], table.f[known])[0, 1]


def choices(out, files):
    """Share of the images whose operator is the one that was applied, and the rows."""
    with (out / "indexing.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    truth = np.load(files.truth_images)["operator"][[int(r["image"]) for r in rows]]
    found = np.array([r["operator"] != "h,k,l" for r in rows])
    assert {r["operator"] for r in rows} == {"h,k,l", "k,h,-l"}
    return (found == (truth > 0)).mean(), rows


@pytest.fixture(scope="module")
def merged(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    assert run("merge", data.observations, "--stills", "--out", out, *FAST) == 0
    return out


def test_images_are_assigned_consistently(merged, data):
    agreeing, rows = choices(merged, data)
    assert max(agreeing, 1 - agreeing) > 0.98
    assert {r["dataset"] for r in rows} == {"stills"}
    assert all(0.5 <= float(r["confidence"]) <= 1.0 for r in rows)
    both = [correlation(merged / "merged.mtz", data, m) for m in (np.eye(3, dtype=int), FLIP)]
    assert max(both) > 0.95
    said = json.loads((merged / "metrics.json").read_text())["indexing"]
    assert list(said["operators"]) == ["h,k,l", "k,h,-l"]
    assert sum(said["operators"].values()) == pytest.approx(1.0)
    assert said["mean_confidence"] > 0.98
    assert said["share_sure"] > 0.95
    assert "indexing: h,k,l" in (merged / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_flipped", "option"), [(False, "--reference-intensities"), (True, "--prior-model")]
)
def test_the_reference_decides(is_flipped, option, data, tmp_path):
    hkl, f, group = true_amplitudes(data)
    turn = FLIP if is_flipped else np.eye(3, dtype=int)
    reference = write_mtz(
        tmp_path / "ref.mtz",
        to_asu(hkl @ turn, group).miller_index,
        {"IMEAN": ("J", f**2), "F": ("F", f)},
        cell=HEXAGONAL,
        space_group="P 63",
    )
    out = tmp_path / "out"
    more = ("--anomalous", option, reference)
    assert run("merge", data.observations, "--stills", "--out", out, *more, *FAST) == 0
    agreeing, _ = choices(out, data)
    assert (agreeing < 0.02) if is_flipped else (agreeing > 0.98)
    assert correlation(out / "merged.mtz", data, turn) > 0.9


def test_new_images_with_scales_of_others(merged, data, tmp_path):
    out = tmp_path / "out"
    more = ("--freeze-scales", merged, "--reference-intensities", merged / "merged.mtz")
    assert run("merge", data.observations, "--stills", "--out", out, *more, *FAST) == 0
    before, after = (choices(path, data)[0] for path in (merged, out))
    assert after == pytest.approx(before, abs=0.02)


STREAMED = ("--set", "stream_above=0", "--set", "stream_training=200000")


@pytest.mark.slow
@pytest.mark.parametrize("is_flipped", [False, True])
def test_a_store_read_batch_by_batch(is_flipped, data, tmp_path, monkeypatch):
    """A third of the images agree; the others are compared with them."""
    for name, value in (("SAMPLE", 50), ("PIECE", 10), ("BLOCK", 40)):
        monkeypatch.setattr(ambiguity_store, name, value)
    hkl, f, group = true_amplitudes(data)
    turn = FLIP if is_flipped else np.eye(3, dtype=int)
    reference = write_mtz(
        tmp_path / "ref.mtz",
        to_asu(hkl @ turn, group).miller_index,
        {"IMEAN": ("J", f**2)},
        cell=HEXAGONAL,
        space_group="P 63",
    )
    out = tmp_path / "out"
    more = ("--reference-intensities", reference, "--batch-size", "2000", *STREAMED, *FAST)
    assert run("merge", data.observations, "--stills", "--out", out, *more) == 0
    agreeing, rows = choices(out, data)
    assert len(rows) == 150
    assert (agreeing < 0.02) if is_flipped else (agreeing > 0.98)
    assert correlation(out / "merged.mtz", data, turn) > 0.95
    said = json.loads((out / "metrics.json").read_text())["indexing"]
    assert said["mean_confidence"] > 0.98


def test_a_store_under_other_indices(data):
    with UnmergedStore(data.observations) as store:
        choice = np.random.default_rng(0).integers(0, 2, store.n_images)
        plain = store.read(20, 60)
    matrices = np.stack([np.eye(3, dtype=int), FLIP])
    with ReindexedStore(UnmergedStore(data.observations), matrices, choice) as store:
        turned = store.read(20, 60)
        rows = slice(store.image_starts[20], store.image_starts[60])
        index = store.column("miller_index", rows)
        np.testing.assert_array_equal(store.column("intensity", rows), plain.intensity)
    is_turned = choice[20 + plain.image] == 1
    wanted = np.where(is_turned[:, None], plain.miller_index @ FLIP, plain.miller_index)
    np.testing.assert_array_equal(turned.miller_index, wanted)
    np.testing.assert_array_equal(index, wanted)
    np.testing.assert_array_equal(turned.intensity, plain.intensity)


def test_switched_off(data, tmp_path):
    out = tmp_path / "out"
    more = ("--resolve-ambiguity", "none", *FAST)
    assert run("merge", data.observations, "--stills", "--out", out, *more) == 0
    assert not (out / "indexing.csv").exists()
    assert "indexing" not in json.loads((out / "metrics.json").read_text())
    # half right, half wrong
    both = [correlation(out / "merged.mtz", data, m) for m in (np.eye(3, dtype=int), FLIP)]
    assert max(both) < 0.9


def test_a_space_group_without_ambiguity_does_nothing(tmp_path):
    model = toy_model(tmp_path / "toy.pdb", "P 61 2 2", HEXAGONAL, n_atoms=40)
    argv = ("simulate", "--preset", "stills", "--images", "40", "--model", model)
    assert run(*argv, "--out", tmp_path / "sim") == 0
    for name, more in (("auto", ()), ("none", ("--resolve-ambiguity", "none"))):
        argv = ("merge", tmp_path / "sim" / "stills.h5", "--stills", "--d-min", "3", *more)
        assert run(*argv, "--out", tmp_path / name, *FAST) == 0
    assert not (tmp_path / "auto" / "indexing.csv").exists()
    auto, none = (read_merged_mtz(tmp_path / n / "merged.mtz").table for n in ("auto", "none"))
    np.testing.assert_array_equal(auto.f, none.f)


def test_simulated_images_under_other_indices(tmp_path, capsys):
    model = toy_model(tmp_path / "toy.pdb", "P 63", HEXAGONAL, n_atoms=20)
    argv = ("simulate", "--preset", "stills", "--images", "64", "--model", model)
    assert run(*argv, "--reindexed", "0.4", "--out", tmp_path / "sim") == 0
    truth = np.load(tmp_path / "sim" / "truth_images.npz")
    assert 0.2 < (truth["operator"] > 0).mean() < 0.6
    assert truth["operators"].shape == (2, 3, 3)
    assert run("simulate", "--reindexed", "0.4", "--out", tmp_path / "no") == 2
    assert "--preset stills; leave them out" in capsys.readouterr().err
    assert StillsSettings().reindexed == 0.0


def bad_reference(kind, tmp_path):
    hkl = np.array([[1, 2, 3], [2, 3, 4]])
    values = {"IMEAN": ("J", np.ones(2))}
    form = {"cell": HEXAGONAL, "space_group": "P 63"}
    if kind == "missing":
        return tmp_path / "missing.mtz"
    if kind == "unmerged":
        values |= {"BATCH": ("B", np.ones(2))}
    if kind == "cell":
        form["cell"] = (60, 60, 60, 90, 90, 120)
    if kind == "group":
        form["space_group"] = "P 6 2 2"
    if kind == "columns":
        values = {"FREE": ("I", np.ones(2))}
    return write_mtz(tmp_path / "bad.mtz", hkl, values, **form)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "does not exist"),
        ("unmerged", "is unmerged"),
        ("cell", "has the cell"),
        ("group", "is in space group P 6 2 2 but the data are in P 63"),
        ("columns", "neither intensities nor amplitudes"),
    ],
)
def test_a_wrong_reference_is_one_line(kind, said, data, tmp_path, capsys):
    out, path = tmp_path / "out", bad_reference(kind, tmp_path)
    argv = ("merge", data.observations, "--stills", "--reference-intensities", path)
    assert run(*argv, "--out", out, *FAST) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("braggflux: error: ")
    assert said in error
    assert not out.exists()
