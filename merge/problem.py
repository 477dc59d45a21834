"""From the readers' observations to the sorted table and the unique rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.crystal.ambiguity import IndexingOperators
from braggflux.integrator.crystal.cell import inv_d2
from braggflux.integrator.crystal.forms import check_one_crystal_form
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.columns import Columns, check_mates, is_kept, join_columns
from braggflux.merge.data.feature_scaling import FeatureScaling
from braggflux.merge.data.harmonics import (
    Harmonics,
    harmonics,
    log_laue_factor,
    single_terms,
)
from braggflux.merge.data.measurement import measurement_of, observed_sigma
from braggflux.merge.data.metadata import features, measure_feature_scaling, metadata_columns
from braggflux.merge.data.overloads import is_overloaded
from braggflux.merge.data.pairing import paired_clusters
from braggflux.merge.data.resolution_limit import end_of_data
from braggflux.merge.data.sweeps import SweepTable, plain_sweep_table, sweep_table
from braggflux.merge.data.table import Observations, ObservationTable, Terms
from braggflux.merge.indexing.operators import Ambiguity, alternative_rows
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.sweep_columns import has_sweeps
from braggflux.merge.rows import UniqueRows

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

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

    @property
    def indexing(self) -> Ambiguity:
        """The indexing ambiguity, of data that have one."""
        if self.ambiguity is None:
            raise ValueError("the data have no indexing ambiguity")
        return self.ambiguity

    def with_choice(self, choice: Tensor, confidence: Tensor) -> MergeProblem:
        """Copy with the operator of each image, (G,), and its probability, (G,)."""
        own = choice[self.table.observations.image][:, None]
        terms = replace(self.table.terms, row=self.indexing.rows.gather(1, own)[:, 0])
        return replace(
            self,
            table=replace(self.table, terms=terms),
            ambiguity=replace(self.indexing, choice=choice, confidence=confidence),
        )


def build_problem(
    data: Sequence[UnmergedData],
    config: MergeConfig,
    parents: Sequence[int | None] | None = None,
    operators: IndexingOperators | None = None,
    feature_scaling: FeatureScaling | None = None,
    unique: UniqueRows | None = None,
) -> MergeProblem:
    """Bind observations to unique rows and sort them by image.

    Parameters
    ----------
    data : sequence of UnmergedData
        One per file.
    config : MergeConfig
    parents : sequence of int or None, optional
        Of each dataset.
    operators : IndexingOperators, optional
        Ways in which each image may be indexed; observations that one of them takes out of the
        asymmetric unit are left out.
    feature_scaling : FeatureScaling, optional
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
        couple = config.prior != "wilson" and asus[0].anomalous
        unique = UniqueRows(asus, parents, couple)
    columns = join_columns(data, unique, config)
    if config.anomalous:
        check_mates(columns.row, unique)
    given = metadata_columns(data, columns, config, feature_scaling)
    kept = is_kept(columns.row, columns.intensity, columns.sigma)
    if config.overloads == "auto":
        kept &= ~is_overloaded(data)
    alternatives = None
    if operators is not None:
        alternatives = alternative_rows(columns.miller_index, columns.dataset, unique, operators)
        kept &= (alternatives >= 0).all(1)
    if not kept.any():
        raise UserError("no observation is inside the resolution limit; give a smaller --d-min")
    exposure_group, cluster = _exposure_groups(columns, config)
    order = np.flatnonzero(kept)
    # within an image by index, so that nothing drawn by row depends on the order in the file
    group = (columns.dataset, cluster, exposure_group) if len(data) > 1 else (exposure_group,)
    keys = (columns.sigma, columns.intensity, *columns.miller_index.T[::-1], *group)
    order = order[np.lexsort([key[order] for key in keys])]
    feature_scaling = feature_scaling or measure_feature_scaling(columns, given, order)
    table = _table(columns, given, feature_scaling, exposure_group, cluster, order, unique, config)
    table = replace(table, sweeps=_sweeps(data, columns, order, config))
    problem = MergeProblem(unique, table, tuple(d.name for d in data), order)
    if alternatives is None or operators is None:
        return problem
    return replace(problem, ambiguity=Ambiguity.of(operators, alternatives[order], table))


def _check(data: Sequence[UnmergedData], config: MergeConfig) -> None:
    check_one_crystal_form(data)
    for d in data:
        if config.laue and not d.is_polychromatic:
            raise UserError(
                f"{d.name} has no wavelength of each reflection, which --laue needs; "
                "give a file with a Wavelength column or leave --laue out"
            )


def _asus(
    data: Sequence[UnmergedData],
    config: MergeConfig,
    operators: IndexingOperators | None = None,
) -> list[ReciprocalAsu]:
    asus = []
    matrices = [np.eye(3, dtype=int)] if operators is None else operators.matrices
    for d in data:
        # of the ways to index a row, the one that needs the finest limit
        finest = np.max([inv_d2(d.miller_index @ m, d.cell) for m in matrices], axis=0)
        d_min = end_of_data([finest], len(d), config.d_min, d.name)
        asus.append(ReciprocalAsu(d.cell, d.space_group, d_min, config.anomalous))
    return asus


