"""Logging and progress: rich on a terminal, plain lines in a queue, everything in ``run.log``.

Libraries call ``logging.getLogger(__name__)``; only the command line calls :func:`configure`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = ("integrator", "merge", "pipelines", "fixtures")
_FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_PLAIN_FORMAT = "%(asctime)s %(message)s"
#: A queue's log gets a progress line at most this often, and at most every tenth of the way.
PLAIN_INTERVAL_S = 30.0

logger = logging.getLogger(__name__)


def configure(*, verbose: bool = False) -> None:
    """Send the messages of our packages to stderr; other packages only from WARNING up."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "is_terminal_of_braggflux", False)]:
        root.removeHandler(handler)
    handler = _terminal_handler()
    handler.is_terminal_of_braggflux = True
    root.addHandler(handler)
    logging.captureWarnings(True)
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


def attach_file(path: Path) -> None:
    """Append messages to ``path`` too; attaching the same file again changes nothing."""
    root = logging.getLogger()
    target = str(path.absolute())
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        if handler.baseFilename == target:
            return
    handler = logging.FileHandler(target, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FILE_FORMAT))
    root.addHandler(handler)


def detach_files() -> None:
    """Close every log file attached by :func:`attach_file`."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h) is logging.FileHandler]:
        root.removeHandler(handler)
        handler.close()


def progress(
    items: Iterable, description: str, total: int | None = None, *, interval: float | None = None
) -> Iterator:
    """Iterate over ``items`` and show how far it is.

    A bar on stderr when that is a terminal, otherwise a log line every tenth of the way but not
    more often than every ``interval`` seconds (default :data:`PLAIN_INTERVAL_S`).
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if sys.stderr.isatty():
        yield from _rich_bar(items, description, total)
    else:
        yield from _plain_lines(
            items, description, total, PLAIN_INTERVAL_S if interval is None else interval
        )


def _rich_bar(items: Iterable, description: str, total: int | None) -> Iterator:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description, total=total, console=console, transient=True)


def _plain_lines(
    items: Iterable, description: str, total: int | None, interval: float
) -> Iterator:
    last_time, last_tenth = time.monotonic(), 0
    for done, item in enumerate(items, start=1):
        yield item
        now, tenth = time.monotonic(), 10 * done // total if total else done
        if tenth > last_tenth and now - last_time >= interval:
            suffix = f" of {total}" if total else ""
            logger.info("%s: %d%s", description, done, suffix)
            last_time, last_tenth = now, tenth


def _terminal_handler() -> logging.Handler:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(
            console=Console(stderr=True),
            show_path=False,
            markup=False,
            highlighter=None,
            log_time_format="%H:%M:%S",
            omit_repeated_times=False,
        )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_PLAIN_FORMAT, datefmt="%H:%M:%S"))
    return handler
