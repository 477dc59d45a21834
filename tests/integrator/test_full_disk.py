"""A disk without room costs one line, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from braggflux.integrator.atomic import replacing, why_not_written
from braggflux.integrator.errors import UserError
from braggflux.pipelines import cli
from braggflux.pipelines.workspace import log

TESTS = Path(__file__).resolve().parents[1]
REMEDY = r"give the command again \(run, process: with --resume\), or choose another --out"
ROOM = r"needs more than the \d+\.\d MB free in .*: make room"
#: In a name space of its own, so that the file system goes with the command.
MOUNT = ("unshare", "-rm", "bash", "-c")


def small_disk(folder: Path, size: str) -> str:
    """Shell command that mounts a small file system in memory; skips where that is forbidden."""
    command = f"mount -t tmpfs -o size={size} tmpfs {folder}"
    can = shutil.which("unshare") and not subprocess.run([*MOUNT, command], check=False).returncode
    if not can:
        pytest.skip("no file system can be mounted here")
    return command


@pytest.mark.parametrize("kind", ["limit", pytest.param("disk", marks=pytest.mark.slow)])
def test_every_writer_at_many_sizes(kind, tmp_path):
    """In a program of its own: its exit code tells whether HDF5 crashes when it ends."""
    script = f"{sys.executable} {TESTS / 'full_disk_sweep.py'} {kind} {tmp_path}"
    if kind == "disk":
        script = f"{small_disk(tmp_path, '16m')}; {script}"
        words = [*MOUNT, script]
    else:
        words = script.split()
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent / '.src'}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert len({case["file"] for case in found}) == 9
    reason = ROOM if kind == "disk" else "File too large .*ulimit -f"
    for case in found:
        own = case["file"] if "lock" not in case["file"] else "(.lock|locked.txt)"
        assert re.fullmatch(f"cannot write .*/{own}: .*{reason}.*{REMEDY}", case["message"]), case
        assert case["left"] == [], case
    assert all(case["again"] for case in found if "again" in case), "whole once there is room"


@pytest.mark.slow
def test_a_run_goes_on_once_there_is_room(tmp_path):
    """The script fills the disk in every stage; here before the first checkpoint and after it."""
    script = f"{sys.executable} {TESTS / 'full_disk_run.py'} {tmp_path} 0.14 0.6"
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent / '.src'}"}
    words = [*MOUNT, f"{small_disk(tmp_path, '64m')}; {script}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert len(found) == 2
    for case in found:
        assert case["code"] == 2, case
        assert re.fullmatch(f"cannot write .*: .*{ROOM}.*{REMEDY}", case["message"]), case
        assert case["left"] == [], case
        assert case["again"] == [0, ""], case
        assert case["is_equal"], case


def test_a_quota_is_told_as_such(tmp_path):
    """No quota can be set in a test; the system's number stands for it."""
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with pytest.raises(UserError, match=rf"a.mtz: Disk quota .*remove files of yours.*{REMEDY}"):
        with replacing(tmp_path / "a.mtz"):
            raise full
    assert list(tmp_path.iterdir()) == []
    assert "your quota" not in why_not_written(OSError(errno.ENOSPC, ""), tmp_path / "a.mtz")


def test_a_folder_that_cannot_be_made_is_told_with_the_room(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", full)
    assert cli.main(["simulate", "--preset", "tiny", "--out", str(tmp_path / "out")]) == 2
    assert "no space left" in capsys.readouterr().err.lower()


def test_a_log_without_room_is_told_once(capsys):
    """The work goes on: what needs the room will say so."""
    log.attach_file(Path("/dev/full"))
    try:
        for text in ("one", "two"):
            logging.getLogger("braggflux.pipelines.test").warning(text)
    finally:
        log.detach_files()
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot write" in line]
    assert len(lines) == 1
    assert lines[0].startswith(
        "braggflux: warning: cannot write /dev/full: No space left on device"
    )


def test_printing_without_room_is_one_line():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "braggflux.pipelines.cli", "config", "merge"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch("braggflux: error: cannot print.*: No space left.*; .*\n", done.stderr)
