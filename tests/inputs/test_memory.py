"""Memory that is limited or not there: one line, before the work where it can be told."""

import subprocess
import sys

import pytest

from braggflux.integrator.errors import UserError
from braggflux.integrator.memory import available_bytes, limit_memory
from braggflux.integrator.shoebox import extraction
from braggflux.pipelines.cli import main

BEYOND = """
import numpy as np
from braggflux.integrator.memory import available_bytes, limit_memory
limit_memory(1.0)
assert 0.5e9 < available_bytes() < 1e9
try:
    np.ones(200_000_000)
except MemoryError:
    print("refused")
np.ones(10_000_000)
"""


def test_no_more_than_the_limit_can_be_taken():
    done = subprocess.run([sys.executable, "-c", BEYOND], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


def test_what_is_left_is_told():
    assert 0.0 < available_bytes() < 1e15


@pytest.mark.parametrize("given", [-1.0, 0.1, float("nan"), float("inf")])
def test_limits_that_cannot_be_are_refused(given):
    with pytest.raises(UserError, match=r"--max-memory must be above 0.5 GB"):
        limit_memory(given)


def test_frames_that_do_not_fit_are_refused_before_they_are_read(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(extraction, "available_bytes", lambda: 1e6)
    command = ["extract", str(tiny.expt), str(tiny.refl), "--out", str(tmp_path / "a.h5")]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "frames of 0.1 megapixels need about 0.004 GB" in message
    assert "0.001 GB are free" in message
    assert not list(tmp_path.iterdir())
