"""Simulated sweeps cut to some of their images, and DIALS to read what comes of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import hdf5plugin

from braggflux.fixtures.simulate import SimulatedFiles


def cut(tiny: SimulatedFiles, folder: Path, first: int, last: int, name: str) -> Path:
    """The simulated .expt cut to some of its images, as dials.slice_sequence does."""
    document = json.loads(tiny.expt.read_text())
    scan = document["scan"][0]
    start, width = scan["oscillation"]
    n = last - first + 1
    scan |= {"image_range": [first, last], "oscillation": [start + (first - 1) * width, width]}
    scan |= {"exposure_time": [0.0] * n, "epochs": [0.0] * n}
    document["imageset"][0]["template"] = str(tiny.master)
    path = folder / f"{name}.expt"
    path.write_text(json.dumps(document))
    return path


def run_dials(name: str, *arguments: object, folder: Path) -> str:
    """Run a DIALS program; its output."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HDF5_PLUGIN_PATH": hdf5plugin.PLUGINS_PATH,
    }
    result = subprocess.run(
        [f"dials.{name}", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
