"""The one table of formats: how a file is known, and what a new line in the table is worth."""

from __future__ import annotations

import shutil
from dataclasses import replace

import gemmi
import numpy as np
import pytest
from simulated_unmerged import observed, write_mtz

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.io import read
from braggflux.merge.io.read import Format, Needs, format_of, read_table
from braggflux.pipelines import cli

FORM = {"cell": (40, 50, 60, 90, 90, 90), "space_group": "P 21 21 21"}


@pytest.fixture
def source(tmp_path):
    asu = ReciprocalAsu(gemmi.UnitCell(*FORM["cell"]), gemmi.SpaceGroup("P212121"), 6.0, False)
    hkl, columns = observed(asu, np.random.default_rng(0), n_per_image=60)
    return write_mtz(tmp_path / "a.mtz", hkl, columns, **FORM)


def test_content_decides_and_then_the_suffix(source, tmp_path):
    other = tmp_path / "a.stream"
    shutil.copyfile(source, other)
    assert format_of(other).name == "MTZ"
    [one], [two] = read_table([source]), read_table([other])
    np.testing.assert_array_equal(one.intensity, two.intensity)
    for name, expected in (("b.refl", "DIALS"), ("b.h5", "store"), ("b.mtz", "MTZ")):
        (tmp_path / name).write_bytes(b"nothing that is known")
        assert format_of(tmp_path / name).name == expected


def test_a_new_format_is_one_line(source, tmp_path, monkeypatch):
    """What `merge` and `convert` read, and what their messages name."""
    path = tmp_path / "a.new"
    path.write_bytes(b"NEW" + source.read_bytes())

    def reader(path, given):
        (tmp_path / "inside.mtz").write_bytes(path.read_bytes()[3:])
        return [replace(data, name="new") for data in read_table([tmp_path / "inside.mtz"])]

    with pytest.raises(UserError, match="none of the files"):
        read_table([path])
    line = Format("NEW", ".new", lambda _, head: head.startswith(b"NEW"), reader)
    monkeypatch.setattr(read, "FORMATS", (*read.FORMATS, line))
    [data] = read_table([path])
    assert data.name == "new"
    assert cli.main(["convert", str(path), "--out", str(tmp_path / "a.h5")]) == 0
    [again] = read_table([tmp_path / "a.h5"])
    np.testing.assert_allclose(np.sort(again.intensity), np.sort(data.intensity), rtol=1e-6)
    (tmp_path / "b.txt").write_text("h,k,l")
    with pytest.raises(UserError, match=r"NEW \(\.new\), and DIALS"):
        read_table([tmp_path / "b.txt"])


def test_who_takes_the_experiment_lists(tmp_path, monkeypatch):
    """Optional ones are given to all takers or to none; namesakes pair, else the order counts."""
    taken = {}

    def reader(path, given):
        taken[path.name] = given.experiments and given.experiments.name
        return []

    lines = [
        Format(needs.name, f".{needs.name}", lambda *_: False, reader, needs=needs)
        for needs in Needs
    ]
    monkeypatch.setattr(read, "FORMATS", lines)

    def pairs(*names):
        taken.clear()
        for name in names:
            (tmp_path / name).touch()
        read_table([tmp_path / name for name in names])
        return dict(taken)

    assert pairs("a.EXPT", "b.NO_EXPT", "b.expt") == {"a.EXPT": "b.expt", "b.NO_EXPT": None}
    assert pairs("y.expt", "a.EXPT", "b.EXPT_OR_NONE") == {
        "a.EXPT": "y.expt",
        "b.EXPT_OR_NONE": None,
    }
    both = {"a.EXPT": "a.expt", "b.EXPT_OR_NONE": "b.expt"}
    assert pairs("b.expt", "a.EXPT", "a.expt", "b.EXPT_OR_NONE") == both
    assert pairs("y.expt", "a.EXPT", "x.expt", "b.EXPT_OR_NONE") == {
        "a.EXPT": "y.expt",
        "b.EXPT_OR_NONE": "x.expt",
    }
    with pytest.raises(UserError, match=r"1 \.refl and 0 \.expt files were given"):
        pairs("a.EXPT", "b.EXPT_OR_NONE")
