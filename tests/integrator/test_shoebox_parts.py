"""Extraction by several processes: the store of one, or one line and nothing left."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from made_frames import (
    EXTENT,
    N_IMAGES,
    ArrayFrames,
    make_experiment,
    make_frames,
    make_prediction,
)
from ranks import in_ranks

from braggflux.integrator.errors import UserError
from braggflux.integrator.io import shoebox_store
from braggflux.integrator.processes import Processes
from braggflux.integrator.shoebox.cutting.parts import Cutting, Workforce
from braggflux.integrator.shoebox.extract import extract_shoeboxes
from braggflux.integrator.shoebox.mask import MaskSettings
from braggflux.integrator.shoebox.sweep import Sweep
from braggflux.integrator.workers import run_workers


def made_sweeps(kind=ArrayFrames):
    """Two sweeps with hot pixels, zingers and shadows."""
    rng = np.random.default_rng(4)
    sweeps = []
    for name, n in (("first", 130), ("second", 75)):
        made = make_frames(rng)
        made.panels[0][:, 20, 20] = 400
        made.panels[1][5:7, 12, 12] = made.panels[0][4, 5, 30] = 900
        made.panels[0][9:, :16, :16] = np.minimum(made.panels[0][9:, :16, :16], 0)
        frames = kind(made.panels, made.usable)
        experiment, spots = make_experiment(identifier=name), make_prediction(n, rng)
        sweeps.append(Sweep(experiment, frames, spots, make_prediction(20, rng)))
    return sweeps


def contents(path: Path) -> dict[str, tuple]:
    """Bytes of all data sets and attributes of a file."""
    found = {}
    with h5py.File(path) as file:

        def take(name, item):
            attributes = {k: np.asarray(v).tobytes() for k, v in item.attrs.items()}
            data = item[()].tobytes() if isinstance(item, h5py.Dataset) else b""
            found[name] = data, attributes

        file.visititems(take)
        take("/", file)
    return found


@pytest.fixture
def small_chunks(monkeypatch):
    """Eight boxes in a chunk: ranges of frames begin and end within chunks."""
    monkeypatch.setattr(shoebox_store, "CHUNK_BYTES", 8 * 2 * int(np.prod(EXTENT.box)))


@pytest.mark.parametrize("find_defects", [True, False])
def test_any_number_of_workers_gives_the_same_store(tmp_path, small_chunks, find_defects):
    expected = None
    for n in (1, 2, 3, 5):
        path, ticks = tmp_path / f"{n}.h5", []
        extract_shoeboxes(
            made_sweeps(), EXTENT, path, find_defects=find_defects,
            workforce=Workforce(n), progress=lambda *t, to=ticks: to.append(t),
        ).close()  # fmt: skip
        assert ticks == [(k + 1, 2 * N_IMAGES) for k in range(2 * N_IMAGES)]
        found = contents(path)
        expected = expected or found
        assert found == expected, n
    assert len(expected["boxes/counts"][0]) > 8 * 2 * np.prod(EXTENT.box)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.h5", "2.h5", "3.h5", "5.h5"]


def test_processes_of_torchrun_give_the_same_store(tmp_path, small_chunks):
    alone, together = tmp_path / "alone.h5", tmp_path / "together.h5"
    extract_shoeboxes(made_sweeps(), EXTENT, alone).close()

    def work(here):
        with here.joined(torch.device("cpu")):
            store = extract_shoeboxes(
                made_sweeps(), EXTENT, together, workforce=Workforce(processes=here)
            )
            assert len(store) == 205

    in_ranks(2, work)
    assert contents(together) == contents(alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.h5", "together.h5"]


def test_one_of_torchrun_that_fails_ends_the_others(tmp_path, monkeypatch):
    """The disk of the second is full; the first says that another has ended, and tidies up."""
    said = tmp_path / "said"
    said.mkdir()
    create = h5py.Group.create_group

    def full(self, name, *rest):
        if name == "sweep_1":  # the second process writes it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(self, name, *rest)

    def work(here):
        monkeypatch.setattr(h5py.Group, "create_group", full)
        try:
            with here.joined(torch.device("cpu")):
                how = Workforce(processes=here)
                extract_shoeboxes(made_sweeps(), EXTENT, tmp_path / "s.h5", workforce=how)
        except UserError as error:
            (said / str(here.rank)).write_text(str(error))

    in_ranks(2, work)
    assert "another process of this run has ended" in (said / "0").read_text()
    assert "No space left on device" in (said / "1").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["said"]


def test_many_boxes_on_a_frame_stay_apart(tmp_path, monkeypatch):
    """More boxes begin on a frame than two chunks hold: those that wait are not written over."""
    rng = np.random.default_rng(8)
    frames, spots = make_frames(rng), make_prediction(600, rng, zeta=1.0)
    stores = []
    for n in (1000, 8):
        monkeypatch.setattr(shoebox_store, "CHUNK_BYTES", n * 2 * int(np.prod(EXTENT.box)))
        path = tmp_path / f"{n}.h5"
        extract_shoeboxes([Sweep(make_experiment(), frames, spots)], EXTENT, path).close()
        stores.append(contents(path))
    assert stores[0] == stores[1]


def test_every_frame_is_the_share_of_one_process():
    cutting = Cutting(made_sweeps(), EXTENT, MaskSettings(), True)
    for n in (1, 3, 40):
        dealt = [(s, k) for i in range(n) for s, r in cutting.share(Processes(i, n)) for k in r]
        assert dealt == [(s, k) for s in (0, 1) for k in range(N_IMAGES)]


class DeadlyFrames(ArrayFrames):
    """The process that reads a frame near the end of the scan is killed."""

    def read(self, frame):
        if frame == N_IMAGES - 3:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return super().read(frame)


class DamagedFrames(ArrayFrames):
    def read(self, frame):
        if frame == N_IMAGES - 3:
            raise UserError("image 12 is damaged")
        return super().read(frame)


@pytest.mark.parametrize(
    ("kind", "says"),
    [(DeadlyFrames, r"killed \(signal 9\).*--processes"), (DamagedFrames, "image 12 is damaged")],
)
def test_a_worker_that_ends_ends_all(tmp_path, kind, says):
    with pytest.raises(UserError, match=says):
        extract_shoeboxes(made_sweeps(kind), EXTENT, tmp_path / "s.h5", workforce=Workforce(3))
    assert list(tmp_path.iterdir()) == []
    assert not multiprocessing.active_children()


def test_want_of_memory_and_faults_come_home():
    def work(k, tick):
        tick()
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        run_workers(2, work, lambda: None)
    with pytest.raises(RuntimeError, match="its traceback is above"):
        run_workers(2, lambda k, tick: 1 / 0, lambda: None)
    assert not multiprocessing.active_children()


def test_workers_end_when_nobody_listens(tmp_path):
    """The parent is killed: they notice at the next step."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:

        def work(k, tick):
            os.write(write, f"{os.getpid()}\n".encode())
            while True:
                tick()
                time.sleep(0.01)

        run_workers(2, work, lambda: None)
        os._exit(0)
    workers = [int(n) for n in _lines(read, 2)]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 20
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_runs, workers))


def _lines(descriptor: int, n: int) -> list[str]:
    text = ""
    while text.count("\n") < n:
        text += os.read(descriptor, 100).decode()
    return text.split()


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
