"""From the readers' observations to the sorted table and the unique rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from integrator.crystal.ambiguity import IndexingOperators
from integrator.crystal.cell import inv_d2
from integrator.crystal.reciprocal_asu import ReciprocalAsu
from integrator.errors import UserError
from merge.intensities.ambiguity_choice import Ambiguity, alternative_rows
from merge.intensities.config import IntensityMergeConfig
from merge.intensities.overloads import is_overloaded
from merge.intensities.pairing import paired_clusters
from merge.intensities.photon_counts import counted_sigma, observed_sigma
from merge.intensities.standard import LOW_ANGLE, Standard, mean_and_spread
from merge.intensities.table import Observations, ObservationTable, Terms
from merge.intensities.unique import UniqueRows
from merge.io.observations import UnmergedData, check_one_crystal_form

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

#: Metadata the network is shown without being asked, where a file has them.
KNOWN_METADATA = (
    *("X", "Y", "XDET", "YDET", "xobs", "yobs", "xyzobs_x", "xyzobs_y"),
    *("Wavelength", "ROT", "ewald_offset"),
)
EWALD_OFFSETS = ("ewald_offset", "ewald_offset_invA")
POSITIONS = (("X", "Y"), ("XDET", "YDET"), ("xobs", "yobs"))
RESOLUTION = "dHKL"
#: Share of a dataset's observations that must have a partner for a common error.
MIN_PAIRED = 0.3
MIN_LEVEL = 1e-3  # of an image, in mean intensities of all


@dataclass(frozen=True)
class MergeProblem:
    """All that is merged together.

    ``source`` is (N,): the file's row of each observation of the table, counted through all files.
    ``ambiguity`` is there where images may be indexed in several ways.
    """

    unique: UniqueRows
    table: ObservationTable
    names: tuple[str, ...]
    source: NDArray[np.int64]
    ambiguity: Ambiguity | None = None


@dataclass
class _Columns:
    """Concatenated columns of all files."""

    miller_index: NDArray[np.int32]
    intensity: Array
    sigma: Array
    dataset: NDArray[np.int64]
    frame: NDArray[np.int64]  # number within the file
    image: NDArray[np.int64]
    wavelength: Array
    inv_d2: Array
    base: Array
    position: Array | None
    row: NDArray[np.int64]
    photon_variance: Array | None


def build_problem(
    data: Sequence[UnmergedData],
    config: IntensityMergeConfig,
    parents: Sequence[int | None] | None = None,
    operators: IndexingOperators | None = None,
    standard: Standard | None = None,
    unique: UniqueRows | None = None,
) -> MergeProblem:
    """Bind observations to unique rows and sort them by image.

    Parameters
    ----------
    data : sequence of UnmergedData
        One per file.
    config : IntensityMergeConfig
    parents : sequence of int or None, optional
        Of each dataset.
    operators : IndexingOperators, optional
        Ways in which each image may be indexed; observations that one of them takes out of the
        asymmetric unit are left out.
    standard : Standard, optional
        Units of an earlier fit, instead of those of these data.
    unique : UniqueRows, optional
        When ``data`` are a part of what is merged.

    Raises
    ------
    UserError
        Files that cannot be merged together, or lack what was asked for.
    """
    _check(data, config)
    if unique is None:
        asus = _asus(data, config, operators)
        couple = config.prior == "double-wilson" and asus[0].anomalous
        unique = UniqueRows(asus, parents, couple)
    columns = _columns(data, unique, config)
    given = _metadata(data, columns, config, standard)
    kept = is_kept(columns.row, columns.intensity, columns.sigma)
    if config.overloads == "auto":
        kept &= ~is_overloaded(data)
    alternatives = None
    if operators is not None:
        alternatives = alternative_rows(columns.miller_index, columns.dataset, unique, operators)
        kept &= (alternatives >= 0).all(1)
    if not kept.any():
        raise UserError("no observation is inside the resolution limit; give a smaller --d-min")
    unit, cluster = _units(columns, config)
    order = np.flatnonzero(kept)
    if len(data) > 1:  # a single one is sorted
        order = order[np.lexsort((columns.dataset[order], cluster[order], unit[order]))]
    standard = standard or _standard(columns, given, order)
    table = _table(data, columns, given, standard, unit, cluster, order, unique, config)
    problem = MergeProblem(unique, table, tuple(d.name for d in data), order)
    if alternatives is None:
        return problem
    return replace(problem, ambiguity=Ambiguity.of(operators, alternatives[order], table))


def is_kept(row: NDArray[np.int64], intensity: Array, sigma: Array) -> NDArray[np.bool_]:
    """Observations that are merged, (N,): of a unique reflection (not -1), and measured."""
    return (row >= 0) & (sigma > 0) & np.isfinite(intensity)


def _check(data: Sequence[UnmergedData], config: IntensityMergeConfig) -> None:
    check_one_crystal_form(data)
    for d in data:
        if config.laue and not d.is_polychromatic:
            raise UserError(
                f"{d.name} has no wavelength of each reflection, which --laue needs; "
                "give a file with a Wavelength column or leave --laue out"
            )


def _asus(
    data: Sequence[UnmergedData],
    config: IntensityMergeConfig,
    operators: IndexingOperators | None = None,
) -> list[ReciprocalAsu]:
    asus = []
    matrices = [np.eye(3, dtype=int)] if operators is None else operators.matrices
    for d in data:
        finest = min(float(inv_d2(d.miller_index @ m, d.cell).max()) ** -0.5 for m in matrices)
        # a hair beyond: the reflection that sets the limit is inside
        d_min = max(finest * (1 - 1e-6), config.d_min or 0.0)
        asus.append(ReciprocalAsu(d.cell, d.space_group, d_min, config.anomalous))
    return asus


def _columns(
    data: Sequence[UnmergedData], unique: UniqueRows, config: IntensityMergeConfig
) -> _Columns:
    frames = [_frame_numbers(d) for d in data]
    rows, images, n_images = [], [], 0
    for k, d in enumerate(data):
        row = unique.asus[k].refl_id(d.miller_index)
        rows.append(np.where(row >= 0, row + unique.first[k], -1))
        images.append(d.image + n_images)
        n_images += d.n_images
    join = np.concatenate
    sigma, photon_variance = counted_sigma(data, config.photon_counts)
    return _Columns(
        miller_index=join([d.miller_index for d in data]),
        intensity=join([d.intensity for d in data]),
        sigma=sigma,
        dataset=np.repeat(np.arange(len(data)), [len(d) for d in data]),
        frame=join(frames),
        image=join(images),
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


def _metadata(
    data: Sequence[UnmergedData],
    columns: _Columns,
    config: IntensityMergeConfig,
    standard: Standard | None,
) -> dict[str, Array]:
    """Columns that the networks see, (N,) each, resolution first."""
    common = set.intersection(*(set(d.metadata) for d in data))
    has_wavelength = all(d.wavelength is not None for d in data)
    allowed = sorted(common | {RESOLUTION} | ({"Wavelength"} if has_wavelength else set()))
    wanted = config.metadata if standard is None else standard.names
    if wanted is None:
        wanted = [n for n in KNOWN_METADATA if n in allowed]
        if not config.laue and "Wavelength" in wanted:
            wanted.remove("Wavelength")
    if unknown := sorted(set(wanted) - set(allowed)):
        raise UserError(
            f"unknown metadata {', '.join(unknown)}; these files have {', '.join(allowed)}"
        )
    given = {RESOLUTION: columns.inv_d2}
    for name in wanted:
        if name == "Wavelength" and has_wavelength:
            given[name] = columns.wavelength
        elif name != RESOLUTION:
            given[name] = np.concatenate([np.asarray(d.metadata[name], float) for d in data])
    return given


def _standard(columns: _Columns, given: dict[str, Array], order: NDArray[np.int64]) -> Standard:
    """Measure the units in these data."""
    low_angle = _low_angle(columns.inv_d2[order])
    return Standard(
        float(np.mean(np.abs(columns.intensity[order]))),
        {name: mean_and_spread(column) for name, column in given.items()}
        | {LOW_ANGLE: mean_and_spread(low_angle)},
    )


def _low_angle(inv: Array) -> Array:
    """Log of d: 1/d^2 would show all low angles alike, where wavelength and beam stop matter."""
    return -0.5 * np.log(inv)


def _units(
    columns: _Columns, config: IntensityMergeConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return unit and cluster of each observation, (N,) each.

    When enough spots have a partner (:mod:`merge.intensities.pairing`), the files are exposures of
    the same crystal orientations.
    """
    n_datasets = int(columns.dataset.max()) + 1
    alone = columns.image, np.arange(len(columns.image))
    if n_datasets == 1 or config.pairing == "none" or config.stills:
        return alone
    if columns.position is None:
        return alone
    cluster = paired_clusters(
        columns.dataset, columns.frame, columns.miller_index, columns.position
    )
    n_paired = np.bincount(cluster, minlength=len(cluster))[cluster]
    if (n_paired > 1).mean() < MIN_PAIRED:
        return alone
    logger.info(
        "%.0f %% of the observations are paired across datasets", 100 * np.mean(n_paired > 1)
    )
    return np.unique(columns.frame, return_inverse=True)[1], cluster


