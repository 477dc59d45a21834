"""Columns of all files behind each other, as numbers that the merge understands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.cell import inv_d2
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.grouping import MEMBER
from braggflux.merge.data.measurement import counted_sigma
from braggflux.merge.io.missing_values import POSITIONS
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.rows import UniqueRows

Array = NDArray[np.float64]

#: Observations among which both Friedel mates must occur.
MIN_ACENTRIC = 200


@dataclass(frozen=True)
class Columns:
    """One value for each observation of every file, (N,).

    Parameters
    ----------
    miller_index : (N, 3)
        As observed.
    intensity, sigma : (N,)
        Units of the files; the sigma of photon counts is that of their background.
    dataset, frame, image : (N,)
        Number of the file, image number within it, and image counted through all files.
    member : (N,)
        Part of the dataset, whose images are no neighbours of those of other parts.
    wavelength : (N,)
        [A]; 0 where there is none.
    inv_d2 : (N,)
        [1/A^2]
    base : (N,)
        Log of what raw intensities lack for being proportional to F^2.
    position : (N, 2) or None
        Of the spot, where all files have one.
    row : (N,)
        Unique reflection, -1 for none.
    photon_variance : (N,) or None
        See :mod:`braggflux.merge.data.measurement`.
    """

    miller_index: NDArray[np.int32]
    intensity: Array
    sigma: Array
    dataset: NDArray[np.int64]
    frame: NDArray[np.int64]
    image: NDArray[np.int64]
    member: NDArray[np.int64]
    wavelength: Array
    inv_d2: Array
    base: Array
    position: Array | None
    row: NDArray[np.int64]
    photon_variance: Array | None


def is_kept(row: NDArray[np.int64], intensity: Array, sigma: Array) -> NDArray[np.bool_]:
    """Observations that are merged, (N,): of a unique reflection (not -1), and measured."""
    return (row >= 0) & (sigma > 0) & np.isfinite(intensity)


def join_columns(data: Sequence[UnmergedData], unique: UniqueRows, config: MergeConfig) -> Columns:
    """Put the columns of all files behind each other."""
    frames = [_frame_numbers(d) for d in data]
    rows, images, n_images = [], [], 0
    for k, d in enumerate(data):
        row = unique.asus[k].refl_id(d.miller_index)
        rows.append(np.where(row >= 0, row + unique.first[k], -1))
        images.append(d.image + n_images)
        n_images += d.n_images
    join = np.concatenate
    sigma, photon_variance = counted_sigma(data, config.photon_counts)
    return Columns(
        miller_index=join([d.miller_index for d in data]),
        intensity=join([d.intensity for d in data]),
        sigma=sigma,
        dataset=np.repeat(np.arange(len(data)), [len(d) for d in data]),
        frame=join(frames),
        image=join(images),
        member=join([d.metadata.get(MEMBER, np.zeros(len(d))) for d in data]).astype(np.int64),
        wavelength=join(
            [np.zeros(len(d)) if d.wavelength is None else d.wavelength for d in data]
        ),
        inv_d2=join([inv_d2(d.miller_index, d.cell) for d in data]),
        base=join([_log_lp_factor(d) for d in data]),
        position=_positions(data),
        row=join(rows),
        photon_variance=photon_variance,
    )


def _log_lp_factor(d: UnmergedData) -> Array:
    """Log of what raw intensities lack for being proportional to F^2, (N,)."""
    if d.has_lp_applied or "LP" not in d.metadata:
        return np.zeros(len(d))
    return -np.log(np.maximum(d.metadata["LP"], 1e-6))


def _positions(data: Sequence[UnmergedData]) -> Array | None:
    """Spot positions of all files, (N, 2); None where a file has none."""
    for names in POSITIONS:
        if all(n in d.metadata for d in data for n in names):
            return np.column_stack(
                [np.concatenate([np.asarray(d.metadata[n], float) for d in data]) for n in names]
            )
    return None


def _frame_numbers(d: UnmergedData) -> NDArray[np.int64]:
    """Image numbers of the file where it has them: they pair images of different files."""
    number = d.metadata.get("BATCH")
    return d.image if number is None else np.asarray(number).astype(np.int64)


def check_mates(row: NDArray[np.int64], unique: UniqueRows) -> None:
    """Make sure that observations of both Friedel mates exist where the mates are kept apart.

    Files whose indices were reduced without a note of it (no M/ISYM, or zeros in it) hold F(+)
    only, and in it the mean of both mates.

    Parameters
    ----------
    row : (N,)
        Unique reflection of each observation, -1 for none.
    unique : UniqueRows

    Raises
    ------
    UserError
    """
    sign = np.concatenate([asu.friedel_sign for asu in unique.asus])
    found = sign[row[row >= 0]][~unique.is_centric[row[row >= 0]]]
    if len(found) < MIN_ACENTRIC or len(set(found.tolist())) == 2:
        return
    raise UserError(
        f"all {len(found)} observations of acentric reflections are of F({'+-'[found[0] < 0]}): "
        "the files do not tell the Friedel mates apart (indices in the asymmetric unit without "
        "M/ISYM); give indices as observed or M/ISYM, or merge without --anomalous"
    )
