"""Files of a result as pandas tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.intensity_file import read_intensities
from braggflux.pipelines.api.optional import needed
from braggflux.pipelines.maps.anomalous_peaks import SitePeak
from braggflux.pipelines.workspace.records.readers import read_metrics, read_rows

if TYPE_CHECKING:
    import pandas

#: Three columns of each of these.
VECTORS = {"miller_index": "HKL", "xyz_px": "xyz"}
#: Of intensities.h5; the others are vectors of the geometry.
OBSERVATIONS = (
    *("experiment", "panel", "d", "lp", "zeta", "frame_sigma"),
    *("effective_counts", "effective_background", "exposure", "background", "flags"),
)


def table(rows: Any) -> pandas.DataFrame:
    """Make a table of rows or columns."""
    with needed("tables"):
        import pandas
    return pandas.DataFrame(rows)


def csv_table(path: Path) -> pandas.DataFrame:
    """Read a CSV file of a result.

    Raises
    ------
    UserError
        There is none.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there: the result is not finished, or has no such table")
    with needed("tables"):
        import pandas
    found = table(read_rows(path))
    for name in found.columns:
        numbers = pandas.to_numeric(found[name], errors="coerce")
        # a column of numbers, with gaps where there is no value
        if (numbers.notna() | (found[name] == "")).all():
            found[name] = numbers
    return found


def metrics_table(path: Path) -> pandas.DataFrame:
    """Read metrics.jsonl, one row per epoch."""
    if not path.is_file():
        raise UserError(f"{path} is not there: the run has no epoch yet")
    return table(read_metrics(path))


def peak_table(peaks: Sequence[SitePeak]) -> pandas.DataFrame:
    """Heights at the sites, the highest first."""
    columns = ("chain", "seqid", "residue", "atom", "peak_sigma", "difference", "peak_sigma_own")
    rows = [{"site": p.label} | {name: getattr(p, name) for name in columns} for p in peaks]
    found = table(rows)
    if len(found):
        found = found.sort_values("peak_sigma", ascending=False, ignore_index=True)
    return found


def observation_table(path: Path) -> pandas.DataFrame:
    """Read intensities.h5: one row per observation, with J and its sigma [photons], or NaN."""
    observed = read_intensities(path)
    columns: dict[str, Any] = {}
    every = observed.columns()
    for name, letters in VECTORS.items():
        columns |= {letter: every[name][:, axis].numpy() for axis, letter in enumerate(letters)}
    intensity = observed.intensity
    sigma = observed.likelihood.variance(intensity).sqrt()
    # what is not integrated has placeholders
    columns["J"], columns["sigma_J"] = (
        x.masked_fill(~observed.is_integrated, torch.nan).numpy() for x in (intensity, sigma)
    )
    columns |= {name: every[name].numpy() for name in OBSERVATIONS}
    return table(columns)
