r"""Merge unmerged reflections of any program: rotation, Laue, stills.

INPUT is an unmerged MTZ, a DIALS .refl with its .expt, a CrystFEL .stream, a store (.h5, see
`braggflux convert`), or the photon counts of a staged run (RUN/intensities.h5). Every file is a
dataset of its own, and all are merged on one scale. Writes DIR/merged.mtz, for several datasets
DIR/<input stem>_merged.mtz, with statistics by resolution shell, the held-out predictions
(metrics.json), the scale model and, where stills can be indexed in several ways, indexing.csv.

Examples
--------
braggflux merge scaled.mtz --out merged --anomalous
braggflux merge off.mtz 2ms.mtz --laue --parents none,0 --prior double-wilson --out pyp
braggflux merge plus.mtz minus.mtz --friedel --stills --out xfel
braggflux merge weak.mtz --reference model.pdb --out merged
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
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help=".mtz .refl+.expt .stream .h5")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    text = "dataset that each dataset resembles, by its number from 0, or none"
    add("--parents", metavar="none,0", help=text)
    text = "the two inputs are the Friedel halves of one dataset; sets --anomalous"
    add("--friedel", action="store_true", help=text)
    text = "for files that hold none (.stream), e.g. P6122"
    add("--space-group", metavar="SG", help=text)
    text = (
        "new indices of dataset N (from 0; of all without) by the old, e.g. 1:k,h,-l; repeatable"
    )
    add("--reindex", action="append", default=[], metavar="[N:]OP", help=text)
    text = (
        "structure (.pdb, .cif) or merged amplitudes (.mtz) that the data resemble: its |F_calc| "
        "becomes the prior, as far as the data say that it fits"
    )
    add("--reference", type=Path, metavar="MODEL", help=text)
    text = "earlier merge (its folder or scale_model.pt) whose scales and error model are used"
    add("--freeze-scales", type=Path, metavar="DIR", help=text)
    add_config_arguments(parser, MERGE_FLAGS, IntensityMergeConfig, "network_width=64")


def run(args: argparse.Namespace) -> None:
    """Check the arguments and merge."""
    fixed = {"anomalous": True} if args.friedel else None
    config = config_from_args(args, MERGE_FLAGS, fixed, IntensityMergeConfig)
    if args.friedel and args.parents:
        raise UserError("--friedel makes one dataset of two files; leave --parents out")

    from pipelines.merge_inputs import MergeInputs, parse_parents
    from pipelines.merging import merge

    inputs = MergeInputs(
        tuple(args.inputs),
        args.out,
        parents=parse_parents(args.parents),
        is_friedel=args.friedel,
        space_group=args.space_group,
        reindex=tuple(args.reindex),
        reference=args.reference,
        freeze_scales=args.freeze_scales,
    )
    for path in merge(inputs, config):
        logger.info("wrote %s", path)
