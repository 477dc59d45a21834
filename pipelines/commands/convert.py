r"""Write unmerged reflections to a store (.h5) that `merge --stills` can read batch by batch.

INPUT is an unmerged MTZ file or a CrystFEL stream of any size: memory does not depend on it. Other
formats of `braggflux merge` are read as a whole.

Examples
--------
braggflux convert all.stream --space-group P6122 --out all.h5
braggflux merge all.h5 --stills --out merged
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from braggflux.integrator.errors import UserError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the files."""
    parser.add_argument("input", type=Path, metavar="INPUT", help="unmerged reflections")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.h5", help="store to write"
    )
    parser.add_argument(
        "--space-group",
        metavar="SG",
        help="instead of that of the file, if any, e.g. P6122",
    )
    parser.add_argument(
        "--unit-cell", metavar="A,B,C,AL,BE,GA", help="of a file that does not know it (.sca)"
    )


def run(args: argparse.Namespace) -> None:
    """Check the arguments and convert."""
    from braggflux.merge.io.stores.store_conversion import convert_to_store
    from braggflux.merge.io.stores.unmerged_store import SUFFIX, UnmergedStore
    from braggflux.pipelines.inputs.inputs import (
        check_unmerged,
        parse_space_group,
        parse_unit_cell,
    )
    from braggflux.pipelines.workspace.file_sums import tell_changed
    from braggflux.pipelines.workspace.lock import one_writer_of_file
    from braggflux.pipelines.workspace.outputs import require_free_file

    if args.out.suffix != SUFFIX:
        raise UserError(f"--out {args.out} must end in {SUFFIX}, by which merge knows a store")
    group, cell = parse_space_group(args.space_group), parse_unit_cell(args.unit_cell)
    require_free_file(args.out)
    check_unmerged([args.input])
    tell_changed([args.input])
    with one_writer_of_file(args.out):
        convert_to_store(args.input, args.out, space_group=group, cell=cell)
    with UnmergedStore(args.out) as store:
        logger.info("%d observations on %d images", len(store), store.n_images)
    logger.info("wrote %s", args.out)
