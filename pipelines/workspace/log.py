"""Logging and progress: rich on a terminal, plain lines in a queue, everything in ``run.log``.

Libraries call ``logging.getLogger(__name__)``; only the command line calls :func:`configure`.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from braggflux.integrator.processes import Processes

PACKAGE = "braggflux"
#: Name of the handlers that :func:`configure` sets.
_TERMINAL = "braggflux-terminal"
_FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_PLAIN_FORMAT = "%(asctime)s %(message)s"
#: A queue's log gets a progress line at most this often, and at most every tenth of the way.
PLAIN_INTERVAL_S = 30.0
#: Another program that takes longer than this may have a reason that the user can mend.
HINT_AFTER_S = 60.0

logger = logging.getLogger(__name__)


def configure(*, verbose: bool = False) -> None:
    """Send the messages of our packages to stderr; other packages only from WARNING up."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h.name == _TERMINAL]:
        root.removeHandler(handler)
    for handler in (_terminal_handler(), _Early()):
        handler.set_name(_TERMINAL)
        root.addHandler(handler)
    logging.captureWarnings(True)
    logging.getLogger(PACKAGE).setLevel(logging.DEBUG if verbose else logging.INFO)


def attach_file(path: Path) -> None:
    """Append messages to ``path`` too; attaching the same file again changes nothing.

    The first file gets what was said before it, while inputs were read and checked.
    """
    root = logging.getLogger()
    target = str(path.absolute())
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        if handler.baseFilename == target:
            return
    handler = _LogFile(target, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FILE_FORMAT))
    for early in [h for h in root.handlers if isinstance(h, _Early)]:
        for record in early.records:
            handler.handle(record)
        root.removeHandler(early)
    root.addHandler(handler)


def leave_to_first(processes: Processes) -> None:
    """Of several processes, let the first one alone say what is no error."""
    if not processes.is_first:
        logging.getLogger(PACKAGE).setLevel(logging.ERROR)


def detach_files() -> None:
    """Close every log file attached by :func:`attach_file`."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _LogFile)]:
        root.removeHandler(handler)
        with suppress(OSError):  # said before
            handler.close()


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of some work: yields a function to call with (done, total).

    Shows a bar on stderr when that is a terminal, otherwise a log line every tenth of the way but
    at most every :data:`PLAIN_INTERVAL_S`.
    """
    if sys.stderr.isatty():
        with _rich_bar(description) as advance:
            yield advance
    else:
        yield _PlainProgress(description)


@contextmanager
def running(description: str, where: Path, hint: str = "") -> Iterator[None]:
    """Show that another program is at work: its time on a terminal, now and then a line elsewhere.

    Parameters
    ----------
    description : str
        Name of the program.
    where : Path
        Its log.
    hint : str
        Said once, when it has taken longer than :data:`HINT_AFTER_S`.
    """
    began, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        wait = PLAIN_INTERVAL_S
        has_hinted = not hint
        while not ended.wait(wait):
            seconds = time.monotonic() - began
            if not sys.stderr.isatty():
                logger.info("%s: running for %.0f s, log %s", description, seconds, where)
            if seconds >= HINT_AFTER_S and not has_hinted:
                logger.warning("%s: %s; its log: %s", description, hint, where)
                has_hinted = True
            wait = max(PLAIN_INTERVAL_S, seconds)  # twice as long every time

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with _rich_clock(description, where) if sys.stderr.isatty() else nullcontext():
            yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _rich_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    with Progress(console=_console(), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _rich_clock(description: str, where: Path) -> Iterator[None]:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_console(), transient=True) as bar:
        bar.add_task(f"{description} (log: {where})", total=None)
        yield


@cache
def _console() -> Console:
    """One for messages and bars: a bar moves down for the message of another of its console."""
    from rich.console import Console

    return Console(stderr=True)


class _LogFile(logging.FileHandler):
    """A log whose disk may be full: the terminal is told once, and the work goes on."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say what a message could not be written for."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            sys.stderr.write(
                f"braggflux: warning: cannot write {self.baseFilename}: "
                f"{error.strerror or error}; messages stand here alone until there is room\n"
            )


class _Early(logging.Handler):
    """Records of messages before there is a file to write them to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.records.append(record)


class _PlainProgress:
    """Sparse log lines."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._time, self._tenth = time.monotonic(), 0

    def __call__(self, done: int, total: int) -> None:
        now, tenth = time.monotonic(), 10 * done // max(total, 1)
        if tenth > self._tenth and now - self._time >= PLAIN_INTERVAL_S:
            logger.info("%s: %d of %d", self._description, done, total)
            self._time, self._tenth = now, tenth


def _terminal_handler() -> logging.Handler:
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        return RichHandler(
            console=_console(),
            show_path=False,
            markup=False,
            highlighter=None,
            log_time_format="%H:%M:%S",
            omit_repeated_times=False,
        )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_PLAIN_FORMAT, datefmt="%H:%M:%S"))
    return handler
