r"""Integrate and merge in one model, from the refined geometry of a DIALS project.

Cuts shoeboxes out of the frames named in EXPT, trains integrator and merge together, and writes
after every epoch a merged MTZ and the anomalous peak heights at the sites of the model.

Without a model there are no phases, hence no peaks; all else is the same.

Several pairs EXPT REFL are several data sets (dark and light, native and derivative, time points):
each has amplitudes of its own and files DIR/<name of its EXPT>_merged.mtz and so on. --parents
says which resembles which.

--integrator takes what a finished run on a crystal of the same kind of experiment has learned;
with --epochs 0 every spot is then integrated in one pass, without training.

EXPT and REFL are DIALS files. With refined.refl the full set of reflections is predicted; an
integrated or predicted table is taken as it is.

Examples
--------
braggflux run refined.expt refined.refl --model model.pdb --out run
braggflux run refined.expt refined.refl --model model.pdb --out run --resume
braggflux run refined.expt refined.refl --model model.pdb --out run2 \
    --coupling staged --epochs 6 --d-min 2.0 --reference dials/merged.mtz
braggflux run refined.expt refined.refl --model model.pdb --out plain \
    --set merge.photon_counts=false --set merge.prior=wilson --set merge.physical_scale=false
braggflux run dark.expt dark.refl light.expt light.refl --parents none,0 --out pair \
    --set merge.anomalous=false
braggflux run --config run/config.yaml --out again
braggflux run next.expt next.refl --model model.pdb --out next --integrator run --epochs 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from braggflux.pipelines.config.flags import RUN_FLAGS, add_config_arguments, config_from_args
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.workspace.runtime import importing

FLAGS = {**RUN_FLAGS, "--parents": "parents"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare positional files, options and --resume."""
    parser.add_argument("expt", nargs="?", type=Path, metavar="EXPT", help="DIALS experiments")
    parser.add_argument("refl", nargs="?", type=Path, metavar="REFL", help="DIALS reflections")
    parser.add_argument(
        "more_data", nargs="*", type=Path, metavar="EXPT REFL", help="of further data sets"
    )
    add_config_arguments(parser, FLAGS)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out from its checkpoint"
    )


def run(args: argparse.Namespace) -> None:
    """Check the input, train, and show the peak table."""
    given = {name: getattr(args, name) for name in ("expt", "refl")}
    fixed: dict[str, object] = {k: str(path) for k, path in given.items() if path is not None}
    if args.more_data:
        fixed["more_data"] = [str(path) for path in args.more_data]
    config = config_from_args(RunConfig, args, FLAGS, fixed)
    config.require("expt", "refl", "out")

    with importing():
        from braggflux.integrator.processes import Processes
        from braggflux.pipelines.config.run_settings import say_idle_of_run
        from braggflux.pipelines.dials.process import finish
        from braggflux.pipelines.integration.run import run as run_pipeline

    say_idle_of_run(config)
    directory = run_pipeline(config, resume=args.resume)
    if Processes.of_environment().is_first:
        finish(directory)