def _table(
    data: Sequence[UnmergedData],
    columns: _Columns,
    given: dict[str, Array],
    standard: Standard,
    unit: NDArray[np.int64],
    cluster: NDArray[np.int64],
    order: NDArray[np.int64],
    unique: UniqueRows,
    config: IntensityMergeConfig,
) -> ObservationTable:
    c = columns
    scale = standard.unit_intensity
    intensity, sigma = c.intensity[order] / scale, c.sigma[order] / scale
    units, unit = np.unique(unit[order], return_inverse=True)
    image = np.unique(c.image[order], return_inverse=True)[1]
    level = _image_level(intensity, image)
    base = c.base[order] + (level if config.stills else 0.0)
    strength = intensity / np.exp(level)
    counted = None if c.photon_variance is None else c.photon_variance[order] / scale
    noise = sigma if counted is None else observed_sigma(intensity, sigma, counted)
    signal = np.stack([np.arcsinh(3 * strength), np.arcsinh(intensity / noise) / 3], -1)
    n = len(order)
    is_used = torch.ones(n, dtype=torch.bool)
    observations = Observations(
        torch.as_tensor(intensity),
        torch.as_tensor(sigma),
        torch.as_tensor(image),
        torch.as_tensor(c.dataset[order]),
        torch.as_tensor(unit),
        torch.as_tensor(np.cumsum(np.diff(cluster[order], prepend=cluster[order[0]]) != 0)),
        is_used,
        is_used.clone(),
        torch.as_tensor(signal, dtype=torch.float32),
        None if counted is None else torch.as_tensor(counted),
    )
    multiple = _harmonics(c, order, unique, data) if config.laue else (np.arange(n), None)
    terms = _terms(c, order, multiple, base, given, standard)
    first = np.searchsorted(unit, np.arange(len(units) + 1))
    first_term = np.searchsorted(unit[multiple[0]], np.arange(len(units) + 1))
    images = [
        len(np.unique(c.image[order][c.dataset[order] == k])) for k in range(c.dataset.max() + 1)
    ]
    return ObservationTable(
        observations,
        terms,
        torch.as_tensor(first),
        torch.as_tensor(first_term),
        tuple(images),
        scale,
        standard.names,
        standard,
    )


