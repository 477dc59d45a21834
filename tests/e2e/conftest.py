"""One small simulation, and one run on it, for all tests of this folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from braggflux.fixtures.simulate import SimulatedFiles, simulate
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.config.schema import updated
from braggflux.pipelines.dials.process import finish
from braggflux.pipelines.integration.run import run
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.rundir import RunDirectory

EPOCHS = 3


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Small problems gain nothing from more threads; the machine may have other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    log.detach_files()
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimulatedFiles:
    return simulate(tmp_path_factory.mktemp("tiny"), preset="tiny", seed=0)


@pytest.fixture(scope="session")
def configure(tiny):
    """Make a configuration for the simulated frames, from dotted options."""

    def make(out: Path, **options: object) -> RunConfig:
        config = RunConfig(expt=tiny.expt, refl=tiny.refl, model=tiny.model, out=out)
        short = {"training.epochs": EPOCHS, "training.batch_size": 512, "training.device": "cpu"}
        given = {key.replace("__", "."): value for key, value in options.items()}
        return updated(config, short | given)

    return make


@pytest.fixture(scope="session")
def straight(configure, tmp_path_factory) -> RunDirectory:
    """Run without interruption, to the report."""
    log.configure()
    directory = finish(run(configure(tmp_path_factory.mktemp("runs") / "straight")))
    log.detach_files()
    logging.captureWarnings(False)
    return directory


@pytest.fixture(scope="session")
def rs():
    """Give reciprocalspaceship; its pandas complains of the system's bottleneck on import."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Pandas requires", UserWarning)
        import reciprocalspaceship
    return reciprocalspaceship
