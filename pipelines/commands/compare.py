r"""Set a run's intensities, amplitudes and peaks beside DIALS' own.

Observations are matched by Miller index and position; merged reflections by index and shell. With
the truth of simulated frames, or with merged data of more frames, both programs are compared with
that. Writes RUN_DIR/compare.csv, rebuilds the report and prints the tables; what cannot be
compared has a row with the reason.

Examples
--------
braggflux compare run --integrated dials/integrated.refl --merged dials/merged.mtz
braggflux compare run --integrated dials/integrated.refl --merged dials/merged.mtz \
    --truth truth.mtz --true-counts true_counts.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run directory and the files to compare it with."""
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--integrated",
        type=Path,
        metavar="REFL",
        help="DIALS integrated.refl; default: that of RUN_DIR/dials, where there is one",
    )
    parser.add_argument(
        "--merged",
        type=Path,
        metavar="MTZ",
        help="DIALS merged.mtz; default: the run's --reference, or that of RUN_DIR/dials",
    )
    parser.add_argument("--truth", type=Path, metavar="MTZ", help="true F(+), F(-)")
    parser.add_argument(
        "--full", type=Path, metavar="MTZ", help="merged data of more frames of this crystal form"
    )
    parser.add_argument(
        "--true-counts",
        type=Path,
        metavar="NPZ",
        help="true photons: arrays miller_index, xyz_px (frame: DIALS' array index), photons",
    )


def run(args: argparse.Namespace) -> None:
    """Compare, write and show."""
    from braggflux.pipelines.compare.run import compare, known_reference, show
    from braggflux.pipelines.report.html import write_report
    from braggflux.pipelines.workspace.rundir import RunDirectory

    run_directory = RunDirectory.open(args.run_directory)
    integrated, merged = known_reference(run_directory)
    rows = compare(
        run_directory,
        integrated=args.integrated or integrated,
        merged=args.merged or merged,
        truth=args.truth,
        true_counts=args.true_counts,
        full=args.full,
    )
    show(rows)
    write_report(run_directory)
