"""Command line of a merge: the files, and how they belong together."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from braggflux.integrator.errors import UserError

if TYPE_CHECKING:
    from braggflux.pipelines.inputs.inputs import MergeInputs

logger = logging.getLogger(__name__)


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the files and their relations."""
    text = ".mtz .refl+.expt .HKL .sca .cif .stream .h5"
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=text)
    add = parser.add_argument_group("inputs, and how they belong together").add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    text = (
        "dataset that each dataset resembles, by its number from 0, or none; sets the "
        "double-Wilson prior and, unless given, sigma=difference"
    )
    add("--parents", metavar="none,0", help=text)
    text = "the two inputs are the Friedel halves of one dataset; sets --anomalous"
    add("--friedel", action="store_true", help=text)
    text = "instead of that of the files, which some (.stream) do not hold, e.g. P6122"
    add("--space-group", metavar="SG", help=text)
    text = "for files that hold none (.sca), e.g. 79.4,79.4,37.8,90,90,90"
    add("--unit-cell", metavar="A,B,C,AL,BE,GA", help=text)
    text = (
        "new indices of dataset N (from 0; of all without) by the old, e.g. 1:k,h,-l; repeatable"
    )
    add("--reindex", action="append", default=[], metavar="[N:]OP", help=text)
    text = (
        "datasets that are one, like 0,1 or all: sweeps of one crystal form at one wavelength, "
        "each on its own scale; repeatable. Numbers are those before, from 0; --reindex comes "
        "first, and --friedel and --parents count the groups"
    )
    add("--group", action="append", default=[], metavar="0,1|all", help=text)
    text = (
        "structure (.pdb, .cif) or merged amplitudes (.mtz) that the data resemble: its |F_calc| "
        "becomes the prior, as far as the data say that it fits"
    )
    add("--prior-model", type=Path, metavar="MODEL", help=text)
    # of `run` and `process`, --reference is what results are compared with
    add("--reference", type=Path, metavar="MODEL", help="old name of --prior-model")
    text = "earlier merge (its folder or scale_model.pt) whose scales and error model are used"
    add("--freeze-scales", type=Path, metavar="DIR", help=text)


def inputs_from_args(args: argparse.Namespace) -> MergeInputs:
    """Check the relations and bundle them.

    Raises
    ------
    UserError
        They contradict each other, or cannot be read.
    """
    if args.friedel and args.parents:
        raise UserError("--friedel makes one dataset of two files; leave --parents out")
    if args.reference is not None:
        if args.prior_model is not None:
            raise UserError("--reference is the old name of --prior-model; give one of them")
        logger.warning(
            "--reference of merge is now --prior-model and will go with the next version; nothing "
            "is compared here: for that see `braggflux compare`"
        )
    # not at the top: `--help` does without torch
    from braggflux.merge.rows import parse_parents
    from braggflux.pipelines.inputs.grouping import parse_groups
    from braggflux.pipelines.inputs.inputs import MergeInputs

    return MergeInputs(
        tuple(args.inputs),
        args.out,
        parents=parse_parents(args.parents),
        is_friedel=args.friedel,
        space_group=args.space_group,
        unit_cell=args.unit_cell,
        reindex=tuple(args.reindex),
        groups=parse_groups(args.group),
        prior_model=args.prior_model or args.reference,
        freeze_scales=args.freeze_scales,
    )
