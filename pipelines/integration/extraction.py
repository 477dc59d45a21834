"""Shoeboxes of a run, from its configuration."""

from __future__ import annotations

from pathlib import Path

from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.processes import ALONE, Processes
from braggflux.integrator.shoebox.extraction import run_extraction
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.integration.data_sets import read_sweeps, read_tables
from braggflux.pipelines.workspace import log


def extract(config: RunConfig, out: Path, processes: Processes = ALONE) -> ShoeboxStore:
    """Cut the boxes that ``config`` asks for and write the store.

    Parameters
    ----------
    config : RunConfig
        Its data sets and ``extraction`` are used.
    out : Path
        HDF5 file to write.
    processes : Processes
        Those that share the frames; each gets the store. One alone starts as many as ``config``
        says.

    Returns
    -------
    ShoeboxStore
        Opened for reading.
    """
    with log.progress("shoeboxes") as advance:
        return run_extraction(
            read_sweeps(config),
            config.extraction.d_min,
            out,
            reflections=read_tables(config),
            box=config.extraction.box,
            n_sigma=config.extraction.n_sigma,
            find_defects=config.extraction.find_defects,
            model_neighbours=config.extraction.model_neighbours,
            n_workers=config.extraction.processes,
            processes=processes,
            progress=advance,
        )
