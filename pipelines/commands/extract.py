"""Cut the shoebox of every reflection out of the frames.

One pass over the frames named in EXPT. With refined.refl the full set of reflections is predicted;
an integrated or predicted table is taken as it is. The store (HDF5) describes itself.

Examples
--------
braggflux extract refined.expt refined.refl --out shoeboxes.h5
braggflux extract refined.expt refined.refl --out shoeboxes.h5 --d-min 2.0 --box 7,21,21
braggflux extract refined.expt refined.refl --out shoeboxes.h5 --processes 8
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path

from braggflux.pipelines.config.flags import add_config_arguments, config_from_args
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.runtime import importing

FLAGS = {
    "--d-min": "extraction.d_min",
    "--box": "extraction.box",
    "--n-sigma": "extraction.n_sigma",
    "--processes": "extraction.processes",
}
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the files and the options of the boxes."""
    parser.add_argument("expt", type=Path, metavar="EXPT", help="DIALS experiments")
    parser.add_argument("refl", type=Path, metavar="REFL", help="DIALS reflections")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.h5", help="store to write"
    )
    add_config_arguments(parser, FLAGS)


def run(args: argparse.Namespace) -> None:
    """Check the input and extract."""
    fixed = {"expt": str(args.expt), "refl": str(args.refl)}
    config = config_from_args(RunConfig, args, FLAGS, fixed)
    expt, refl = config.require("expt", "refl")

    with importing():
        import torch

        from braggflux.integrator.processes import Processes
        from braggflux.pipelines.integration.checks import check_pair
        from braggflux.pipelines.integration.extraction import extract
        from braggflux.pipelines.workspace.lock import one_writer_of_file
        from braggflux.pipelines.workspace.outputs import require_free_file

    require_free_file(args.out)
    check_pair(expt, refl)
    processes = Processes.of_environment()
    log.leave_to_first(processes)
    alone = one_writer_of_file(args.out) if processes.is_first else contextlib.nullcontext()
    with alone, processes.joined(torch.device("cpu")):
        extract(config, args.out, processes)
    logger.info("wrote %s", args.out)
