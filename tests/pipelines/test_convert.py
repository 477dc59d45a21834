"""`braggflux convert` and a merge of the store that it writes."""

from __future__ import annotations

import signal
import subprocess
import sys

import gemmi
import numpy as np
import pytest
from simulated_unmerged import FAST, observed, write_mtz

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.io.read import read_table
from braggflux.pipelines import cli

#: Convert as far as the first observations, and wait.
HELD = """
import sys, time
from braggflux.merge.io.stores import store_conversion
from braggflux.pipelines import cli
def held(data):
    print("held", flush=True)
    time.sleep(60)
store_conversion.screened = held
sys.exit(cli.main(["convert", sys.argv[1], "--out", sys.argv[2]]))
"""
FORM = {"cell": (40, 50, 60, 90, 90, 90), "space_group": "P 21 21 21"}


@pytest.fixture
def source(tmp_path):
    asu = ReciprocalAsu(gemmi.UnitCell(*FORM["cell"]), gemmi.SpaceGroup("P212121"), 5.0, False)
    hkl, columns = observed(asu, np.random.default_rng(0), n_per_image=60)
    return write_mtz(tmp_path / "a.mtz", hkl, columns, **FORM)


def test_a_store_merges_like_the_file_it_was_made_from(source, tmp_path):
    store = tmp_path / "a.h5"
    assert cli.main(["convert", str(source), "--out", str(store)]) == 0
    [ours], [theirs] = read_table([store]), read_table([source])
    np.testing.assert_array_equal(ours.miller_index, theirs.miller_index)
    for path, out in ((source, "one"), (store, "two")):
        argv = ["merge", str(path), "--stills", "--out", str(tmp_path / out), *FAST]
        assert cli.main(argv) == 0
    one, two = (read_merged_mtz(tmp_path / n / "merged.mtz").table for n in ("one", "two"))
    np.testing.assert_allclose(one.f, two.f, rtol=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_nothing_is_left_of_one_that_was(source, tmp_path, capsys, number):
    """Of a killed one after the next."""
    store = tmp_path / "a.h5"
    convert = ["convert", str(source), "--out", str(store)]
    command = [sys.executable, "-c", HELD, *convert[1::2]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"held\n"
        assert cli.main(convert) == 2
        assert f"process {process.pid} on " in capsys.readouterr().err
        process.send_signal(number)
    left = {path.name for path in tmp_path.iterdir()} - {"a.mtz"}
    if number == signal.SIGTERM:
        assert process.returncode == cli.EXIT_TERMINATED
        assert not left
    else:
        assert len(left) == 3, "lock, rows by image, store"
        (tmp_path / ".other.h5.q1w2e3r4").touch()  # of a file that is written now
    assert cli.main(convert) == 0
    hidden = {path.name for path in tmp_path.iterdir()} - {"a.mtz", "a.h5"}
    assert hidden == ({".other.h5.q1w2e3r4"} if left else set())


def test_what_needs_all_in_memory_is_one_line(tmp_path, capsys):
    form = {"cell": (50, 50, 60, 90, 90, 120), "space_group": "P 63"}
    asu = ReciprocalAsu(gemmi.UnitCell(*form["cell"]), gemmi.SpaceGroup("P 63"), 6.0, False)
    hkl, columns = observed(asu, np.random.default_rng(0), n_per_image=20)
    source = write_mtz(tmp_path / "a.mtz", hkl, columns, **form)
    assert cli.main(["convert", str(source), "--out", str(tmp_path / "a.h5")]) == 0
    argv = ["merge", str(tmp_path / "a.h5"), "--stills", "--set", "stream_above=0"]
    argv += ["--half-set-repeats", "2", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("braggflux: error: ")
    assert "--half-set-repeats does not allow" in error
    assert "stream_above=240" in error
    assert not (tmp_path / "out").exists()
