"""The integrator's table of photon-count likelihoods as unmerged observations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gemmi
import numpy as np

from braggflux.integrator.crystal.forms import typical_cell
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.io.dials.sweeps import describe_experiment, sweeps_of
from braggflux.integrator.io.intensity_file import read_experiment_records, read_intensities
from braggflux.integrator.types import IntensityTable
from braggflux.merge.io.dataset_split import cell_groups, check_one_form, split_by_sweep
from braggflux.merge.io.formats.unmerged_mtz import BATCH_STEP
from braggflux.merge.io.observations import PHOTON_VARIANCE, UnmergedData, make_unmerged
from braggflux.merge.io.sweep_columns import BEAMS, FRAME, FRAME_WIDTH, ROCKING, SWEEP, ZETA

logger = logging.getLogger(__name__)

#: Row of each observation in the shoebox store that it was integrated from.
STORE_ROW = "store_row"


def read_photon_table(
    path: str | Path, experiments: str | Path | None = None
) -> list[UnmergedData]:
    """Read ``intensities.h5`` of a run: its data sets, or a data set for each wavelength.

    Intensities are maximum-likelihood photons (before Lorentz and polarization factors), sigmas
    those of their background, and the metadata ``photon_variance`` what each expected photon adds:
    :mod:`braggflux.merge.data.measurement`. Other metadata: ``BATCH XDET YDET ROT LP`` and
    :data:`~braggflux.merge.io.sweep_columns.SWEEP_COLUMNS` with
    :data:`~braggflux.merge.io.sweep_columns.ROCKING`.

    Parameters
    ----------
    path : str or Path
    experiments : str or Path, optional
        The .expt that the table belongs to, for files that do not hold cell and scan themselves.

    Raises
    ------
    UserError
        Not such a file, without cell, with several space groups or crystal forms, or without a
        usable observation.
    """
    path = Path(path)
    table = read_intensities(path)
    records = _sweeps(path, experiments)
    return by_data_set(photon_observations(table, records, path), records)


def by_data_set(data: UnmergedData, records: Sequence[Mapping[str, Any]]) -> list[UnmergedData]:
    """Cut observations of several data sets of a run, or of several wavelengths.

    Parameters
    ----------
    data : UnmergedData
        Of :func:`photon_observations`.
    records : sequence of mapping
        Of each sweep.
    """
    wavelength = [record.get("wavelength", 0.0) for record in records]
    cells = [record["unit_cell"] for record in records]
    return split_by_sweep(data, wavelength, cells, [r.get("dataset", "") for r in records])


def photon_observations(
    table: IntensityTable, records: Sequence[Mapping[str, Any]], source: str | Path
) -> UnmergedData:
    """Turn a table of the integrator into unmerged observations, all sweeps together.

    Parameters
    ----------
    table : IntensityTable
        Rows that were not integrated, or have no index, are left out.
    records : sequence of mapping
        Cell, space group and scan of each sweep.
    source : str or Path
        For messages and the name of the data.

    Raises
    ------
    UserError
        Sweeps that are not described, of several crystal forms, or no usable observation.
    """
    columns = {name: value.numpy() for name, value in table.columns().items()}
    columns[ROCKING] = table.metadata.rocking_sigma.numpy()
    number = columns["experiment"]
    if len(number) and int(number.max()) >= len(records):
        raise UserError(
            f"{source} has observations of sweep {number.max()}, but only {len(records)} are "
            "described; give the .expt that the run was made from"
        )
    a, t = columns["effective_counts"].astype(float), columns["exposure"].astype(float)
    beta = columns["effective_background"].astype(float)
    good = table.is_integrated.numpy()
    good &= (t > 0) & (beta > 0) & columns["miller_index"].any(axis=1)
    if not good.any():
        raise UserError(
            f"{source} holds no observation that could be integrated ({len(good)} rows); run the "
            "integration again"
        )
    logger.info("%s: %d of %d observations are used", source, good.sum(), len(good))
    metadata = _metadata(columns, records) | _places(columns, records)
    metadata[PHOTON_VARIANCE] = 1.0 / np.maximum(t, 1e-6)
    metadata[STORE_ROW] = columns["refl_row"].astype(float)
    cells = np.array([record["unit_cell"] for record in records])
    used = cells[np.unique(number)]
    check_one_form(used, cell_groups(used), str(source), "sweeps")
    space_group = gemmi.SpaceGroup(records[0]["space_group"])
    return make_unmerged(
        source=str(source),
        miller_index=columns["miller_index"][good],
        intensity=(a / np.maximum(t, 1e-6) - beta)[good],
        sigma=np.sqrt(beta / np.maximum(t, 1e-6))[good],
        image_label=metadata["BATCH"][good],
        metadata={name: values[good] for name, values in metadata.items()},
        wavelength=None,
        cell=typical_cell(used, space_group, str(source)),
        space_group=space_group,
        name=Path(source).stem,
        has_lp_applied=False,
    )


def _sweeps(path: Path, experiments: str | Path | None) -> list[dict]:
    """Cell, space group and scan of each sweep: of the .expt if given, else of the file."""
    if experiments is not None:
        records = [describe_experiment(m) for m in sweeps_of(read_experiments(experiments))]
    else:
        records = read_experiment_records(path)
    if not records:
        raise UserError(
            f"{path} does not hold its unit cell and space group; give the .expt that the run was "
            "made from beside it"
        )
    groups = sorted({r["space_group"] for r in records})
    if len(groups) > 1:
        raise UserError(f"{path} has sweeps of the space groups {', '.join(groups)}; merge one")
    return records


def _metadata(
    columns: dict[str, np.ndarray], records: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Batch, position and rotation of each observation, (N,) each."""
    x, y, z = columns["xyz_px"].astype(float).T
    batch, rot, last = np.zeros(len(z)), np.zeros(len(z)), 0
    for k, record in enumerate(records):
        own = columns["experiment"] == k
        first, end = record["image_range"]
        offset = 0 if first > last else -(-last // BATCH_STEP) * BATCH_STEP
        start, width = record["oscillation_deg"]
        # a centroid may be predicted just outside the scan
        batch[own] = offset + np.clip(np.floor(z[own]) + first, first, end)
        rot[own] = start + width * z[own]
        last = end + offset
    lp = columns["lp"].astype(float)
    return {"BATCH": batch, "XDET": x, "YDET": y, "ROT": rot, "LP": lp}


def _places(
    columns: dict[str, np.ndarray], records: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Sweep columns of each observation, (N,) each."""
    number = columns["experiment"]
    widths = np.array([abs(record["oscillation_deg"][1]) for record in records])
    beams = np.concatenate([columns["s0_crystal"], columns["s1_crystal"]], axis=1).astype(float)
    places = {
        SWEEP: number.astype(float),
        FRAME: columns["xyz_px"][:, 2].astype(float),
        FRAME_WIDTH: widths[number],
        ZETA: columns["zeta"].astype(float),
        ROCKING: columns[ROCKING] * widths[number],
    }
    return places | dict(zip(BEAMS, beams.T, strict=True))
