"""A store that repeats the chunks of another is one that extraction might have written."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from braggflux.integrator.io.shoebox_store import CHUNK_BYTES, ShoeboxStore

ROOT = Path(__file__).parents[2]
BOX = (3, 41, 41)  # 52 boxes a chunk


@pytest.fixture
def large_store(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import large_store

    monkeypatch.setattr(gpu, "DETECTOR", (90, 80))
    monkeypatch.setattr(large_store, "DETECTOR", (90, 80))
    yield large_store
    for name in ("gpu", "large_store"):
        del sys.modules[name]


def test_boxes_repeat_and_reflections_go_on(large_store, tmp_path):
    chunk = CHUNK_BYTES // (2 * int(np.prod(BOX)))
    n, small, large = 2 * chunk, tmp_path / "small.h5", tmp_path / "large.h5"
    large_store.make_store(small, n, 4, torch.device("cpu"), BOX, d_min=3.0)
    large_store.repeated(small, large, 3)
    with ShoeboxStore.open(small) as short, ShoeboxStore.open(large) as long:
        long.require_complete()
        assert len(long) == 3 * n
        assert len(long.background(0).frame_ratio) == 12
        rows = slice(2 * n, 3 * n)
        for own, first in zip(long.read_raw(rows), short.read_raw(slice(0, n)), strict=True):
            assert torch.equal(own, first)
        own, first = long.metadata()[rows], short.metadata()
        assert torch.equal(own.miller_index, first.miller_index)
        torch.testing.assert_close(own.xyz_px[:, 2], first.xyz_px[:, 2] + 8)
        assert torch.equal(own.corner[:, 0], first.corner[:, 0] + 8)
    assert large.stat().st_size > 2.5 * small.stat().st_size


def test_table_compares_steps_and_says_what_a_reflection_takes(large_store):
    memory = {f"{k}_mb": 500.0 for k in ("opened", "started", "pixels", "merged")}
    steps = ("start", "training", "integration", "merge step")
    held = {"boxes": 100, "bytes": 1e6, **memory, "seconds": dict.fromkeys(steps, (50, 2.0, 1.0))}
    limited = held | {"boxes": 1100, "bytes": 11e6, "started_mb": 501.0}
    limited["seconds"] = dict.fromkeys(steps, (50, 4.0, 1.25))
    lines = large_store.table(held, limited, 4.0)
    assert "| from disk | 4 | 1100 | 0.0 | training | 12 | 40 |" in lines
    assert (
        "speed from disk over that in memory, of CPU time: training 0.80, integration 0.80"
        in lines
    )
    assert lines[-1].endswith("1000 bytes a reflection at the start")
