"""Damaged files, one after the other, read in a process that may die.

A case is a number: it seeds what is damaged and how. The process tells what became of each; when
it ends or is silent for too long, the case that it had begun is the culprit, and another process
goes on with the next.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import resource
import signal
import time
import traceback
import warnings
import zlib
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from edits import Edit
from readers import Reader

from braggflux.integrator.errors import UserError

CPU_S = 30.0
"""Of one case; more is a hang."""
SILENCE_S = 120.0
"""Without a word of the process. Long, since other programs may be running."""
MEMORY_BYTES = 2 << 30
"""That a reader of a file of some kilobytes may take beside what the process has."""
GOOD = ("read", "refused")
BAD = ("traceback", "impossible", "memory", "hang", "killed")


class Outcome(NamedTuple):
    """What became of a case.

    Parameters
    ----------
    case : int
        -1 where the edits were given.
    kind : str
        One of :data:`GOOD` and :data:`BAD`.
    detail : str
        Message, or place of the fault.
    edits : list
    cpu_s : float
        That reading took.
    """

    case: int
    kind: str
    detail: str
    edits: list[Edit]
    cpu_s: float = 0.0

    @property
    def fault(self) -> str:
        """What cases of one fault have in common."""
        first = self.detail.splitlines()[0] if self.detail else ""
        if self.kind == "impossible":
            first = re.split(r"[\d\[]", first)[0]
        return f"{self.kind}: {first[:120]}"


torch.set_num_threads(1)  # those of a pool are lost by a fork


def run_cases(reader: Reader, cases: Iterable[int]) -> Iterator[Outcome]:
    """Damage and read, in a process of its own."""
    yield from _supervised(reader, [(case, None) for case in cases])


def run_edits(reader: Reader, given: Iterable[list[Edit]]) -> Iterator[Outcome]:
    """Apply edits of regression files, and read."""
    yield from _supervised(reader, [(k, edits) for k, edits in enumerate(given)])


def edits_of(reader: Reader, case: int) -> list[Edit]:
    """Make up the edits of a case."""
    rng = np.random.default_rng([zlib.crc32(reader.name.encode()), case])
    return reader.edits(rng)


def _supervised(reader: Reader, todo: list[tuple[int, list[Edit] | None]]) -> Iterator[Outcome]:
    context = multiprocessing.get_context("fork")
    reader.prepare()  # before the fork: what it makes serves all processes
    next_up = 0
    while next_up < len(todo):
        mine, theirs = context.Pipe(duplex=False)
        with TemporaryDirectory() as folder:
            process = context.Process(
                target=_work, args=(reader, todo[next_up:], Path(folder), theirs), daemon=True
            )
            process.start()
            theirs.close()
            kind = "killed"
            while next_up < len(todo):
                try:
                    if not mine.poll(SILENCE_S):
                        kind = "hang"
                        break
                    outcome = mine.recv()
                except EOFError:
                    break
                yield outcome
                next_up += 1
            process.kill()
            process.join()
            mine.close()
        if next_up < len(todo):
            case, given = todo[next_up]
            edits = edits_of(reader, case) if given is None else given
            yield Outcome(case, kind, f"exit code {process.exitcode}", edits)
            next_up += 1


def _work(
    reader: Reader, todo: list[tuple[int, list[Edit] | None]], folder: Path, pipe: Connection
) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for case, given in todo:
        edits = edits_of(reader, case) if given is None else given
        paths = reader.write(edits, folder)
        began = time.process_time()
        kind, detail = _outcome(reader, paths)
        pipe.send(Outcome(case, kind, detail, edits, time.process_time() - began))


def _outcome(reader: Reader, paths: list[Path]) -> tuple[str, str]:
    """What the reader makes of one damaged file; the boundary of the command line is UserError."""
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        wrong = reader.read(paths)
    except UserError as error:
        return "refused", " ".join(str(error).split())
    except MemoryError as error:
        return "memory", _place(error)
    except TooLong as error:
        return "hang", _place(error)
    except Exception as error:  # noqa: BLE001 - a traceback to the user, whatever its kind
        return "traceback", _place(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return ("impossible", "; ".join(wrong[:3])) if wrong else ("read", "")


class TooLong(BaseException):
    """Of the clock; no reader may take it for what a file has."""


def _too_long(*_: object) -> None:
    raise TooLong


def _place(error: BaseException) -> str:
    """Kind of the error and the last line of this program that it went through."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/.src/" in f.filename
        or "braggflux" in f.filename
        or "/merge/" in f.filename
        or "/integrator/" in f.filename
    ]
    frames = [f for f in frames if "site-packages" not in f.filename] or traceback.extract_tb(
        error.__traceback__
    )
    last = frames[-1]
    message = " ".join(str(error).split())[:90]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.name}\n{message}"
