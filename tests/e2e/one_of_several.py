"""One of the processes of a run: writes the ELBO of every step, or dies when told to.

one_of_several.py FOLDER DEADLY_EPOCH ARGUMENTS...: the command line of braggflux with ARGUMENTS;
``FOLDER/rank_0.json`` gets the ELBOs by epoch; the process of rank 1 kills itself at the epoch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from braggflux.pipelines import cli
from braggflux.pipelines.integration.trainer import Trainer

folder, deadly_epoch, rank = Path(sys.argv[1]), int(sys.argv[2]), int(os.environ["RANK"])
torch.set_num_threads(1)
elbos: dict[int, list[float]] = {}
run_epoch = Trainer.run_epoch


def watched(self, progress=None):
    if self.epoch + 1 == deadly_epoch and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    result = run_epoch(self, progress)
    elbos[self.epoch] = self.step_elbos
    (folder / f"rank_{rank}.json").write_text(json.dumps(elbos))
    return result


Trainer.run_epoch = watched
sys.exit(cli.main(sys.argv[3:]))
