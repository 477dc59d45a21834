"""``braggflux``: from detector photon counts to merged structure-factor amplitudes.

Examples
--------
Raw images to a merged MTZ and a table of anomalous peaks, beside DIALS::

    braggflux process master.h5 --model model.pdb --space-group P43212 --out run

From the refined geometry of a DIALS project::

    braggflux run refined.expt refined.refl --model model.pdb --out run

``braggflux COMMAND --help`` explains a command with examples.

Everything is read and written on this machine: nothing is ever uploaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from braggflux.integrator.atomic import FULL, why_not_written
from braggflux.integrator.errors import UserError, brief
from braggflux.integrator.memory import limit_memory
from braggflux.pipelines.config import schema
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.provenance import package_version
from braggflux.pipelines.workspace.runtime import tune_process

#: Explicit, so that `--help` needs no search of the file system; in the order of a user's day.
COMMANDS = (
    "process",
    "run",
    "merge",
    "convert",
    "extract",
    "peaks",
    "compare",
    "report",
    "view",
    "simulate",
    "config",
)
EXIT_USER_ERROR = 2
#: What torch says, whose error is of no kind of its own on the CPU.
_NO_MEMORY = r"can't allocate memory|out of memory"
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143

logger = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """SIGTERM, of a queue or of ``torchrun``: what Ctrl-C cleans up, this does too."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a block as Ctrl-C does, unless the caller has a use for it."""
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_it(number: int, frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, raise_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Parser(argparse.ArgumentParser):
    """Errors in the one-line form of every other user error."""

    def error(self, message: str) -> NoReturn:
        """Report wrong arguments."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = _Parser(
        prog="braggflux",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"braggflux {package_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"braggflux.pipelines.commands.{name}")
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").partition("\n")[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("-v", "--verbose", action="store_true", help="more messages")
        command.add_argument(
            "--max-memory",
            type=float,
            metavar="GB",
            help="end in one line rather than take more memory [a number; default all there is]",
        )
        module.add_arguments(command)
        flags = re.findall(r"--[a-z][a-z-]*", command.format_usage())
        command.set_defaults(run=module.run, flags=flags)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and send the user with an unknown flag to the help of the command that was given."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        if args.command is None:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see `braggflux --help`")
        raise UserError(
            f"unrecognized arguments: {' '.join(unknown)}; see `braggflux {args.command} --help`"
            f"{schema.did_you_mean(word, args.flags) if word.startswith('--') else ''}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    Returns
    -------
    int
        0 on success, 2 for a mistake of the user (one line on stderr), 130 after Ctrl-C, 143
        after SIGTERM.
    """
    try:
        tune_process()
        parser = build_parser()
        args = _parse(parser, argv)
        if args.command is None:
            parser.print_help()
            return 0
        log.configure(verbose=args.verbose)
        if args.max_memory is not None:
            limit_memory(args.max_memory)
        with _terminable():
            args.run(args)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader (e.g. `head`) has left; the interpreter must not complain while it closes.
        _print_no_more()
        return 0
    except OSError as error:
        return _fail(_of_system(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(_NO_MEMORY, str(error)):
            raise
        return _fail(
            f"out of memory ({brief(error)}); end other programs, take a smaller "
            "--set training.batch_size= (run) or --set stream_above= (merge), or another machine"
        )
    except KeyboardInterrupt as error:
        is_terminated = isinstance(error, Terminated)
        what = "terminated" if is_terminated else "interrupted"
        _fail(f"{what}; give the same command with --resume to go on (run, process)")
        return EXIT_TERMINATED if is_terminated else EXIT_INTERRUPTED
    finally:
        log.detach_files()
    return 0


def _of_system(error: OSError) -> str:
    """Say what the operating system has refused, with the remedy."""
    if error.filename is not None:
        if error.errno in FULL:
            return f"cannot write {error.filename}: {why_not_written(error, error.filename)}"
        return f"{error.filename}: {error.strerror}; check the path, space and permissions"
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        return (
            f"cannot print or write: {error.strerror or error}; check free space and permissions"
        )
    _print_no_more()
    return f"cannot print: {error.strerror or error}; make room where the output goes"


def _print_no_more() -> None:
    """Let nothing be printed, so that the interpreter does not complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    line = " ".join(message.split())
    logger.debug("failed", exc_info=True)
    for handler in logging.getLogger().handlers:
        # run.log must say why the run ended; the terminal gets the line below only.
        if isinstance(handler, logging.FileHandler):
            record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, line, None, None)
            handler.handle(record)
    sys.stderr.write(f"braggflux: error: {line}\n")
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
