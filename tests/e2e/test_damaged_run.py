"""A flipped bit in any file of a finished run is noticed, or the file is for people alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.intensity_file import read_intensities
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.torch_file import load_torch
from braggflux.pipelines import cli
from braggflux.pipelines.integration.run import run
from braggflux.pipelines.report.html import write_report_of
from braggflux.pipelines.workspace.rundir import RunDirectory

pytestmark = pytest.mark.slow
N_FLIPS = 5
#: Made again by `report` and `compare` from other files, or read by nobody else than people.
FOR_PEOPLE = (
    *("run.log", "config.diff.yaml", "report.html", "table1.*", "deposition.cif"),
    *("peaks_by_epoch.csv", "compare.csv"),
)


def read_store(path: Path) -> None:
    with ShoeboxStore.open(path) as store:
        store.require_complete()
        store.read_raw(slice(0, len(store)))
        for sweep in range(len(store.experiments)):
            store.background(sweep)


READERS: dict[str, Callable[[Path], object]] = {
    "shoeboxes.h5": read_store,
    "intensities.h5": read_intensities,
    "*.pt": lambda path: load_torch(path, "start anew"),
}


def test_every_file_of_a_run(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight.path, folder)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    rng = np.random.default_rng(0)
    accepted = []
    for name in names:
        if name in ("provenance.json", "latest") or any(fnmatch(name, p) for p in FOR_PEOPLE):
            continue
        path = folder / name
        kind = next((pattern for pattern in READERS if fnmatch(name, pattern)), None)
        whole = path.read_bytes()
        for bit in rng.integers(0, 8 * len(whole), N_FLIPS).tolist():
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                READERS[kind](path) if kind else RunDirectory.open(folder)
            except UserError:
                continue
            accepted.append(name)
        path.write_bytes(whole)
    # of HDF5 files, what lies between the data sets is stored nowhere else
    assert {name for name in accepted if not name.endswith(".h5")} == set()
    RunDirectory.open(folder)


def test_commands_given_a_damaged_run(straight, configure, tiny, tmp_path, capsys, caplog):
    """The folder is refused; a file by its own name is read, with a warning."""
    folder = tmp_path / "run"
    shutil.copytree(straight.path, folder)
    merged = bytearray((folder / "merged.mtz").read_bytes())
    merged[len(merged) // 2] ^= 1
    (folder / "merged.mtz").write_bytes(merged)
    with pytest.raises(UserError, match=r"merged.mtz has changed since"):
        run(configure(folder), resume=True)
    assert cli.main(["merge", str(folder), "--out", str(tmp_path / "merge")]) == 2
    assert f"{folder} is a folder; give a file" in capsys.readouterr().err
    assert cli.main(["peaks", str(folder / "merged.mtz"), str(tiny.model)]) == 0
    assert "is not as its result was left" in caplog.text


def test_a_damaged_record_of_a_run_is_one_line(straight, tmp_path):
    shutil.copytree(straight.path, tmp_path / "run")
    record = tmp_path / "run" / "provenance.json"
    record.write_text(record.read_text()[:-9])
    with pytest.raises(UserError, match=r"provenance.json is damaged .*take it from a copy"):
        write_report_of(tmp_path / "run")
