"""`braggflux merge` of several stores batch by batch: as the same merge in memory."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from simulated_unmerged import toy_model

from braggflux.fixtures.stills import stills
from braggflux.integrator.crystal.symmetry import is_centric, to_asu
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.io.stores.unmerged_store import write_unmerged_store
from braggflux.pipelines import cli
from braggflux.pipelines.simulate.stills_store import as_unmerged

OPTIONS = ("--stills", "--d-min", "4.0", "--epochs", "20", "--batch-size", "2000")
SMALL = ("--set", "network_width=8", "--set", "stream_training=60000")
STREAMED = ("--set", "stream_above=0")
FLIP = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]])


def run(*argv):
    return cli.main(["merge", *(str(a) for a in argv)])


def write(folder, name, change=None, **settings):
    """Store of simulated stills, ``change`` applied to every chunk."""
    experiment = stills(settings.pop("n_images", 200), d_min=4.0, width=6e-4, **settings)
    chunks = as_unmerged(experiment.chunks(), experiment)
    path = folder / f"{name}.h5"
    write_unmerged_store(path, chunks if change is None else map(change, chunks), name=name)
    return path


def flipped(data):
    return replace(data, miller_index=data.miller_index @ FLIP)


def both(paths, folder, *more):
    """Merge batch by batch and in memory; the tables of the datasets, in the order of files."""
    tables = []
    for how, options in (("streamed", STREAMED), ("in_memory", ())):
        out = folder / how
        assert run(*paths, "--out", out, *OPTIONS, *SMALL, *more, *options) == 0
        found = sorted(p for p in out.glob("*merged.mtz") if "unmerged" not in p.name)
        tables.append({p.name: read_merged_mtz(p).table for p in found})
    assert tables[0].keys() == tables[1].keys()
    there = [{p.name for p in (folder / how).iterdir()} for how in ("streamed", "in_memory")]
    # what a streamed merge never holds at once: the scaled observations, and images by themselves
    whole = {n for n in there[1] if n == "images.csv" or n.endswith("unmerged.mtz")}
    assert there[0] == there[1] - whole
    return tables


def assert_alike(streamed, in_memory):
    np.testing.assert_array_equal(streamed.miller_index, in_memory.miller_index)
    np.testing.assert_array_equal(streamed.n_plus, in_memory.n_plus)
    assert np.corrcoef(streamed.f, in_memory.f)[0, 1] > 0.97


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two crystals of one structure."""
    folder = tmp_path_factory.mktemp("pair")
    return [write(folder, "first"), write(folder, "second", seed=1, n_images=150)]


@pytest.fixture(scope="module")
def ambiguous(tmp_path_factory):
    """A model in P 63, whose lattice allows two indexings."""
    return toy_model(
        tmp_path_factory.mktemp("model") / "toy.pdb", "P 63", (50, 50, 60, 90, 90, 120)
    )


@pytest.mark.slow
def test_datasets_with_parents(pair, tmp_path):
    more = ("--parents", "none,0", "--prior", "double-wilson", "--correlation", "0.99")
    streamed, in_memory = both(pair, tmp_path, *more)
    assert list(streamed) == ["first_merged.mtz", "second_merged.mtz"]
    for name, table in streamed.items():
        assert_alike(table, in_memory[name])
    # the same structure: amplitudes come closer to each other than they are without
    alone, _ = both(pair, tmp_path / "alone")
    spread = []
    for tables in (streamed, alone):
        first, second = tables.values()
        index = {tuple(h): i for i, h in enumerate(first.miller_index.tolist())}
        rows = np.array([index.get(tuple(h), -1) for h in second.miller_index.tolist()])
        spread.append(np.std((second.f - first.f[rows])[rows >= 0]))
    assert spread[0] < 0.7 * spread[1]
    overall = []
    for how in ("streamed", "in_memory"):
        with (tmp_path / "alone" / how / "second_statistics.csv").open() as file:
            overall.append(list(csv.DictReader(file))[-1])
    assert overall[0]["n_obs"] == overall[1]["n_obs"]
    assert float(overall[0]["cc_half"]) == pytest.approx(float(overall[1]["cc_half"]), abs=0.03)


