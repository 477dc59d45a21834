"""Every mistake: one line on stderr, exit code 2, and nothing left in the way of a second try."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import gemmi
import h5py
import hdf5plugin  # noqa: F401 - the frames are bitshuffled
import numpy as np
import pytest

from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    read_experiments,
    read_reflections,
    write_experiments,
    write_reflections,
)
from braggflux.pipelines import cli


@dataclass
class Job:
    """Copies of the simulated files that a test may spoil, and the command that uses them."""

    folder: Path
    master: Path
    data: Path
    expt: Path
    refl: Path
    model: Path
    out: Path

    def argv(self, *more: str) -> list[str]:
        command = ["run", str(self.expt), str(self.refl), "--model", str(self.model)]
        return [*command, "--out", str(self.out), "--epochs", "1", "--device", "cpu", *more]

    def rewrite_refl(self, change) -> None:
        table = read_reflections(self.refl)
        write_reflections(self.refl, change(table))


@pytest.fixture
def job(tiny, tmp_path) -> Job:
    folder = tmp_path / "in"
    shutil.copytree(tiny.master.parent, folder)
    expt = folder / tiny.expt.name
    expt.write_text(expt.read_text().replace(str(tiny.master.parent), str(folder)))
    return Job(
        folder,
        folder / tiny.master.name,
        folder / tiny.data[0].name,
        expt,
        folder / tiny.refl.name,
        folder / tiny.model.name,
        tmp_path / "run",
    )


def refused(argv: list[str], capsys) -> str:
    """Run a command that must fail; its one line."""
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("braggflux: error: ")
    assert sum("braggflux: error" in line for line in lines) == 1
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def truncate(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def drop_columns(table: ReflectionTable) -> ReflectionTable:
    kept = {k: v for k, v in table.columns.items() if not k.startswith(("xyz", "miller"))}
    return ReflectionTable(kept, table.identifiers)


def keep_none(table: ReflectionTable) -> ReflectionTable:
    return table.select(np.zeros(len(table), bool))


def strong_only(table: ReflectionTable) -> ReflectionTable:
    return table.select(table.has_flag(DialsFlag.STRONG))


def off_the_frames(table: ReflectionTable) -> ReflectionTable:
    """A predicted table whose spots lie on frames that were never taken."""
    columns = dict(table.columns)
    columns["flags"] = np.full(len(table), DialsFlag.PREDICTED, np.uint64)
    columns["xyzcal.px"] = columns["xyzcal.px"] + [0.0, 0.0, 500.0]
    return ReflectionTable(columns, table.identifiers)


def other_experiment(table: ReflectionTable) -> ReflectionTable:
    return ReflectionTable(table.columns, {0: "11111111-2222-3333-4444-555555555555"})


def other_crystal(table: ReflectionTable) -> ReflectionTable:
    """The strong spots of another indexing: h, k, l shifted."""
    table = strong_only(table)
    columns = dict(table.columns)
    columns["miller_index"] = columns["miller_index"] + np.array([3, -2, 1], np.int32)
    return ReflectionTable(columns, table.identifiers)


def edit_expt(job: Job, change) -> None:
    document = json.loads(job.expt.read_text())
    change(document)
    job.expt.write_text(json.dumps(document))


def longer_scan(document: dict) -> None:
    scan = document["scan"][0]
    first, last = scan["image_range"]
    scan["image_range"] = [first, last + 4]
    for key, values in scan.get("properties", {}).items():
        scan["properties"][key] = [*values, *values[-1:] * 4]
    for key in ("exposure_time", "epochs"):
        if key in scan:
            scan[key] = [*scan[key], *scan[key][-1:] * 4]


def mask_everything(job: Job) -> None:
    """Set the pixel mask of the master to "dead" everywhere."""
    found = []
    with h5py.File(job.master, "r+") as file:
        file.visititems(
            lambda name, item: found.append(name) if name.endswith("pixel_mask") else None
        )
        assert found
        for name in found:
            file[name][...] = 2


def other_cell(job: Job) -> None:
    structure = gemmi.read_structure(str(job.model))
    structure.cell = gemmi.UnitCell(82.0, 82.0, 37.8, 90, 90, 90)
    structure.write_pdb(str(job.model))


def other_group(job: Job) -> None:
    structure = gemmi.read_structure(str(job.model))
    structure.spacegroup_hm = "P 41 21 2"
    structure.write_pdb(str(job.model))


def space_group(hall: str):
    def change(document: dict) -> None:
        document["crystal"][0]["space_group_hall_symbol"] = hall

    return change


SPOILT = {
    "no master": (lambda j: j.master.unlink(), "tiny_master.h5"),
    "truncated master": (lambda j: truncate(j.master), "tiny_master.h5"),
    "no data file": (lambda j: j.data.unlink(), "tiny_data_000001.h5"),
    "truncated data file": (lambda j: truncate(j.data), "tiny_data_000001.h5"),
    "master is text": (lambda j: j.master.write_text("no HDF5"), "tiny_master.h5"),
    "no expt": (lambda j: j.expt.unlink(), "tiny.expt does not exist"),
    "expt is no json": (lambda j: j.expt.write_text("{"), "is not JSON"),
    "refl is no msgpack": (lambda j: j.refl.write_text("x"), "tiny.refl"),
    "truncated refl": (lambda j: truncate(j.refl), "tiny.refl"),
    "wrong image count": (lambda j: edit_expt(j, longer_scan), "has 16 images"),
    "columns": (lambda j: j.rewrite_refl(drop_columns), "lacks the column"),
    "no reflection": (lambda j: j.rewrite_refl(keep_none), "holds no reflection"),
    "spots on no frame": (lambda j: j.rewrite_refl(off_the_frames), "falls on the frames"),
    "other experiment": (
        lambda j: j.rewrite_refl(other_experiment),
        "which is not among the 1 of the .expt",
    ),
    "other indexing": (lambda j: j.rewrite_refl(other_crystal), "same DIALS step"),
    "all masked": (mask_everything, "all pixels of the images are masked"),
    "cell of the model": (other_cell, "has the cell 82 82 37.8"),
    "group of the model": (other_group, "is in space group P 41 21 2 but the data are in"),
    "no model": (lambda j: j.model.unlink(), "model.pdb does not exist"),
    "model is text": (lambda j: j.model.write_text("text"), "model.pdb"),
    "unknown space group": (lambda j: edit_expt(j, space_group("P 99")), "Hall symbol 'P 99'"),
    "space group of another lattice": (
        lambda j: edit_expt(j, space_group("P 2 2 3")),
        "cannot be in space group",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_input(name, job, tiny, capsys):
    spoil, message = SPOILT[name]
    spoil(job)
    assert message in refused(job.argv(), capsys)
    assert not job.out.exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--d-min", "0.5"], "d_min of 0.5 A is beyond the detector"),
        (["--d-min", "200"], "no reflection to 200 A falls on the frames"),
        (["--d-min", "fine"], "extraction.d_min must be a number, or null, got 'fine'"),
        (["--d-min", "-2"], "`d_min` must be positive, got -2"),
        (["--epochs", "many"], "training.epochs must be a whole number, got 'many'"),
        (["--seed", "1.5"], "training.seed must be a whole number, got '1.5'"),
        (["--coupling", "loose"], "training.coupling must be"),
        (["--device", "gpu"], "`device` must be auto, cpu, cuda or cuda:N"),
        (["--set", "training.epoch=3"], "epoch"),
        (["--set", "merge.prior"], "--set must be KEY=VALUE"),
        (["--set", "merge.anomalous=perhaps"], "merge.anomalous"),
        (["--reference", "none.mtz"], "none.mtz does not exist"),
    ],
)
def test_wrong_options(more, message, job, capsys):
    assert message in refused(job.argv(*more), capsys)
    assert not job.out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {epoch: 3}", "epochs"),
        ("trainings: {}", "training"),
        ("training: {epochs: abc}", "training.epochs"),
        ("training: [1, 2]", "training"),
        ("training: {epochs: 3", "config.yaml"),
    ],
)
def test_wrong_configuration_file(text, message, job, capsys):
    config = job.folder / "config.yaml"
    config.write_text(text)
    assert message in refused(job.argv("--config", str(config)), capsys)
    assert not job.out.exists()


def test_output_that_cannot_be_written(job, capsys):
    """A file in place of the folder, and of its parent; works for root too."""
    job.out.write_text("a file")
    assert "--out must name a folder" in refused(job.argv(), capsys)
    assert job.out.read_text() == "a file"
    inside = [*job.argv()]
    inside[inside.index("--out") + 1] = str(job.out / "below")
    assert str(job.out) in refused(inside, capsys)
    assert job.out.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(job, capsys):
    job.out.parent.chmod(0o555)
    try:
        assert "Permission denied" in refused(job.argv(), capsys)
    finally:
        job.out.parent.chmod(0o755)


def test_a_foreign_folder_is_left_alone(job, capsys):
    job.out.mkdir()
    (job.out / "thesis.tex").write_text("mine")
    assert "not empty and not a run" in refused(job.argv(), capsys)
    assert [p.name for p in job.out.iterdir()] == ["thesis.tex"]


def test_frames_that_show_no_spot(job, capsys, tmp_path):
    """All frames blank, as with a closed shutter."""
    for path in job.folder.glob("*_data_*.h5"):
        with h5py.File(path, "r+") as file:
            (name,) = file["entry/data"] if "entry/data" in file else list(file)
            data = file["entry/data"][name] if "entry/data" in file else file[name]
            data[...] = 0
    assert "strong spots" in refused(job.argv(), capsys)
    assert not job.out.exists()


def test_sweeps_of_two_space_groups_are_not_merged(job, tmp_path, capsys):
    first = read_experiments(job.expt)
    document = json.loads(job.expt.read_text())
    document["crystal"][0]["space_group_hall_symbol"] = "P 4abw 2nw"  # P 41 21 2
    document["experiment"][0]["identifier"] = "other"
    second = job.folder / "other.expt"
    second.write_text(json.dumps(document))
    write_experiments(job.expt, [*first, *read_experiments(second)])
    assert "the sweeps hold different crystals" in refused(job.argv(), capsys)
    assert not job.out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truncated data file", "cell of the model", "all masked"])
def test_the_corrected_command_works_as_it_is(name, job, tiny, capsys):
    """Early and late mistakes alike: no --resume, nothing to delete."""
    spoil, message = SPOILT[name]
    spoil(job)
    assert message in refused(job.argv(), capsys)
    for path in (tiny.master, tiny.data[0], tiny.model):
        shutil.copy(path, job.folder)
    assert cli.main(job.argv()) == 0
    assert (job.out / "merged.mtz").is_file()
    assert "already holds a run; add --resume" in refused(job.argv(), capsys)


def test_a_wrong_model_is_found_before_dials_works(job, capsys, monkeypatch):
    """`process`: the model's space group against --space-group, at once."""
    other_group(job)
    argv = ["process", str(job.master), "--model", str(job.model), "--out", str(job.out)]
    line = refused([*argv, "--space-group", "P43212"], capsys)
    assert "is in space group P 41 21 2 but the data are in P 43 21 2" in line
    line = refused([*argv, "--space-group", "P99"], capsys)
    assert "--space-group 'P99' is not a space group" in line
    cell = ["--space-group", "I23", "--unit-cell", "79,79,38,90,90,90"]
    assert "cannot be in space group I 2 3" in refused([*argv, *cell], capsys)
    assert not job.out.exists()