def _exposure_groups(
    columns: Columns, config: MergeConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the exposure group and the cluster of each observation, (N,) each.

    When enough spots have a partner (:mod:`braggflux.merge.data.pairing`), the files are exposures
    of the same crystal orientations.
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


def _sweeps(
    data: Sequence[UnmergedData],
    columns: Columns,
    order: NDArray[np.int64],
    config: MergeConfig,
) -> SweepTable | None:
    """Places on sweeps, where all files know them and the scale is to use them."""
    if config.stills or config.laue or not config.physical_scale:
        return None
    metadata = [d.metadata for d in data]
    if columns.position is not None and has_sweeps(metadata):
        return sweep_table(metadata, columns.position, columns.inv_d2, order)
    logger.info(
        "the files do not say where observations lie on their sweeps (spot positions, orientation "
        "and phi in batch headers): the scale goes by their batches%s",
        "" if columns.position is None else " and positions on the detector",
    )
    rotation = None
    if all("ROT" in d for d in metadata):
        rotation = np.concatenate([np.asarray(d["ROT"], float) for d in metadata])
    return plain_sweep_table(columns, rotation, order)


def _table(
    columns: Columns,
    given: Mapping[str, Array],
    feature_scaling: FeatureScaling,
    exposure_group: NDArray[np.int64],
    cluster: NDArray[np.int64],
    order: NDArray[np.int64],
    unique: UniqueRows,
    config: MergeConfig,
) -> ObservationTable:
    c = columns
    scale = feature_scaling.unit_intensity
    intensity, sigma = c.intensity[order] / scale, c.sigma[order] / scale
    groups, exposure_group = np.unique(exposure_group[order], return_inverse=True)
    _, first_row, image = np.unique(c.image[order], return_index=True, return_inverse=True)
    level = _image_level(intensity, image)
    base = c.base[order] + (level if config.stills else 0.0)
    strength = intensity / np.exp(level)
    counted = None if c.photon_variance is None else c.photon_variance[order] / scale
    noise = sigma if counted is None else observed_sigma(intensity, sigma, counted)
    signal = np.stack([np.arcsinh(3 * strength), np.arcsinh(intensity / noise) / 3], -1)
    n = len(order)
    is_used = torch.ones(n, dtype=torch.bool)
    observations = Observations(
        measurement_of(intensity, sigma, counted),
        torch.as_tensor(image),
        torch.as_tensor(c.dataset[order]),
        torch.as_tensor(exposure_group),
        torch.as_tensor(np.cumsum(np.diff(cluster[order], prepend=cluster[order[0]]) != 0)),
        is_used,
        is_used.clone(),
        torch.as_tensor(signal, dtype=torch.float32),
    )
    sums = harmonics(c, order, unique) if config.laue else single_terms(c, order)
    terms = _terms(c, order, sums, base, given, feature_scaling, config.laue and config.laue_lp)
    first = np.searchsorted(exposure_group, np.arange(len(groups) + 1))
    first_term = np.searchsorted(exposure_group[sums.observation], np.arange(len(groups) + 1))
    # images that are neighbours: of one dataset, and of one member where it is a group
    part = np.stack([c.dataset, c.member])[:, order[first_row]]
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(part) != 0).any(0)]))
    images = np.diff([*starts, part.shape[1]]).tolist()
    return ObservationTable(
        observations,
        terms,
        torch.as_tensor(first),
        torch.as_tensor(first_term),
        tuple(images),
        scale,
        feature_scaling.names,
        feature_scaling,
    )


def _image_level(intensity: Array, image: NDArray[np.int64]) -> Array:
    """Log of the mean positive part of each observation's image, (N,)."""
    mean = np.bincount(image, np.maximum(intensity, 0)) / np.bincount(image)
    return np.log(np.maximum(mean, MIN_LEVEL))[image]


def _terms(
    c: Columns,
    order: NDArray[np.int64],
    sums: Harmonics,
    base: Array,
    given: Mapping[str, Array],
    feature_scaling: FeatureScaling,
    is_raw_laue: bool,
) -> Terms:
    source = order[sums.observation]
    inv, wavelength = c.inv_d2[source] * sums.ratio**2, c.wavelength[source] / sums.ratio
    seen, offset = features(given, feature_scaling, source, inv, wavelength)
    known = base[sums.observation]
    if is_raw_laue:
        known = known + log_laue_factor(inv, wavelength)
    return Terms(
        torch.as_tensor(sums.observation),
        torch.as_tensor(sums.row),
        torch.as_tensor(known),
        torch.as_tensor(inv),
        torch.as_tensor(wavelength),
        torch.as_tensor(offset),
        torch.as_tensor(seen).clamp(-5.0, 5.0),
    )