@pytest.mark.slow
def test_r_of_parents_is_chosen(pair, tmp_path):
    more = ("--parents", "none,0", "--prior", "double-wilson")
    assert run(*pair, "--out", tmp_path / "out", *OPTIONS, *SMALL, *more, *STREAMED) == 0
    with (tmp_path / "out" / "correlation.csv").open() as file:
        chosen = {row["shell"]: float(row["chosen_r"]) for row in csv.DictReader(file)}
    assert min(chosen.values()) > 0.97


def test_wrong_parents_are_one_line(pair, tmp_path, capsys):
    options = (*OPTIONS, *STREAMED, "--out", tmp_path / "out")
    assert run(*pair, "--parents", "none,0,1", *options) == 2
    assert "names 3 parents (none,0,1) for 2 datasets" in capsys.readouterr().err
    assert run(pair[0], "--friedel", *options) == 2
    assert "takes the two Friedel halves" in capsys.readouterr().err
    assert run(*pair, "--reindex", "2:k,h,-l", *options) == 2
    assert "dataset 2 does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_friedel_halves(pair, tmp_path):
    def of_sign(sign):
        def select(data):
            index, group = data.miller_index, data.space_group
            own = np.where(is_centric(index, group), 1, to_asu(index, group).friedel_sign)
            return data.select(np.flatnonzero(own == sign))

        return select

    halves = [write(tmp_path, f"x_{n}", of_sign(s)) for n, s in (("plus", 1), ("minus", -1))]
    streamed, in_memory = both(halves, tmp_path, "--friedel")
    (table,), (wanted,) = streamed.values(), in_memory.values()
    assert_alike(table, wanted)
    np.testing.assert_array_equal(table.n_minus, wanted.n_minus)
    # and as all in one store, where only the order within the images is another
    out = tmp_path / "whole"
    options = (*OPTIONS, *SMALL, *STREAMED, "--anomalous")
    assert run(pair[0], "--out", out, *options) == 0
    whole = read_merged_mtz(out / "merged.mtz").table
    np.testing.assert_array_equal(table.n_plus, whole.n_plus)
    for name in ("f_plus", "f_minus"):
        ours, theirs = getattr(table, name), getattr(whole, name)
        seen = np.isfinite(ours)
        assert np.corrcoef(ours[seen], theirs[seen])[0, 1] > 0.99


@pytest.mark.slow
def test_reindexed_datasets(tmp_path, ambiguous):
    settings = {"model": ambiguous, "n_images": 60}
    first = write(tmp_path, "a", **settings)
    (tmp_path / "turned").mkdir()
    second = [
        write(folder, "b", change, seed=1, **settings)
        for folder, change in ((tmp_path, None), (tmp_path / "turned", flipped))
    ]
    plain = ("--resolve-ambiguity", "none", *OPTIONS, *SMALL, *STREAMED)
    assert run(first, second[0], "--out", tmp_path / "one", *plain) == 0
    assert run(first, second[1], "--out", tmp_path / "two", "--reindex", "1:k,h,-l", *plain) == 0
    one, two = (read_merged_mtz(tmp_path / n / "b_merged.mtz").table for n in ("one", "two"))
    # the cell has gone through its metric: 1/d^2 differs in the last digits
    np.testing.assert_allclose(one.f, two.f, rtol=0.02)


@pytest.mark.slow
def test_indexing_is_chosen_alike_in_all_stores(tmp_path, ambiguous):
    operators, paths = [], []
    for name, seed in (("a", 0), ("b", 1)):
        settings = {"model": ambiguous, "seed": seed, "reindexed": 0.5}
        paths.append(write(tmp_path, name, n_images=100, **settings))
        experiment = stills(100, d_min=4.0, width=6e-4, **settings)
        operators += [chunk.operator for chunk in experiment.chunks()]
    out = tmp_path / "out"
    assert run(*paths, "--out", out, *OPTIONS, *SMALL, *STREAMED) == 0
    with (out / "indexing.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["dataset"] for row in rows] == ["a"] * 100 + ["b"] * 100
    assert [int(row["image"]) for row in rows[100:]] == list(range(100))
    found = np.array([row["operator"] != "h,k,l" for row in rows])
    agreeing = (found == (np.concatenate(operators) > 0)).mean()
    assert max(agreeing, 1 - agreeing) > 0.98
    said = json.loads((out / "metrics.json").read_text())["indexing"]
    assert said["mean_confidence"] > 0.95
