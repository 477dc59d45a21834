"""`braggflux merge`, every mistake: one line on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
from simulated_unmerged import FAST, observed, write_mtz

from braggflux.fixtures.stills import stills
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.crystal.symmetry import to_asu
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines import cli
from braggflux.pipelines.simulate.stills_store import write_stills

FORM = {"cell": (40, 50, 60, 90, 90, 90), "space_group": "P 21 21 21"}
GROUP = gemmi.SpaceGroup(FORM["space_group"])


@pytest.fixture(scope="module")
def asu():
    return ReciprocalAsu(gemmi.UnitCell(*FORM["cell"]), GROUP, 4.0, False)


class Folder:
    """Where the inputs of one test lie."""

    def __init__(self, path: Path, asu) -> None:
        self.path, self.asu = path, asu
        self.hkl, self.columns = observed(asu, np.random.default_rng(0), n_images=6)

    def mtz(self, name="good", *, without=(), hkl=None, **changes):
        """Write a good file but for ``changes`` of columns or of the form."""
        form = FORM | {k: changes.pop(k) for k in tuple(changes) if k in FORM}
        columns = {k: v for k, v in self.columns.items() if k not in without} | changes
        hkl = self.hkl if hkl is None else hkl
        return write_mtz(self.path / f"{name}.mtz", hkl, columns, **form)

    def partials(self, *, has_fraction=True):
        """Every fourth reflection lies on two images, 30 and 70 per cent of it."""
        mapping = to_asu(self.hkl, GROUP)
        is_cut = np.arange(len(self.hkl)) % 4 == 0
        part = np.concatenate([np.arange(len(self.hkl)), np.flatnonzero(is_cut)])
        fraction = np.where(is_cut, 0.3, 1.0)[part]
        fraction[len(self.hkl) :] = 0.7
        batch = 3 * self.columns["BATCH"][1][part]
        batch[len(self.hkl) :] += 1
        flagged = mapping.isym[part] + 256 * is_cut[part]
        columns = {
            "M/ISYM": ("Y", flagged),
            "BATCH": ("B", batch),
            "I": ("J", self.columns["I"][1][part] * fraction),
            "SIGI": ("Q", self.columns["SIGI"][1][part]),
        }
        if has_fraction:
            columns["FRACTIONCALC"] = ("R", fraction)
        return write_mtz(self.path / "partials.mtz", mapping.miller_index[part], columns, **FORM)

    def text(self, name, content=""):
        path = self.path / name
        path.write_text(content)
        return path

    def cut(self, n_bytes):
        path = self.mtz("cut")
        path.write_bytes(path.read_bytes()[:n_bytes])
        return path

    def store(self, n_bytes=None):
        files = write_stills(self.path, stills(4, d_min=6.0, width=1e-3))
        if n_bytes:
            files.observations.write_bytes(files.observations.read_bytes()[:n_bytes])
        return files.observations


def merged_file(f: Folder) -> Path:
    """A merged file with the usual columns."""
    asu = f.asu
    ones = np.ones(len(asu))
    columns = {
        "IMEAN": ("J", ones),
        "SIGIMEAN": ("Q", ones),
        "F": ("F", ones),
        "SIGF": ("Q", ones),
    }
    return write_mtz(f.path / "merged.mtz", asu.miller_index, columns, **FORM)


STREAM = "CrystFEL stream format 2.3\n"
#: name -> (arguments, what the line says)
CASES = {
    "no intensity column": (lambda f: [f.mtz(without=("I", "SIGI"))], "has no intensity column"),
    "no sigma column": (lambda f: [f.mtz(without=("SIGI",))], "has no column SIGI"),
    "all sigmas zero": (
        lambda f: [f.mtz(SIGI=("Q", np.zeros(len(f.hkl))))],
        "sigmas are 0; merging needs sigma > 0",
    ),
    "no finite intensity": (
        lambda f: [f.mtz(I=("J", np.full(len(f.hkl), np.nan)))],
        "has a finite intensity",
    ),
    "merged": (lambda f: [merged_file(f)], "is merged"),
    "mixed cells": (
        lambda f: [f.mtz(), f.mtz("b", cell=(43, 50, 60, 90, 90, 90))],
        "differ by more than 3.0%",
    ),
    "mixed space groups": (
        lambda f: [f.mtz(), f.mtz("b", space_group="P 2 2 2")],
        "need one space group",
    ),
    "unknown metadata": (lambda f: [f.mtz(), "--metadata", "X,colour"], "unknown metadata colour"),
    "own parent": (lambda f: [f.mtz(), f.mtz("b"), "--parents", "none,1"], "own parent"),
    "parents in a circle": (lambda f: [f.mtz(), f.mtz("b"), "--parents", "1,0"], "own parent"),
    "parent that is not there": (lambda f: [f.mtz(), "--parents", "4"], "does not exist"),
    "parents are words": (lambda f: [f.mtz(), "--parents", "dark"], "neither none nor the number"),
    "too many parents": (lambda f: [f.mtz(), "--parents", "none,0"], "names 2 parents"),
    "laue without wavelength": (lambda f: [f.mtz(), "--laue"], "has no wavelength of each"),
    "laue with one wavelength": (
        lambda f: [f.mtz(LAMBDA=("R", np.ones(len(f.hkl)))), "--laue"],
        "has no wavelength of each",
    ),
    "laue and stills": (lambda f: [f.mtz(), "--laue", "--stills"], "exclude each other"),
    "stream of nothing": (lambda f: [f.text("a.stream"), "--space-group", "P63"], "is empty"),
    "stream without crystals": (
        lambda f: [f.text("a.stream", STREAM), "--space-group", "P63"],
        "no integrated crystal",
    ),
    "stream without group": (lambda f: [f.text("a.stream", STREAM)], "--space-group"),
    "unknown group": (
        lambda f: [f.text("a.stream", STREAM), "--space-group", "P 77"],
        "no such space group",
    ),
    "mtz of nothing": (lambda f: [f.cut(0)], "is not a complete MTZ file"),
    "mtz cut in the head": (lambda f: [f.cut(40)], "is not a complete MTZ file"),
    "mtz cut in the data": (lambda f: [f.cut(5000)], "is not a complete MTZ file"),
    "mtz cut in the header": (lambda f: [f.cut(-100)], "is not a complete MTZ file"),
    "text called mtz": (lambda f: [f.text("a.mtz", "text\n" * 99)], "is not a complete MTZ"),
    "store cut": (lambda f: [f.store(2000), "--stills"], "stills.h5"),
    "another hdf5": (lambda f: [f.text("a.h5", "no HDF5")], "a.h5"),
    "partials without fractions": (
        lambda f: [f.partials(has_fraction=False)],
        "no FRACTIONCALC to sum them by",
    ),
    "missing file": (lambda f: [f.path / "none.mtz"], "does not exist"),
    "folder": (lambda f: [f.path], "is a folder; give a file of unmerged reflections"),
    "unknown kind": (lambda f: [f.text("a.csv", "h,k,l")], "is none of the files"),
    "refl without expt": (lambda f: [f.text("a.refl")], "each .refl needs the .expt"),
    "refl is text": (lambda f: [f.text("a.refl", "x"), f.text("a.expt", "{}")], "a."),
    "one friedel half": (lambda f: [f.mtz(), "--friedel"], "PLUS.mtz MINUS.mtz"),
    "friedel and parents": (
        lambda f: [f.mtz(), f.mtz("b"), "--friedel", "--parents", "none,0"],
        "leave --parents out",
    ),
    "nothing to couple": (lambda f: [f.mtz(), "--prior", "double-wilson"], "--parents"),
    "everything beyond d_min": (lambda f: [f.mtz(), "--d-min", "70"], "choose a smaller d_min"),
    "negative d_min": (lambda f: [f.mtz(), "--d-min", "-1"], "`d_min` must be positive"),
    "unknown option": (lambda f: [f.mtz(), "--set", "colour=red"], "unknown configuration key"),
    "unknown likelihood": (lambda f: [f.mtz(), "--likelihood", "cauchy"], "likelihood must be"),
    "no such reference": (
        lambda f: [f.mtz(), "--prior-model", f.path / "none.mtz"],
        "none.mtz does not exist",
    ),
    "indexing reference of a scan": (
        lambda f: [f.mtz(), "--reference-intensities", f.path / "none.mtz"],
        "reindex whole scans with --reindex",
    ),
    "no such scale model": (
        lambda f: [f.mtz(), "--freeze-scales", f.path],
        "scale_model.pt does not exist",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_left(name, asu, tmp_path, capsys):
    arguments, said = CASES[name]
    folder = tmp_path / "in"
    folder.mkdir()
    argv = [str(a) for a in arguments(Folder(folder, asu))]
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert cli.main(["merge", *argv, "--out", str(tmp_path / "out"), *FAST]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("braggflux: error: ")
    assert sum("braggflux: error" in line for line in lines) == 1
    assert said in lines[-1]
    assert "Traceback" not in captured.err + captured.out
    assert not (tmp_path / "out").exists()
    assert sorted(folder.rglob("*")) == before


def test_an_output_that_is_a_file(asu, tmp_path, capsys):
    path = Folder(tmp_path, asu).mtz()
    (tmp_path / "out").write_text("mine")
    assert cli.main(["merge", str(path), "--out", str(tmp_path / "out"), *FAST]) == 2
    assert "braggflux: error: " in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_the_installed_command(asu, tmp_path):
    """As a process of its own: exit code and a single line."""
    path = Folder(tmp_path, asu).mtz(without=("I", "SIGI"))
    command = [sys.executable, "-m", "braggflux.pipelines.cli", "merge", str(path), "--out"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("braggflux: error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_partials_are_summed(asu, tmp_path):
    """Cut reflections give what the whole ones give."""
    folder = Folder(tmp_path, asu)
    for path, out in ((folder.mtz(), "whole"), (folder.partials(), "summed")):
        argv = ["merge", str(path), "--out", str(tmp_path / out), "--set", "network_width=0"]
        assert cli.main([*argv, "--set", "held_out=0", "--epochs", "20"]) == 0
    whole, summed = (
        read_merged_mtz(tmp_path / n / "merged.mtz").table for n in ("whole", "summed")
    )
    assert len(whole) == len(summed)
    np.testing.assert_array_equal(whole.miller_index, summed.miller_index)
    assert np.corrcoef(whole.f, summed.f)[0, 1] > 0.99
    np.testing.assert_array_equal(whole.n_plus, summed.n_plus)
