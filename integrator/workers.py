"""Worker processes on this machine: forked, watched, and never left behind.

A fork has all that its parent has prepared, without starting the program anew. What is forked does
no more than it is given, tells its parent of every step, and ends when nobody listens.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

from braggflux.integrator.errors import UserError

Work = Callable[[int, Callable[[], None]], None]

STEP, USER_ERROR, NO_MEMORY = b".", b"!", b"m"


def run_workers(n: int, work: Work, tick: Callable[[], None]) -> None:
    """Do some work in ``n`` processes, and wait for all of them.

    Parameters
    ----------
    n : int
    work : callable
        Called in each process with its number, from 0 on, and a function to call after each step;
        what it returns is lost.
    tick : callable
        Called here after each step of any of them.

    Raises
    ------
    UserError, MemoryError
        As a worker has raised it, or a worker was killed.
    RuntimeError
        A worker has failed. The others are ended in any case.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(n)]
    workers = [context.Process(target=_work, args=(work, k, pipes)) for k in range(n)]
    try:
        with warnings.catch_warnings():  # of threads here, which no worker waits for
            warnings.simplefilter("ignore", DeprecationWarning)
            for worker in workers:
                worker.start()
        for _, sender in pipes:
            sender.close()  # else the end of a worker is not seen
        _listen([receiver for receiver, _ in pipes], workers, tick)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
        for receiver, _ in pipes:
            receiver.close()


def _listen(
    receivers: Sequence[Connection], workers: Sequence[ForkProcess], tick: Callable[[], None]
) -> None:
    waiting = dict(zip(receivers, workers, strict=True))
    while waiting:
        ready = wait(list(waiting))
        for receiver in [r for r in waiting if r in ready]:
            try:
                message = receiver.recv_bytes()
            except EOFError:
                worker = waiting.pop(receiver)
                worker.join()
                _check_end(worker.exitcode or 0)
                continue
            kind, text = message[:1], message[1:].decode()
            if kind == STEP:
                tick()
            elif kind == USER_ERROR:
                raise UserError(text)
            else:
                raise MemoryError(text)


def _check_end(exit_code: int) -> None:
    if exit_code > 0:
        raise RuntimeError("a worker process failed; its traceback is above")
    if exit_code < 0:
        raise UserError(
            f"a worker process was killed (signal {-exit_code}), often for want of memory; end "
            "other programs, or give fewer --processes"
        )


def _work(work: Work, number: int, pipes: Sequence[tuple[Connection, Connection]]) -> None:
    """Work, and tell the parent."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # those of a pool are lost by a fork
    for k, (receiver, sender) in enumerate(pipes):
        receiver.close()  # so that a message to a dead parent fails
        if k != number:
            sender.close()
    sender = pipes[number][1]
    try:
        work(number, lambda: sender.send_bytes(STEP))
        return
    except BrokenPipeError:
        os._exit(1)
    except UserError as error:
        message = USER_ERROR + str(error).encode()
    except MemoryError as error:
        message = NO_MEMORY + str(error).encode()
    sender.send_bytes(message)
