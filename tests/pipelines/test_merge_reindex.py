"""`braggflux merge --reindex`: a dataset under other indices merges as under the right ones."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
from simulated_unmerged import FAST, observed, write_mtz

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines import cli
from braggflux.pipelines.inputs.reindexing import parse_reindex

P63 = {"cell": (40, 40, 50, 90, 90, 120), "space_group": "P 63"}


def run(*argv):
    return cli.main(["merge", *(str(a) for a in argv)])


@pytest.fixture
def files(tmp_path):
    asu = ReciprocalAsu(gemmi.UnitCell(*P63["cell"]), gemmi.SpaceGroup("P 63"), 4.0, False)
    paths = {}
    for seed, name in enumerate("ab"):
        hkl, columns = observed(asu, np.random.default_rng(seed))
        paths[name] = write_mtz(tmp_path / f"{name}.mtz", hkl, columns, **P63)
        (tmp_path / "other").mkdir(exist_ok=True)
        flipped = hkl @ np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]])
        paths[f"flipped {name}"] = write_mtz(
            tmp_path / "other" / f"{name}.mtz", flipped, columns, **P63
        )
    return paths


def merged(folder, name):
    return read_merged_mtz(folder / f"{name}_merged.mtz").table


@pytest.mark.slow
def test_the_operator_of_one_dataset(files, tmp_path):
    assert run(files["a"], files["b"], "--out", tmp_path / "one", *FAST) == 0
    flipped = files["a"], files["flipped b"]
    for name, more in (("two", ("--reindex", "1:k,h,-l")), ("three", ())):
        assert run(*flipped, "--out", tmp_path / name, *more, *FAST) == 0
    one, two, three = (merged(tmp_path / n, "b") for n in ("one", "two", "three"))
    np.testing.assert_array_equal(one.f, two.f)
    assert not np.array_equal(one.f, three.f)


def test_an_operator_without_number_is_for_all(files, tmp_path):
    assert run(files["a"], files["b"], "--out", tmp_path / "one", *FAST) == 0
    both = files["flipped a"], files["flipped b"]
    more = ("--reindex", "0:none", "--reindex", "k,h,-l")
    assert run(*both, "--out", tmp_path / "two", *more, *FAST) == 0
    for name in "ab":
        np.testing.assert_array_equal(
            merged(tmp_path / "one", name).f, merged(tmp_path / "two", name).f
        )


def test_parsing():
    assert parse_reindex(["1:k,h,-l", "none", "0:none", "-h,-k,l"]) == (
        (1, "k,h,-l"),
        (None, "-h,-k,l"),
    )


@pytest.mark.parametrize(
    ("operator", "said"),
    [
        ("2:k,h,-l", "dataset 2 does not exist; allowed are 0 to 1"),
        ("a:k,h,-l", "'a' is not the number of a dataset"),
        ("0:k,h,l", "has determinant -1"),
        ("0:h+k,k-h,l", "has determinant 2"),
        ("0:2h,k,l", "cannot be read"),
        ("0:h/2,k,l", "whole combinations"),
        ("0:k,h", "cannot be read"),
        ("0:x,y,z", "whole combinations"),
        ("0:l,h,k", "unfit for P 63"),
    ],
)
def test_a_wrong_operator_is_one_line(operator, said, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(files["a"], files["b"], "--reindex", operator, "--out", out, *FAST) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("braggflux: error: ")
    assert said in error
    assert not out.exists()
