"""Processes as ``torchrun`` starts them, forked: they need not import everything anew."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from braggflux.integrator.processes import Processes
from braggflux.integrator.workers import run_workers


def in_ranks(n: int, work: Callable[[Processes], None]) -> None:
    """Call ``work`` in each of ``n`` processes that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def forked(rank: int, tick: Callable[[], None]) -> None:
        where = {"RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in where.items()})
        work(Processes.of_environment())

    run_workers(n, forked, lambda: None)