def _image_level(intensity: Array, image: NDArray[np.int64]) -> Array:
    """Log of the mean positive part of each observation's image, (N,)."""
    mean = np.bincount(image, np.maximum(intensity, 0)) / np.bincount(image)
    return np.log(np.maximum(mean, MIN_LEVEL))[image]


def _harmonics(
    c: _Columns, order: NDArray[np.int64], unique: UniqueRows, data: Sequence[UnmergedData]
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], ...]]:
    """Every harmonic of each observation inside the wavelength range and the resolution limit.

    The order n of index n h0 has wavelength lambda0 / n, h0 the index without common divisor. In a
    narrow beam it is the high orders that overlap: 8 and 9 where the range is 1.02 to 1.18 A.
    """
    index, wavelength = c.miller_index[order], c.wavelength[order]
    low, high = wavelength.min(), wavelength.max()
    divisor = np.gcd.reduce(np.abs(index), axis=1)
    primitive = index // divisor[:, None]
    longest = wavelength * divisor
    found, rows, multiples = [], [], []
    candidate = np.flatnonzero((divisor > 1) | (longest >= 2 * low))
    alone = np.setdiff1d(np.arange(len(order)), candidate)
    found.append(alone)
    rows.append(c.row[order][alone])
    multiples.append(np.ones(len(alone), np.int64))
    finest = min(asu.d_min for asu in unique.asus)
    d_first = c.inv_d2[order] ** -0.5 * divisor  # of order 1
    last = np.maximum(divisor, np.minimum(longest / low, d_first / finest + 1).astype(np.int64))
    for n in range(1, int(last[candidate].max(initial=0)) + 1):
        which = candidate[n <= last[candidate]]
        own = n == divisor[which]
        which = which[own | ((longest[which] / n >= low) & (longest[which] / n <= high))]
        row = np.full(len(which), -1)
        dataset = c.dataset[order][which]
        for k, asu in enumerate(unique.asus):
            inside = dataset == k
            hkl = n * primitive[which[inside]]
            refl = asu.refl_id(hkl) if inside.any() else np.empty(0, np.int64)
            row[inside] = np.where(refl >= 0, refl + unique.first[k], -1)
        which, row = which[row >= 0], row[row >= 0]
        found.append(which)
        rows.append(row)
        multiples.append(np.full(len(which), n))
    found, rows = np.concatenate(found), np.concatenate(rows)
    multiples = np.concatenate(multiples)
    # the index that the file gives comes first
    rank = np.lexsort((multiples != divisor[found], found))
    found, rows, multiples = found[rank], rows[rank], multiples[rank]
    logger.info("%d harmonic overlaps", len(found) - len(order))
    return found, (rows, multiples / divisor[found])


