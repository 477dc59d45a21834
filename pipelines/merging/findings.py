"""Findings of a merge that its user should look at, in a line each."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.fit.steps import Steps
from braggflux.merge.indexing.higher_symmetry import point_group_with, relations
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.amplitudes import fresh_crystal_factor
from braggflux.merge.output.merged_table import MergedTable
from braggflux.merge.output.odd_images import odd_images
from braggflux.merge.output.same_photons import SAME_PHOTONS, residual_over_noise
from braggflux.merge.prior.reference import Reference

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

#: Images that are named.
MOST_NAMED = 10


def say_images(
    merger: Merger,
    table: ObservationTable,
    numbers: NDArray,
    names: tuple[str, ...],
    is_still: bool,
) -> None:
    """Name the images that do not fit.

    Parameters
    ----------
    merger : Merger
        On the CPU.
    table : ObservationTable
    numbers : (G,)
        Of the images in their files.
    names : tuple of str
        Of the datasets.
    is_still : bool
    """
    found = odd_images(merger, table, is_still)
    if found.faint:
        logger.warning(
            "%d of %d images are much brighter or fainter than their neighbours (scale over "
            "theirs): %s",
            *(len(found.faint), len(numbers), _named(found.faint, table, numbers, names)),
        )
    if found.alien:
        logger.warning(
            "%d of %d images do not agree with the rest (squared residuals over what the error "
            "model expects; indexed otherwise, or of another crystal?): %s",
            *(len(found.alien), len(numbers), _named(found.alien, table, numbers, names)),
        )


def say_steps(
    steps: Steps, table: ObservationTable, numbers: NDArray, names: tuple[str, ...]
) -> None:
    """Name the images where the beam was another; parameters as of :func:`say_images`."""
    logger.warning(
        "%d of %d images have levels of their own, far from the drift of their sweep (scale over "
        "it): %s; %s",
        *(len(steps.levels), len(numbers), _named(steps.levels, table, numbers, names)),
        f"{len(steps.rows)} observations that lie on them in part are left out"
        if len(steps.rows)
        else "reflections that lie on them in part are kept",
    )


def _named(
    values: dict[int, float], table: ObservationTable, numbers: NDArray, names: tuple[str, ...]
) -> str:
    """Name images, given by their numbers in the table, each with its value."""
    o = table.observations
    dataset = o.dataset.numpy()[np.unique(o.image.numpy(), return_index=True)[1]]
    of = [f" of {names[k]}" if len(names) > 1 else "" for k in dataset]
    shown = [
        f"{int(numbers[k])}{of[k]} ({value:.2g})"
        for k, value in sorted(values.items())[:MOST_NAMED]
    ]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def model_rows(merger: Merger, rows: slice) -> tuple[Array, Array]:
    """Return the expected F^2 of some rows without and with a prior model (NaN for none), (R,)."""
    spread = merger.prior.spread() * fresh_crystal_factor(merger)
    spread = spread.detach().cpu().numpy()[rows]
    if not merger.prior.has(Reference):
        return spread, np.full_like(spread, np.nan)
    return spread, spread * merger.prior.part(Reference).e_calc.cpu().numpy()[rows] ** 2


def say_of_dataset(
    name: str,
    asu: ReciprocalAsu,
    merged: MergedTable,
    spread: Array,
    reference: Array,
    config: MergeConfig,
) -> None:
    """Log what the merged intensities of one dataset show.

    Parameters
    ----------
    name : str
    asu : ReciprocalAsu
    merged : MergedTable
    spread, reference : (R,)
        Of :func:`model_rows`.
    config : MergeConfig
    """
    say_symmetry(name, asu, merged, spread, config.ambiguity_tolerance)
    if np.isfinite(reference).any():
        say_same_photons(name, asu, merged, reference)


def say_symmetry(
    name: str, asu: ReciprocalAsu, merged: MergedTable, spread: Array, tolerance: float
) -> None:
    """Log the rotations of the lattice that the intensities obey beyond their space group.

    Parameters
    ----------
    name : str
        Of the dataset.
    asu : ReciprocalAsu
    merged : MergedTable
    spread : (R,)
        Expected F^2 of the rows of ``asu``, on any scale.
    tolerance : float
        See :func:`braggflux.merge.indexing.higher_symmetry.relations`.
    """
    rows = asu.refl_id(merged.miller_index)
    value, sigma = np.full(len(asu), np.nan), np.full(len(asu), np.nan)
    mean = np.nanmean(merged.i_mean / spread[rows])  # units of the file over those of the table
    for own in (rows, asu.friedel_mate[rows]):
        value[own] = merged.i_mean / spread[rows] / mean
        sigma[own] = merged.sigma_i_mean / spread[rows] / mean
    obeyed = [r for r in relations(asu, value, sigma, tolerance) if r.is_symmetry]
    if not obeyed:
        return
    acentric = rows[~asu.is_centric[rows]]
    e2 = value[acentric][np.isfinite(value[acentric])]
    moment = (np.mean(e2**2) - np.nanmean(sigma[acentric] ** 2)) / np.mean(e2) ** 2
    larger = point_group_with(asu.space_group, [r.matrix for r in obeyed])
    logger.warning(
        "%s: intensities obey %s too (correlation, and what noise allows): the symmetry may be "
        "higher than %s%s, or the crystal twinned by it nearly one to one, or indexed both ways; "
        "<I^2>/<I>^2 of acentrics is %.2f (2 without twinning, 1.5 for a perfect twin)",
        name,
        ", ".join(f"{r.name} ({r.correlation:.3f} of {r.largest:.3f})" for r in obeyed),
        asu.space_group.xhm(),
        f" (point group {larger})" if larger else "",
        moment,
    )


def say_same_photons(name: str, asu: ReciprocalAsu, merged: MergedTable, reference: Array) -> None:
    """Warn when a reference agrees with the data better than their noise allows.

    Parameters
    ----------
    name : str
        Of the dataset.
    asu : ReciprocalAsu
    merged : MergedTable
        Its intensities are free of the reference.
    reference : (R,)
        Its F^2 at the rows of ``asu``; NaN for none.
    """
    rows = asu.refl_id(merged.miller_index)
    ratio = residual_over_noise(
        merged.i_mean, merged.sigma_i_mean, reference[rows], asu.d[rows] ** -2
    )
    if ratio < SAME_PHOTONS:
        logger.warning(
            "%s: the prior model agrees with the data better than their errors allow (squared "
            "residuals %.2f of what independent data would have): it was made from them, and the "
            "same photons count twice; F and SIGF are too sure, so merge without --prior-model",
            *(name, ratio),
        )
