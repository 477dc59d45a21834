"""What the killing benchmark calls equal."""

from __future__ import annotations

import importlib
from pathlib import Path

import gemmi
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def kills(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("kills")


def result(folder: Path, value: float, peaks: str) -> Path:
    folder.mkdir()
    for name in ("merged.mtz", "half_sets.mtz"):
        mtz = gemmi.Mtz(with_base=True)
        mtz.spacegroup = gemmi.SpaceGroup("P 1")
        mtz.set_cell_for_all(gemmi.UnitCell(10, 10, 10, 90, 90, 90))
        mtz.add_dataset("d")
        mtz.add_column("F", "F")
        mtz.set_data(np.array([[1, 0, 0, value], [0, 1, 0, np.nan]], np.float32))
        mtz.write_to_file(str(folder / name))
    for name in ("peaks.csv", "statistics.csv"):
        (folder / name).write_text(peaks)
    return folder


def test_every_kind_of_difference_is_named(kills, tmp_path):
    whole = result(tmp_path / "whole", 1.0, "a")
    assert kills.difference(whole, result(tmp_path / "same", 1.0, "a")) == ""
    assert kills.difference(whole, result(tmp_path / "other", 1.0000001, "a")) == "half_sets.mtz"
    assert kills.difference(whole, result(tmp_path / "peaks", 1.0, "b")) == "peaks.csv"
    for folder, wall_s, elbo in ((whole, 1, 2), (tmp_path / "same", 3, 2)):
        (folder / "metrics.jsonl").write_text(f'{{"wall_s": {wall_s}, "elbo": {elbo}}}\n')
    assert kills.difference(whole, tmp_path / "same") == "", "times differ"
    (tmp_path / "same" / "metrics.jsonl").write_text('{"wall_s": 1, "elbo": 3}\n')
    assert kills.difference(whole, tmp_path / "same") == "metrics"
    (whole / "metrics.jsonl").unlink()
    left = result(tmp_path / "left", 1.0, "a")
    (left / ".merged.mtz.xyz").touch()
    assert kills.difference(whole, left) == "files: .merged.mtz.xyz"
