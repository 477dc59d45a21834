"""Raw HDF5 frames of a known crystal, with their truth.

Writes an NXmx master with its data files as a detector does, the true geometry as DIALS files, the
true photons of every observation (truth.npz), the true F(+) and F(-) (MTZ) and the model.

Examples
--------
braggflux simulate --out demo/frames
braggflux simulate --out small --preset tiny --seed 3
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder, preset and seed."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write to"
    )
    parser.add_argument(
        "--preset",
        default="hewl-iodide",
        help="hewl-iodide (the demo), or tiny or multipanel (seconds) [hewl-iodide]",
    )
    parser.add_argument("--seed", default="0", help="same seed, same frames [0]")


def run(args: argparse.Namespace) -> None:
    """Simulate."""
    from fixtures.simulate import simulate
    from pipelines import log, schema

    seed = schema.coerce(args.seed, int, "--seed")
    with log.progress("frames") as advance:
        files = simulate(args.out, preset=args.preset, seed=seed, progress=advance)
    logger.info("frames: %s", files.master)
    logger.info("model: %s", files.model)
