"""Rebuild report.html of a run directory from its tables.

Needs no model and no frames: everything is drawn from metrics.jsonl, peaks.csv, statistics.csv,
compare.csv and the sample shoeboxes.

Examples
--------
braggflux report run
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run directory."""
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR")


def run(args: argparse.Namespace) -> None:
    """Write report.html."""
    from braggflux.pipelines.report.html import write_report
    from braggflux.pipelines.workspace.rundir import RunDirectory

    logger.info("wrote %s", write_report(RunDirectory.open(args.run_directory)))
