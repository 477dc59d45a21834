"""From raw simulated frames to the report, through the command line, with and without DIALS."""

from __future__ import annotations

import csv
import logging
import shutil
import stat
from pathlib import Path

import gemmi
import pytest

from braggflux.fixtures.simulate import SimulatedFiles, simulate
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.pipelines import cli
from braggflux.pipelines.workspace.rundir import RunDirectory

STEPS = {
    "import": "touch imported.expt",
    "find_spots": "touch strong.refl",
    "index": "touch indexed.expt indexed.refl",
    "refine": "cp {expt} refined.expt; cp {refl} refined.refl",
    "integrate": "touch integrated.expt; cp {refl} integrated.refl",
    "scale": "echo 'Sorry: no overlapping reflections'; exit 1",
}


@pytest.fixture(autouse=True)
def _logging_as_before():
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
    logging.captureWarnings(False)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> SimulatedFiles:
    return simulate(tmp_path_factory.mktemp("frames"), preset="tiny", seed=0)


@pytest.fixture
def programs(frames, tmp_path, monkeypatch) -> Path:
    """Stand-ins for DIALS that know the true geometry and refuse to scale."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STEPS.items():
        path = folder / f"dials.{name}"
        text = body.format(expt=frames.expt, refl=frames.refl)
        path.write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/calls\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.mark.slow
def test_extract_with_a_given_box(frames, tmp_path):
    out = tmp_path / "boxes.h5"
    argv = ["extract", str(frames.expt), str(frames.refl), "--out", str(out), "--box", "5,11,13"]
    assert cli.main(argv) == 0
    with ShoeboxStore.open(out) as store:
        assert tuple(store.box) == (5, 11, 13)
        assert len(store) > 1000


@pytest.mark.slow
def test_a_refused_reference_does_not_fail_the_run(frames, programs, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["process", str(frames.master), "--model", str(frames.model), "--out", str(out)]
    argv += ["--space-group", "P43212", "--epochs", "1"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "no DIALS row: dials.scale failed: Sorry: no overlapping reflections" in shown
    assert "IOD 204" in shown
    run = RunDirectory.open(out)
    assert {p["epoch"] for p in run.read_peaks()} == {0, 1}
    for path in (run.merged, run.unmerged, run.integrated_refl, run.report, run.statistics_file):
        assert path.stat().st_size > 0, path
    assert "no overlapping reflections" in run.report.read_text(encoding="utf-8")
    assert run.read_provenance()["sessions"][-1]["ended"]
    with run.compare_file.open() as stream:
        reasons = [row["reason"] for row in csv.DictReader(stream)]
    assert any("no overlapping reflections" in reason for reason in reasons)

    (tmp_path / "calls").unlink()
    assert cli.main(argv) == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err
    assert cli.main([*argv, "--resume"]) == 0
    assert (tmp_path / "calls").read_text().split() == ["scale"], "only what failed is tried again"


def test_geometry_that_fails_is_one_line(frames, programs, tmp_path, capsys):
    refine = programs / "dials.refine"
    refine.write_text("#!/bin/sh\necho 'Sorry: too few reflections'; exit 1\n")
    out = tmp_path / "run"
    argv = ["process", str(frames.master), "--model", str(frames.model), "--out", str(out)]
    assert cli.main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "braggflux: error: dials.refine failed: Sorry: too few reflections; see"
    )
    assert {p.name for p in out.iterdir()} == {"dials", "run.log"}


@pytest.mark.slow
def test_a_model_of_another_cell_is_found_before_the_reference(frames, programs, tmp_path, capsys):
    """The geometry is done and stays; the command with the right model goes on from there."""
    wrong = gemmi.read_structure(str(frames.model))
    wrong.cell = gemmi.UnitCell(82.0, 82.0, 37.8, 90, 90, 90)
    model = tmp_path / "model.pdb"
    wrong.write_pdb(str(model))
    out = tmp_path / "run"
    argv = ["process", str(frames.master), "--model", str(model), "--out", str(out)]
    argv += ["--epochs", "1", "--no-reference"]
    assert cli.main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("braggflux: error: ")
    assert "has the cell 82 82 37.8" in last
    assert {p.name for p in out.iterdir()} == {"dials", "run.log"}
    (tmp_path / "calls").unlink()
    shutil.copy(frames.model, model)
    assert cli.main(argv) == 0
    assert not (tmp_path / "calls").exists(), "no DIALS step is repeated"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no images are given"),
        (["none.h5", "--out", "run"], "image 1: none.h5 does not exist"),
        (["{master}"], "out is not given"),
        (["{master}", "--out", "run", "--truth", "none.mtz"], "--truth none.mtz does not exist"),
        (["{master}", "--out", "run", "--unit-cell", "1,2"], "dials.unit_cell must be 6 values"),
    ],
)
def test_mistakes(frames, argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["process", *(a.format(master=frames.master) for a in argv)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.dials
def test_real_dials_from_raw_frames_to_the_table(dials, frames, tmp_path, capsys):
    """The main path: bitshuffled frames, real geometry, the reference of the same frames."""
    out = tmp_path / "run"
    argv = ["process", str(frames.master), "--model", str(frames.model), "--out", str(out)]
    argv += ["--space-group", "P43212", "--epochs", "1", "--truth", str(frames.truth_mtz)]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    run = RunDirectory.open(out)
    assert run.read_provenance()["notes"] == {}
    assert next(p["epoch"] for p in run.read_peaks()) == "DIALS"
    lines = shown.strip().splitlines()
    assert any(line.startswith("DIALS ") for line in lines), "a row of the peak table"
    assert any("over DIALS [%]" in line for line in lines)
    at = next(k for k, line in enumerate(lines) if line.startswith("Table 1."))
    assert any(line.split() == ["braggflux", "DIALS"] for line in lines[at:])
    with run.compare_file.open() as stream:
        rows = {
            (r["comparison"], r["bin"], r["metric"], r["subject"]): r
            for r in csv.DictReader(stream)
        }
    strong = rows["observations by I/sigma of DIALS", "all > 3", "cc", "ours vs DIALS"]
    # Seen 2026: 0.9997 for 1149 observations after two epochs.
    assert float(strong["value"]) > 0.99
    assert int(strong["n"]) > 800
    title = "merged against the truth by resolution [A]"
    # Seen 2026: R 0.018 for both.
    assert float(rows[title, "all", "R F", "ours"]["value"]) < 0.03
    assert float(rows[title, "all", "R F", "DIALS"]["value"]) < 0.03
