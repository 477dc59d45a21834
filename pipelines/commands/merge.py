r"""Merge unmerged reflections of any program: rotation, Laue, stills.

INPUT is an unmerged MTZ, a DIALS .refl with its .expt, a CrystFEL .stream, or a store of stills
(.h5). Every file is a dataset of its own, and all are merged on one scale. Writes DIR/merged.mtz,
for several datasets DIR/<input stem>_merged.mtz, with statistics by resolution shell, the
held-out predictions (metrics.json) and the scale model.

Examples
--------
braggflux merge scaled.mtz --out merged --anomalous
braggflux merge off.mtz 2ms.mtz --laue --parents none,0 --prior double-wilson --out pyp
braggflux merge plus.mtz minus.mtz --friedel --stills --out xfel
braggflux merge new.stream --stills --space-group P6122 --freeze-scales xfel --out new
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from integrator.errors import UserError
from merge.intensities.config import IntensityMergeConfig
from pipelines.flags import MERGE_FLAGS, add_config_arguments, config_from_args

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the files, their relations and the options of the model."""
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--parents",
        metavar="none,0",
        help="dataset that each dataset resembles, by its number from 0, or none",
    )
    parser.add_argument(
        "--friedel",
        action="store_true",
        help="the two inputs are the Friedel halves of one dataset; sets --anomalous",
    )
    parser.add_argument(
        "--space-group", metavar="SG", help="for files that hold none (.stream), e.g. P6122"
    )
    parser.add_argument(
        "--freeze-scales",
        type=Path,
        metavar="DIR",
        help="scale and error model of an earlier merge (its folder or scale_model.pt); only "
        "amplitudes are fitted",
    )
    add_config_arguments(parser, MERGE_FLAGS, IntensityMergeConfig)


def run(args: argparse.Namespace) -> None:
    """Check the arguments and merge."""
    fixed = {"anomalous": True} if args.friedel else None
    config = config_from_args(args, MERGE_FLAGS, fixed, IntensityMergeConfig)
    if args.friedel and args.parents:
        raise UserError("--friedel makes one dataset of two files; leave --parents out")

    from pipelines.merging import MergeInputs, merge, parse_parents

    inputs = MergeInputs(
        tuple(args.inputs),
        args.out,
        parse_parents(args.parents),
        args.friedel,
        args.space_group,
        args.freeze_scales,
    )
    for path in merge(inputs, config):
        logger.info("wrote %s", path)
