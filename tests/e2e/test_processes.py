"""A run of two processes is that of one, step by step; it may end and go on with any number."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch
from ranks import in_ranks

from braggflux.integrator import processes
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.processes import ALONE, Processes
from braggflux.pipelines import cli
from braggflux.pipelines.config import schema
from braggflux.pipelines.integration.epoch_outputs import EpochWriter
from braggflux.pipelines.integration.problem import build
from braggflux.pipelines.integration.run import restore, run
from braggflux.pipelines.integration.trainer import Trainer
from braggflux.pipelines.workspace.rundir import RunDirectory

SCRIPT = Path(__file__).with_name("one_of_several.py")
SECONDS = 300


def start_processes(folder: Path, deadly_epoch: int, arguments: list[str], size: int = 2):
    """Start processes as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(deadly_epoch), *arguments],
            env=os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def test_every_row_belongs_to_one_process():
    for n in (0, 1, 2, 7, 512):
        shares = [Processes(rank, 3).share(n) for rank in range(3)]
        assert [row for s in shares for row in range(n)[s]] == list(range(n))
        assert range(n)[ALONE.share(n)] == range(n)


def test_one_process_adds_nothing_up():
    value, module = torch.ones(3), torch.nn.Linear(2, 2)
    with ALONE.joined(torch.device("cpu")):
        ALONE.add_up([value])
        ALONE.add_up_gradients(list(module.parameters()), [value])
        ALONE.copy_from_first(module)
        ALONE.wait()
    assert torch.equal(value, torch.ones(3))
    assert module.weight.grad is None
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_two_processes_end_where_one_does(straight, configure, tmp_path, monkeypatch):
    """One process, two from its checkpoint of which one is killed, then one again to the end."""
    write = EpochWriter.write

    def stops(self, result):
        outputs = write(self, result)
        if result.epoch == 1:
            raise_after.append(result.epoch)
        return outputs

    raise_after: list[int] = []
    out = tmp_path / "run"
    config = configure(out)
    with monkeypatch.context() as patch:
        run_epoch = Trainer.run_epoch
        patch.setattr(EpochWriter, "write", stops)

        def interrupted(self, progress=None):
            if raise_after:
                raise KeyboardInterrupt
            return run_epoch(self, progress)

        patch.setattr(Trainer, "run_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    with ShoeboxStore.open(out / "shoeboxes.h5") as store:
        alone = Trainer(build(store, config), config, torch.device("cpu"))
        restore(alone, out / "checkpoints/epoch_0001.pt")
        alone.run_epoch()

    arguments = ["run", "--config", str(out / "config.yaml"), "--resume"]
    started = start_processes(tmp_path, 3, arguments)
    said = [process.communicate(timeout=SECONDS) for process in started]
    assert started[1].returncode == -signal.SIGKILL
    assert started[0].returncode == 2, said[0]
    line = said[0][1].strip().splitlines()[-1]
    assert line.startswith("braggflux: error: another process of this run has ended"), said[0]
    assert "Traceback" not in said[0][1]
    assert "--resume" in line
    assert (out / "latest").read_text().strip() == "epoch_0002.pt"

    together = json.loads((tmp_path / "rank_0.json").read_text())["2"]
    # 2026-11-30: to 2e-8
    np.testing.assert_allclose(together, alone.step_elbos, rtol=1e-5)
    assert len(together) == alone.dataset.n_batches(config.training.batch_size)

    directory = run(config, resume=True)
    ours, theirs = (gemmi.read_mtz_file(str(d.merged)) for d in (directory, straight))
    for label in ("F", "SIGF", "F(+)", "DANO", "SIGDANO"):
        columns = (np.array(m.column_with_label(label)) for m in (ours, theirs))
        np.testing.assert_allclose(*columns, rtol=1e-3, atol=1e-3, err_msg=label)
    assert len(directory.read_provenance()["sessions"]) == 3


@pytest.mark.fresh_process
@pytest.mark.slow
def test_staged_coupling_by_two_processes(configure, tmp_path, monkeypatch):
    """The table goes through a file, which the first writes and all read."""
    elbos, amplitudes = [], []
    for n in (1, 2):
        out = tmp_path / str(n)
        few = {"training__epochs": 1, "training__merge_steps": 10, "extraction__d_min": 4.0}
        config = configure(out, training__coupling="staged", **few)
        run_epoch = Trainer.run_epoch

        def watched(self, progress=None, run_epoch=run_epoch, out=out):
            result = run_epoch(self, progress)
            steps = [*self.step_elbos, result.metrics["merge_elbo"]]
            (out / f"elbos_{self.processes.rank}.json").write_text(json.dumps(steps))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run_epoch", watched)
            in_ranks(n, lambda here, config=config: run(config))
        written = [json.loads(p.read_text()) for p in sorted(out.glob("elbos_*.json"))]
        assert len(written) == n
        elbos += written
        mtz = gemmi.read_mtz_file(str(out / "merged.mtz"))
        amplitudes.append([np.array(mtz.column_with_label(k)) for k in ("F", "SIGF", "DANO")])
    for other in elbos[1:]:
        np.testing.assert_allclose(other, elbos[0], rtol=1e-5)
    np.testing.assert_allclose(*amplitudes, rtol=1e-3, atol=1e-3)


@pytest.mark.fresh_process
@pytest.mark.slow
def test_a_signal_to_one_process_ends_all(configure, tmp_path, monkeypatch, capfd):
    config = configure(tmp_path / "run", training__merge_steps=5, extraction__d_min=5.0)
    run_epoch = Trainer.run_epoch

    def hit(self, progress=None):
        if self.processes.rank == 1 and self.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_epoch(self, progress)

    def work(here):
        found = cli.main(["run", "--config", str(tmp_path / "config.yaml")])
        (tmp_path / f"code_{here.rank}").write_text(str(found))

    (tmp_path / "config.yaml").write_text(schema.annotated_yaml(config))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", hit)
        in_ranks(2, work)
    assert [int((tmp_path / f"code_{rank}").read_text()) for rank in (0, 1)] == [2, 143]
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("braggflux: error:")]
    assert len(lines) == 2
    assert any("another process of this run has ended" in line for line in lines)
    assert any("give the same command with --resume" in line for line in lines)
    assert RunDirectory(config.out).latest_checkpoint().name == "epoch_0001.pt"


def test_process_is_one_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["process", "x_master.h5", "--out", str(tmp_path / "run")]) == 2
    assert "torchrun started 2 processes" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_without_the_others_it_ends_in_one_line(monkeypatch):
    """Nobody listens where the first process should: not a traceback."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port)), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=2))
    here = Processes.of_environment()
    assert (here.rank, here.size, here.is_first, here.is_alone) == (1, 2, False, False)
    with (
        pytest.raises(UserError, match="another process of this run has ended"),
        here.joined(torch.device("cpu")),
    ):
        pass
