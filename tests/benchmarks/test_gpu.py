"""The benchmark of a GPU on the CPU: it makes its store, trains, and measures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from braggflux.integrator.io.shoebox_store import ShoeboxStore

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "DETECTOR", (200, 220))
    monkeypatch.setattr(module, "PROFILED_STEPS", 2)
    return module


def test_boxes_hold_what_was_asked_for(gpu, tmp_path):
    gpu.make_store(tmp_path / "s.h5", 500, 12, torch.device("cpu"), box=(7, 9, 9), d_min=5.0)
    with ShoeboxStore.open(tmp_path / "s.h5") as store:
        assert (len(store), store.box) == (500, (7, 9, 9))
        batch = store.read(slice(0, 500))
        metadata = store.metadata(torch.float64)
        assert (metadata.corner.diff(dim=0)[:, 0] >= 0).all(), "in the order of the frames"
    signal = (batch.counts - gpu.BACKGROUND).sum((1, 2, 3)) * metadata.lp
    # mean of exponential intensities; their own spread is as large
    mean = float(signal.mean() / gpu.PHOTONS)
    assert abs(mean - 1) < 5 / np.sqrt(500)


@pytest.mark.slow
def test_tiny_run_measures_every_stage(gpu, tmp_path, capsys):
    path = tmp_path / "found.json"
    arguments = "--device cpu --boxes 800 --frames 12 --box 5,9,9 --d-min 6 --epochs 1"
    assert gpu.main([*arguments.split(), "--batch-size", "256", "--json", str(path)]) == 0
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert (found["boxes"], found["epochs"], found["device"]) == (800, 1, "CPU")
    # two bytes of a count and one of its mask a voxel, and the metadata
    assert found["bytes"] > 800 * 5 * 9 * 9 * 3
    assert found["steps"]["flop"] > 1e6
    assert found["steps"]["operators"] > 1000
    for stage in ("make shoeboxes", "training pass", "integration pass", "merge steps", "outputs"):
        assert any(row["stage"] == stage and row["wall_s"] > 0 for row in found["stages"])
        assert f"| {stage} |" in printed


def test_without_a_gpu_it_says_so(gpu, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("no GPU is here")
