r"""Merge unmerged reflections of any program: rotation, Laue, stills.

INPUT is an unmerged MTZ, a DIALS .refl with its .expt, XDS_ASCII.HKL or INTEGRATE.HKL, SCALEPACK
with original indices (.sca), unmerged mmCIF, a CrystFEL .stream, a store (.h5, see `braggflux
convert`), or the photon counts of a run (RUN/intensities.h5). Every file is a dataset of
its own; one with several wavelengths (or data sets, of MTZ) is as many, numbered in their order.
All are merged on one scale. Writes DIR/merged.mtz, for several datasets DIR/<input stem>[_<its
dataset>]_merged.mtz, with half sets (half_sets.mtz), statistics by resolution shell, the held-out
predictions (metrics.json), Table 1 (table1.txt, .csv, .tex), mmCIF (deposition.cif), the scale
model, scale, B and R of each image (images.csv), a page with figures (report.html) and, where
stills can be indexed in several ways, indexing.csv.

Examples
--------
braggflux merge scaled.mtz --out merged --anomalous
braggflux merge off.mtz 2ms.mtz --laue --parents none,0 --out pyp
braggflux merge plus.mtz minus.mtz --friedel --stills --out xfel
braggflux merge weak.mtz --prior-model model.pdb --out merged
braggflux merge new.stream --stills --space-group P6122 --freeze-scales xfel --out new
"""

from __future__ import annotations

import argparse
import logging

from braggflux.merge.config import MergeConfig
from braggflux.pipelines.config.flags import MERGE_FLAGS, add_config_arguments, config_from_args
from braggflux.pipelines.inputs.arguments import add_input_arguments, inputs_from_args
from braggflux.pipelines.workspace.runtime import importing

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the files, their relations and the options of the model."""
    add_input_arguments(parser)
    add_config_arguments(parser, MERGE_FLAGS, MergeConfig, "network_width=64")


def run(args: argparse.Namespace) -> None:
    """Check the arguments and merge."""
    fixed = {"anomalous": True} if args.friedel else None
    config = config_from_args(MergeConfig, args, MERGE_FLAGS, fixed)
    inputs = inputs_from_args(args)

    with importing():
        from braggflux.pipelines.deposition.files import show_table_one, write_deposition
        from braggflux.pipelines.merging.merge import merge

    merged = merge(inputs, config)
    if not merged:  # one of several processes, of which the first has written
        return
    written = write_deposition(inputs.out)
    show_table_one(written)
    for path in [*merged, *written]:
        logger.info("wrote %s", path)

    from braggflux.pipelines.report.html import write_merge_report

    logger.info("report: %s", write_merge_report(inputs.out))
