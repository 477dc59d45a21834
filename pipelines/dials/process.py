"""Raw images to a compared, reported run: DIALS' geometry and reference around our own run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from braggflux.integrator.errors import UserError
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.output.free_flags import FreeFlags
from braggflux.pipelines.compare.run import PEAKS, compare, show
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.deposition.files import show_table_one, write_deposition
from braggflux.pipelines.dials.chain import DialsChain, Reference
from braggflux.pipelines.integration.checks import (
    check_images,
    check_imported,
    check_input,
    check_integrator,
    check_known_crystal,
)
from braggflux.pipelines.integration.run import run
from braggflux.pipelines.report.epochs import show_peaks
from braggflux.pipelines.report.html import write_report
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.device import choose_device
from braggflux.pipelines.workspace.lock import one_writer
from braggflux.pipelines.workspace.rundir import RunDirectory

logger = logging.getLogger(__name__)


def process(config: RunConfig, *, resume: bool = False, truth: Path | None = None) -> RunDirectory:
    """Run DIALS' geometry, our model, and DIALS' own integration to compare with.

    The reference is made before training, so that every epoch's table can show it.

    Parameters
    ----------
    config : RunConfig
        ``dials.images`` and ``out`` are needed; ``expt``, ``refl`` and ``reference`` are set
        here.
    resume : bool
        Keep finished DIALS steps and go on from the last checkpoint.
    truth : Path, optional
        MTZ with the true F(+), F(-) of simulated frames.

    Returns
    -------
    RunDirectory
    """
    if not config.dials.images:
        raise UserError("no images are given; name an HDF5 master file or all frames of a sweep")
    if truth is not None:
        if not truth.is_file():
            raise UserError(f"--truth {truth} does not exist; give an MTZ file with F(+), F(-)")
        read_merged_mtz(truth)
    [out] = config.require("out")
    choose_device(config.training.device)
    FreeFlags.of(config.merge)  # what cannot be read is not met after DIALS' minutes
    check_integrator(config, ())
    check_images(config.dials.images)
    check_known_crystal(config.dials, config.model, config.extraction.d_min)
    with one_writer(out):
        return _process(config, RunDirectory(out), resume=resume, truth=truth)


def _process(
    config: RunConfig, directory: RunDirectory, *, resume: bool, truth: Path | None
) -> RunDirectory:
    """Take all steps in a folder that no other process writes into."""
    directory.check_free(resume=resume)
    chain = DialsChain(directory.dials, config.dials, config.extraction.d_min)
    log.attach_file(directory.log_file)
    check_imported(chain.imported(), config.extraction.d_min)
    expt, refl = chain.geometry()
    config = replace(config, expt=expt, refl=refl, more_data=(), parents=None)
    check_input(config)
    reference = Reference(reason="not asked for (dials.has_reference is false)")
    if config.dials.has_reference:
        reference = chain.reference()
    directory = run(replace(config, reference=reference.merged), resume=resume)
    if reference.reason:
        directory.note("reference", reference.reason)
    return finish(directory, integrated=reference.integrated, truth=truth)


def finish(
    directory: RunDirectory, *, integrated: Path | None = None, truth: Path | None = None
) -> RunDirectory:
    """Compare with the reference, write the report and show the peak table."""
    merged = directory.read_config().reference
    if merged or integrated or truth:
        rows = compare(directory, integrated=integrated, merged=merged, truth=truth)
        show(row for row in rows if row["comparison"] != PEAKS)  # they have their own table
    directory.finish()
    written = write_deposition(directory.path)
    report = write_report(directory)
    for own in directory.data_sets():
        show_peaks(own)
    show_table_one(written)
    logger.info("report: %s", report)
    for own in directory.data_sets():
        logger.info("merged: %s", own.merged)
    logger.info(
        "next: the report; braggflux view %s; refine against the merged file", directory.path
    )
    return directory