def _terms(
    c: _Columns,
    order: NDArray[np.int64],
    multiple: tuple[NDArray[np.int64], tuple[NDArray[np.int64], ...] | None],
    base: Array,
    given: dict[str, Array],
    standard: Standard,
) -> Terms:
    observation, harmonic = multiple
    source = order[observation]
    row = c.row[source] if harmonic is None else harmonic[0]
    ratio = np.ones(len(source)) if harmonic is None else harmonic[1]
    inv, wavelength = c.inv_d2[source] * ratio**2, c.wavelength[source] / ratio
    own = {RESOLUTION: inv, "Wavelength": wavelength}
    features = [
        standard(name, own[name] if name in own else column[source])
        for name, column in given.items()
    ]
    features.append(standard(LOW_ANGLE, _low_angle(inv)))
    offset = np.zeros(len(source))
    for name in EWALD_OFFSETS:
        if name in given:
            offset = features[list(given).index(name)]
            # which side of the sphere matters little, the distance much
            features.append(np.abs(offset))
    return Terms(
        torch.as_tensor(observation),
        torch.as_tensor(row),
        torch.as_tensor(base[observation]),
        torch.as_tensor(inv),
        torch.as_tensor(wavelength),
        torch.as_tensor(offset),
        torch.as_tensor(np.column_stack(features).astype(np.float32)).clamp(-5.0, 5.0),
    )
