"""One writer at a time; a killed one is no obstacle; nothing is left."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from braggflux.integrator.errors import UserError
from braggflux.pipelines.workspace.lock import LOCK, one_writer

HOLD = """
import sys, time
from pathlib import Path
from braggflux.pipelines.workspace.lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_name_of_the_first(holder, tmp_path):
    says = f"process {holder.pid} on {socket.gethostname()}.* is writing"
    with pytest.raises(UserError, match=says), one_writer(tmp_path / "run"):
        pass
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == holder.pid


def test_a_killed_writer_is_no_obstacle(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    with one_writer(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_folders_that_were_made_for_nothing_go(tmp_path):
    with pytest.raises(RuntimeError), one_writer(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not (tmp_path / "a").exists()
    with one_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "merged.mtz").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["merged.mtz"]


def test_a_pipeline_within_a_pipeline_may_write(tmp_path):
    with one_writer(tmp_path / "run"), one_writer(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).is_file()
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"), one_writer(Path(tmp_path / "run")):
        pass
