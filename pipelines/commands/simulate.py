"""Raw HDF5 frames or serial stills of a known crystal, with their truth.

Writes an NXmx master with its data files as a detector does, the true geometry as DIALS files, the
true photons of every observation (truth.npz), the true F(+) and F(-) (MTZ) and the model.
The preset stills makes no frames, but unmerged observations of a serial experiment (stills.h5).

Examples
--------
braggflux simulate --out demo/frames
braggflux simulate --out small --preset tiny --seed 3
braggflux simulate --out spoilt --preset tiny --effects ice,hot-pixel,shadow,zinger
braggflux simulate --out light --model moved.pdb
braggflux simulate --out serial --preset stills --images 1646
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from braggflux.integrator.errors import UserError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder, preset and seed."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where to write")
    text = "hewl-iodide (the demo), tiny, crowded or multipanel (seconds), or stills [hewl-iodide]"
    add("--preset", default="hewl-iodide", help=text)
    text = "some of ice,hot-pixel,shadow,zinger,hot-regions,second-lattice (spoil the frames) or "
    text += "points,fringes,split,streaks,satellites,warped (the spots' shape) [none]"
    add("--effects", default="", metavar="NAMES", help=text)
    add("--images", metavar="N", help="of the preset stills [164639, as many as CXIDB 81]")
    text = "crystal structure, .pdb or .cif [lysozyme with iodides]"
    add("--model", type=Path, metavar="PDB", help=text)
    text = "of the stills: images under other indices [0]"
    add("--reindexed", metavar="SHARE", help=text)
    add("--seed", default="0", help="same seed, same frames [0]")


def run(args: argparse.Namespace) -> None:
    """Simulate."""
    from braggflux.fixtures.presets import effect_overrides
    from braggflux.fixtures.simulate import simulate
    from braggflux.pipelines.config import schema
    from braggflux.pipelines.workspace import log, outputs

    outputs.require_free_folder(args.out, outputs.SIMULATE_RESULTS)
    seed = schema.coerce(args.seed, int, "--seed")
    if args.preset == "stills":
        _run_stills(args, seed)
        return
    if any(x is not None for x in (args.images, args.reindexed)):
        raise UserError("--images and --reindexed are of --preset stills; leave them out")
    given = {} if args.model is None else {"model": args.model}
    effects = effect_overrides(name.strip() for name in args.effects.split(",") if name.strip())
    with log.progress("frames") as advance:
        files = simulate(args.out, args.preset, seed, advance, overrides=effects, **given)
    logger.info("frames: %s", files.master)
    logger.info("model: %s", files.model)


def _run_stills(args: argparse.Namespace, seed: int) -> None:
    from braggflux.fixtures.stills import StillsExperiment, StillsSettings
    from braggflux.pipelines.config import schema
    from braggflux.pipelines.simulate.stills_store import write_stills
    from braggflux.pipelines.workspace import log

    given = {"n_images": args.images and schema.coerce(args.images, int, "--images")}
    given |= {"model": args.model, "seed": seed}
    given["reindexed"] = args.reindexed and schema.coerce(args.reindexed, float, "--reindexed")
    settings = StillsSettings(**{key: v for key, v in given.items() if v is not None})
    with log.progress("stills") as advance:
        files = write_stills(args.out, StillsExperiment(settings), advance)
    logger.info("observations: %s", files.observations)
    logger.info("true amplitudes: %s", files.truth_mtz)
