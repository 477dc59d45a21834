"""One small simulation for the tests of inputs."""

from __future__ import annotations

import pytest

from braggflux.fixtures.simulate import SimulatedFiles, simulate


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimulatedFiles:
    return simulate(tmp_path_factory.mktemp("tiny"), preset="tiny", seed=0)
