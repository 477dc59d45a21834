"""The command line: help, exit codes, one line per mistake, nothing heavy before it is needed."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from braggflux.integrator.errors import UserError
from braggflux.pipelines import cli
from braggflux.pipelines.commands import peaks, report
from braggflux.pipelines.workspace import log

ROOT = Path(cli.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _logging_as_before():
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
    logging.captureWarnings(False)


def program(*argv: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "braggflux.pipelines.cli", *argv]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("braggflux: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"braggflux {command} " in capsys.readouterr().out


def test_help_and_version_in_a_new_process():
    result = program("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in cli.COMMANDS)
    assert program("--version").stdout.startswith("braggflux ")


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom braggflux.pipelines import cli\n"
        "cli.build_parser().format_help()\n"
        "heavy = {'torch', 'gemmi', 'h5py', 'scipy', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense; see `braggflux --help`"),
        (["integrate"], "invalid choice: 'integrate'"),
        (["run", "--nonsense"], "unrecognized arguments: --nonsense; see `braggflux run --help`"),
        (["run"], "expt is not given"),
        (
            ["run", "none.expt", "none.refl", "--model", "m", "--out", "o"],
            "none.expt does not exist",
        ),
        (["run", "a.expt", "a.refl", "--epochs", "abc"], "must be a whole number, got 'abc'"),
        (["run", "a.expt", "a.refl", "--seed", "-1"], "`seed` must be at least 0, got -1"),
        (["run", "--config", "none.yaml"], "cannot read configuration none.yaml"),
        (["extract", "none.expt", "none.refl", "--out", "x.h5"], "none.expt does not exist"),
        (["extract", "a", "b", "--out", "x.h5", "--box", "2,3,3"], "must be three odd positive"),
        (["report", "nowhere"], "nowhere is not a run directory"),
        (["compare", "nowhere"], "nowhere is not a run directory"),
        (["peaks", "none.mtz", "none.pdb"], "none.mtz"),
        (
            ["peaks", "a.mtz", "m.pdb", "--d-min", "x"],
            "--d-min must be a number, or null, got 'x'",
        ),
        (["simulate", "--out", "x", "--preset", "none"], "none"),
        (["simulate", "--out", "x", "--seed", "abc"], "--seed must be a whole number, got 'abc'"),
        (["simulate"], "required: --out"),
        (["convert", "none.stream", "--out", "x.h5"], "none.stream does not exist"),
        (["convert", "none.mtz", "--out", "x.mtz"], "must end in .h5"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_mistake_has_no_traceback_in_a_new_process(tmp_path):
    result = program("report", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("braggflux: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("one\n  two"), 2, "one two"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "/x/y: Permission denied; check"),
        (OSError(28, "No space left on device"), 2, "No space left on device; check free space"),
        (MemoryError(), 2, "out of memory (MemoryError); end other programs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "training.batch_size"),
        (KeyboardInterrupt(), 130, "--resume"),
    ],
)
def test_what_goes_wrong_inside(error, code, message, capsys, monkeypatch, tmp_path):
    def fail(args):
        raise error

    monkeypatch.setattr(report, "run", fail)
    assert cli.main(["report", str(tmp_path)]) == code
    assert message in one_line(capsys)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    def fail(args):
        raise ZeroDivisionError

    monkeypatch.setattr(report, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", str(tmp_path)])


def test_the_log_file_says_why_a_run_ended(monkeypatch, tmp_path, capsys):
    def fail(args):
        log.attach_file(tmp_path / "run.log")
        logging.getLogger("braggflux.pipelines.test").info("begun")
        raise UserError("the frames are empty")

    monkeypatch.setattr(report, "run", fail)
    assert cli.main(["report", str(tmp_path)]) == 2
    text = (tmp_path / "run.log").read_text()
    assert "begun" in text
    assert "the frames are empty" in text
    assert "the frames are empty" in one_line_after_messages(capsys)


def one_line_after_messages(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("braggflux: error: ") for line in lines) == 1
    return lines[-1]


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """`braggflux ... | head`: quiet, no traceback."""
    code = (
        "import sys\nfrom braggflux.pipelines import cli\n"
        "from braggflux.pipelines.commands import report\n"
        "def run(args):\n"
        "    for _ in range(100000): sys.stdout.write('x' * 80)\n"
        "report.run = run\nsys.exit(cli.main(['report', 'x']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.realdata
def test_peaks_writes_csv(shared, capsys):
    data = shared / "data" / "hewl_nai"
    argv = ["peaks", str(data / "dials_merged.mtz"), str(data / "9b7c.pdb"), "--elements", "I"]
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "chain,seqid,residue,atom,peak_sigma,difference,peak_sigma_own"
    heights = {line.split(",")[1]: float(line.split(",")[4]) for line in lines[1:]}
    # Published with the data, scored independently on a grid of another fineness.
    for seqid, expected in (("204", 23.60), ("205", 18.57), ("206", 20.63)):
        assert heights[seqid] == pytest.approx(expected, rel=0.05)


def test_commands_say_what_they_do():
    assert peaks.__doc__.startswith("Anomalous peak heights")


def test_progress_is_sparse_in_a_queue(caplog, monkeypatch):
    monkeypatch.setattr(log, "PLAIN_INTERVAL_S", 0.0)
    with caplog.at_level(logging.INFO, logger="pipelines"), log.progress("frames") as advance:
        for done in range(1, 1001):
            advance(done, 1000)
    assert len(caplog.messages) == 10
    assert caplog.messages[-1] == "frames: 1000 of 1000"
    monkeypatch.setattr(log, "PLAIN_INTERVAL_S", 60.0)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pipelines"), log.progress("frames") as advance:
        advance(1000, 1000)
    assert caplog.messages == []


def test_log_file_is_attached_once(tmp_path):
    log.attach_file(tmp_path / "run.log")
    log.attach_file(tmp_path / "run.log")
    try:
        logging.getLogger("braggflux.pipelines.test").warning("once")
        assert (tmp_path / "run.log").read_text().count("once") == 1
    finally:
        log.detach_files()
