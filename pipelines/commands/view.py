"""Look at a finished run in a browser: frames, reflections, maps around the sites.

The pages come from this machine alone: the server listens on 127.0.0.1, answers no other host
name, and reads nothing but the files of the run. Ctrl-C ends it.

Examples
--------
braggflux view run
braggflux view run --port 8800 --no-browser
braggflux view run --dials integrated.refl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from braggflux.pipelines.config import schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run directory and the port."""
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR")
    parser.add_argument("--port", metavar="N", help="port on 127.0.0.1; 0: a free one [8750]")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    parser.add_argument(
        "--dials",
        type=Path,
        metavar="integrated.refl",
        help="DIALS' integrated or scaled reflections of the same frames [those of the run]",
    )


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    port = schema.coerce(args.port or 8750, int, "--port")

    from braggflux.pipelines.view.server import serve

    serve(args.run_directory, port=port, dials=args.dials, open_browser=not args.no_browser)
