r"""Raw images to merged amplitudes, with DIALS for the geometry and as the reference.

An installed DIALS imports the images, finds and indexes spots and refines the geometry; then
`braggflux run` follows, and DIALS' own integration, scaling and merging is set beside it. DIALS'
files and logs are in OUT/dials; a step that is done is not repeated by --resume. If DIALS cannot
scale or merge the data, its row is missing with the reason and the run goes on.

Examples
--------
braggflux process master.h5 --model model.pdb --space-group P43212 --out run
braggflux process sweep_*.cbf.gz --model model.pdb --out run \
    --unit-cell 5.428,8.141,12.038,90,90,90 --space-group P212121 \
    --index-args "detector.fix=all" \
    --integrate-args "min_spots.per_degree=5 min_spots.overall=10"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from braggflux.pipelines.config.flags import RUN_FLAGS, add_config_arguments, config_from_args
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.workspace.runtime import importing

STEPS = ("import", "find_spots", "index", "refine", "integrate", "scale", "merge")
FLAGS = {
    **{flag: key for flag, key in RUN_FLAGS.items() if flag != "--reference"},
    "--space-group": "dials.space_group",
    "--unit-cell": "dials.unit_cell",
    "--nproc": "dials.nproc",
    **{f"--{step.replace('_', '-')}-args": f"dials.{step}_args" for step in STEPS},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare images, options, --no-reference and --resume."""
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGES", help="HDF5 master, or all frames"
    )
    add_config_arguments(parser, FLAGS)
    parser.add_argument(
        "--no-reference", action="store_true", help="DIALS for the geometry only: quicker"
    )
    parser.add_argument(
        "--truth", type=Path, metavar="MTZ", help="true F(+), F(-) of simulated frames, to compare"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, done steps stay"
    )


def run(args: argparse.Namespace) -> None:
    """Check the input and hand over to :mod:`braggflux.pipelines.dials.process`."""
    fixed: dict[str, object] = {}
    if args.images:
        fixed["dials.images"] = [str(path) for path in args.images]
    if args.no_reference:
        fixed["dials.has_reference"] = False
    config = config_from_args(RunConfig, args, FLAGS, fixed)

    with importing():
        from braggflux.integrator.errors import UserError
        from braggflux.integrator.processes import Processes
        from braggflux.pipelines.config.run_settings import say_idle_of_run
        from braggflux.pipelines.dials.process import process

    if (size := Processes.of_environment().size) > 1:
        raise UserError(
            f"torchrun started {size} processes, and DIALS' geometry is work of one: give the raw "
            "images to `braggflux process` alone, or its refined.expt and refined.refl to `run`"
        )

    say_idle_of_run(config, is_process=True)
    process(config, resume=args.resume, truth=args.truth)
