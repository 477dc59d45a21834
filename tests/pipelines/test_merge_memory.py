"""`braggflux merge` loads no library that it does not use, and holds no more than it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
from simulated_unmerged import observed, write_mtz

from braggflux.fixtures.stills import stills
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.pipelines import cli
from braggflux.pipelines.simulate.stills_store import write_stills

ROOT = Path(cli.__file__).resolve().parents[1]
CELL, SPACE_GROUP = (40, 50, 60, 90, 90, 90), "P 21 21 21"
FAST = ("--epochs", "2", "--d-min", "4.0", "--set", "network_width=8")
#: scipy is for the pairs of datasets and maps, h5py for stores, the rest for other commands.
UNUSED = {
    *("h5py", "hdf5plugin", "scipy", "matplotlib", "pandas", "reciprocalspaceship"),
    *("torch._dynamo", "sympy"),  # torch's compiler, which its optimizers import
}
#: A new process, so that no other test has loaded them or used the memory.
PROGRAM = """
import json, resource, sys
from braggflux.pipelines import cli
from braggflux.pipelines.workspace.runtime import tune_process
tune_process()
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = cli.main(json.loads(sys.argv[1]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([code, (after - before) / 1024, sorted(sys.modules)]))
"""


def merge(*argv) -> tuple[float, set[str]]:
    """Merge in a process of its own; what it needs beside torch [MiB], and what it imported."""
    arguments = json.dumps(["merge", *(str(a) for a in argv)])
    command = [sys.executable, "-c", PROGRAM, arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    code, grown, modules = json.loads(result.stdout.splitlines()[-1])
    assert code == 0, result.stderr
    return grown, set(modules)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="units of ru_maxrss")
@pytest.mark.parametrize("kind", ["--stills", "--anomalous"])
def test_a_small_merge_needs_little_beside_torch(tmp_path, kind):
    asu = ReciprocalAsu(gemmi.UnitCell(*CELL), gemmi.SpaceGroup(SPACE_GROUP), 4.0, True)
    hkl, columns = observed(asu, np.random.default_rng(0))
    form = {"cell": CELL, "space_group": SPACE_GROUP}
    path = write_mtz(tmp_path / "unmerged.mtz", hkl, columns, **form)
    grown, modules = merge(path, kind, *FAST, "--out", tmp_path / "out")
    assert not modules & UNUSED
    # 2026-11-26, torch 2.13: 47 to 58 MiB; 175 with torch's optimizer and all imports at the top
    assert grown < 90, grown


@pytest.mark.slow
def test_a_store_needs_hdf5_but_no_filters(tmp_path):
    write_stills(tmp_path / "stills", stills(60, d_min=4.0, width=6e-4))
    more = ("--stills", *FAST, "--set", "stream_above=0", "--out", tmp_path / "out")
    _, modules = merge(tmp_path / "stills" / "stills.h5", *more)
    assert modules & UNUSED == {"h5py"}
