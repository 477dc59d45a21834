"""Shoeboxes of a run, from its configuration."""

from __future__ import annotations

from pathlib import Path

from integrator.io.dials import read_experiments, read_reflections
from integrator.io.shoebox_store import ShoeboxStore
from integrator.shoebox.run import run_extraction
from pipelines import log
from pipelines.config import RunConfig


def extract(config: RunConfig, out: Path) -> ShoeboxStore:
    """Cut the boxes that ``config`` asks for and write the store.

    Parameters
    ----------
    config : RunConfig
        ``expt``, ``refl`` and ``extraction`` are used.
    out : Path
        HDF5 file to write.

    Returns
    -------
    ShoeboxStore
        Opened for reading.
    """
    with log.progress("shoeboxes") as advance:
        return run_extraction(
            read_experiments(config.expt),
            config.extraction.d_min,
            out,
            reflections=read_reflections(config.refl),
            box=config.extraction.box,
            n_sigma=config.extraction.n_sigma,
            find_defects=config.extraction.find_defects,
            progress=advance,
        )
