"""The table of costs against frames: stages of an epoch, and a figure of them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def frames(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("frames")


def test_stages_of_the_first_epoch_are_added_up(frames, tmp_path):
    path = tmp_path / "stage_times.csv"
    path.write_text(
        "epoch,stage,wall_s,cpu_s\n,extraction,9,2.5\n0,merge steps,9,7\n1,merge steps,9,3\n"
        "1,training pass,9,4\n1,outputs,9,1\n1,outputs,9,0.5\n"
    )
    found = frames.of_stages(path)
    assert found == {
        "extraction": 2.5, "training pass": 4.0, "integration pass": 0.0, "merge steps": 3.0,
        "outputs": 1.5,
    }  # fmt: skip


def test_the_figure_names_every_stage(frames, tmp_path):
    rows = [{"frames": n, "memory": 10.0 * n} | dict.fromkeys(frames.STAGES, n) for n in (1, 2)]
    frames.figure(rows, tmp_path / "cost.svg")
    text = (tmp_path / "cost.svg").read_text()
    assert all(f"<!-- {stage} -->" in text for stage in frames.STAGES)
