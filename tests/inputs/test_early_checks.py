"""What can be known at the start is said at the start, in words that name the mistake."""

from __future__ import annotations

import json
import shutil
import stat
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from image_cases import copy_of, edit, frames_of, set_panel, store_frames

from braggflux.fixtures.simulate import SimulatedFiles, simulate
from braggflux.pipelines import cli


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> SimulatedFiles:
    return simulate(tmp_path_factory.mktemp("frames"), preset="tiny", seed=0)


def refusal(capsys, *argv) -> str:
    """Error line of a command that must be refused, without a traceback."""
    assert cli.main([str(x) for x in argv]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize("command", ["run", "extract"])
def test_swapped_and_foreign_files(frames, tmp_path, capsys, command):
    expt, refl, master = frames.expt, frames.refl, frames.master
    out = ("--out", tmp_path / "out")
    assert f"swapped; give {expt} {refl}" in refusal(capsys, command, refl, expt, *out)
    for pair, name in (((master, refl), "EXPT"), ((expt, master), "REFL")):
        line = refusal(capsys, command, *pair, *out)
        assert f"{name}: {master} is an HDF5 master file of images; a DIALS " in line
        assert "`braggflux process`" in line
    line = refusal(capsys, command, frames.truth_mtz, refl, *out)
    assert f"EXPT: {frames.truth_mtz} is an MTZ file" in line
    assert not (tmp_path / "out").exists()


def test_what_is_no_table_of_reflections(frames, tmp_path, capsys):
    for path, kind in (
        (frames.master, "an HDF5 master file of images"),
        (frames.data[0], "an HDF5 file of images without"),
        (frames.model, "a model"),
    ):
        for command, out in (("merge", "out"), ("convert", "out.h5")):
            line = refusal(capsys, command, path, "--out", tmp_path / out)
            assert f"{path} is {kind}" in line
            assert "unmerged reflections are needed here: integrate first" in line


@pytest.mark.parametrize(
    ("assignment", "meant"),
    [
        ("training.epoch=3", "did you mean training.epochs?"),
        ("epochs=3", "did you mean merge.epochs or training.epochs?"),
        ("find_defect=no", "did you mean extraction.find_defects?"),
        ("extraction.dmin=2", "did you mean extraction.d_min?"),
    ],
)
def test_a_mistyped_key(frames, capsys, assignment, meant):
    line = refusal(capsys, "run", frames.expt, frames.refl, "--set", assignment)
    assert line.endswith(meant)
    assert len(line) < 120


def test_a_mistyped_flag(frames, capsys):
    line = refusal(capsys, "run", frames.expt, frames.refl, "--dmin", "3")
    assert line.endswith("did you mean --d-min?")


def test_a_limit_that_leaves_nothing(frames, tmp_path, capsys):
    line = refusal(
        capsys, "extract", frames.expt, frames.refl, "--out", tmp_path / "x.h5", "--d-min", "50"
    )
    assert "d_min of 50 A leaves 1 of the 1301 reflections" in line
    assert "which reach 2.68 A: give a smaller --d-min" in line


def test_a_reference_that_cannot_be_read_is_not_met_after_training(frames, tmp_path, capsys):
    argv = ("run", frames.expt, frames.refl, "--out", tmp_path / "out")
    line = refusal(capsys, *argv, "--reference", frames.model)
    assert f"{frames.model} is not a complete MTZ file" in line
    assert not (tmp_path / "out").exists()


def test_missing_frames_are_met_before_the_run_begins(frames, tmp_path, capsys):
    folder = shutil.copytree(frames.master.parent, tmp_path / "copy")
    text = frames.expt.read_text().replace(str(frames.master.parent), str(folder))
    (folder / "tiny.expt").write_text(text)
    (folder / frames.data[1].name).unlink()
    began = time.monotonic()
    argv = ("run", folder / "tiny.expt", frames.refl, "--out", tmp_path / "out")
    assert f"no image file {folder / frames.data[1].name}" in refusal(capsys, *argv)
    assert time.monotonic() - began < 20
    assert not (tmp_path / "out").exists()


@pytest.fixture
def dials_import(frames, tmp_path, monkeypatch) -> Path:
    """A DIALS that can import and fails at all else; its calls are in the file returned."""
    folder = tmp_path / "bin"
    folder.mkdir()
    document = json.loads(frames.expt.read_text())
    for entry in document["experiment"]:
        del entry["crystal"]
    (tmp_path / "imported.expt").write_text(json.dumps(document | {"crystal": []}))
    for step in ("import", "find_spots"):
        text = f"echo {step} >> {tmp_path}/calls\n"
        text += f"cp {tmp_path}/imported.expt .\n" if step == "import" else "exit 1\n"
        path = folder / f"dials.{step}"
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return tmp_path / "calls"


def test_a_limit_beyond_the_detector_is_known_from_the_master(
    frames, dials_import, tmp_path, capsys
):
    argv = ("process", frames.master, "--out", tmp_path / "out", "--d-min", "1.5")
    line = refusal(capsys, *argv)
    assert "d_min of 1.5 A is beyond the detector, whose corners record 2.59 A" in line
    assert dials_import.read_text() == "import\n"


def test_images_that_were_not_copied(frames, dials_import, tmp_path, capsys):
    """DIALS imports the master, and would find no spots on frames of zeros."""
    moved = frames.data[1].rename(frames.data[1].with_suffix(".away"))
    try:
        line = refusal(capsys, "process", frames.master, "--out", tmp_path / "out")
    finally:
        moved.rename(frames.data[1])
    assert f"no image file {frames.data[1]}" in line
    assert dials_import.read_text() == "import\n"


def test_noise_below_zero_is_known_from_the_first_image(frames, dials_import, tmp_path, capsys):
    """Otherwise after spot finding, indexing and refinement: minutes."""
    (tmp_path / "in").mkdir()
    expt = copy_of(frames, tmp_path / "in")
    raw = frames_of(frames.master).astype(np.int32)
    noise = np.rint(np.random.default_rng(0).normal(0, 0.8, raw.shape)).astype(np.int32)
    store_frames(expt, np.where(raw >= 65533, np.iinfo(np.int32).min, raw + noise))
    set_panel(expt, trusted_range=(-100, 65533))
    edit(expt, lambda e: [entry.pop("crystal") for entry in e["experiment"]])
    shutil.copy(expt, tmp_path / "imported.expt")
    line = refusal(capsys, "process", expt.parent / frames.master.name, "--out", tmp_path / "out")
    assert "image 1 has" in line
    assert "below zero, down to -" in line
    assert dials_import.read_text() == "import\n"


def test_stills_are_known_from_the_master(frames, dials_import, tmp_path, capsys):
    imported = tmp_path / "imported.expt"
    edit(imported, lambda e: e["scan"][0].update(oscillation=[0.0, 0.0]))
    line = refusal(capsys, "process", frames.master, "--out", tmp_path / "out")
    assert "the images are stills: shoeboxes need a rotation scan" in line
    assert "braggflux merge --stills" in line
    assert dials_import.read_text() == "import\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--truth", "{model}"], "is not a complete MTZ file"),
        (
            ["--model", "{model}", "--d-min", "60"],
            "d_min of 60 A leaves 2 reflections of a crystal",
        ),
        (["--unit-cell", "79,79,38,90,90,90", "--d-min", "60"], "leaves 2 reflections of a"),
    ],
)
def test_options_are_checked_before_dials_begins(
    frames, dials_import, tmp_path, capsys, more, message
):
    more = [word.format(model=frames.model) for word in more]
    line = refusal(capsys, "process", frames.master, "--out", tmp_path / "out", *more)
    assert message in line
    assert not dials_import.exists()


def test_what_is_no_image(frames, dials_import, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    for path in (frames.expt, frames.refl):
        assert "for DIALS files there is `braggflux run EXPT REFL`" in refusal(
            capsys, "process", path, *out
        )
    line = refusal(capsys, "process", frames.data[0], *out)
    assert "give the master file" in line
    with h5py.File(frames.data[0]) as file:
        assert "instrument" not in file["entry"]
    assert not dials_import.exists()
