"""Rebuild report.html, Table 1 and mmCIF of a run or a merge from its files.

Needs no frames: everything is drawn from what the directory holds. A merge does not know a model
or DIALS' result: with --model its maps are drawn, with --reference DIALS stands beside it.

Examples
--------
braggflux report run
braggflux report merged --model model.pdb --reference dials/merged.mtz
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the directory and what a merge may stand beside."""
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--model", type=Path, metavar="PDB", help="of a merge: model for anomalous maps"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="MTZ",
        help="of a merge: merged MTZ of DIALS; scaled.refl beside it is used too",
    )


def run(args: argparse.Namespace) -> None:
    """Write report.html, table1.* and deposition.cif."""
    from braggflux.pipelines.deposition.files import write_deposition
    from braggflux.pipelines.report.html import write_report_of
    from braggflux.pipelines.workspace.file_sums import tell_changed

    tell_changed([args.reference])
    _tidy(args.run_directory)
    page = write_report_of(args.run_directory, args.model, args.reference)
    for path in [page, *write_deposition(args.run_directory, args.reference)]:
        logger.info("wrote %s", path)


def _tidy(folder: Path) -> None:
    """Complete and remove what a killed command has left, unless another is at work there."""
    from braggflux.integrator.atomic import remove_leftovers
    from braggflux.integrator.errors import UserError
    from braggflux.pipelines.workspace.lock import one_writer
    from braggflux.pipelines.workspace.outputs import complete_merge

    if folder.is_dir():
        with contextlib.suppress(UserError, OSError), one_writer(folder):
            remove_leftovers(folder)
            complete_merge(folder)
