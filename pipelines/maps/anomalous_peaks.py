"""Peak heights of the anomalous difference map at the sites of a model.

See :mod:`braggflux.pipelines.maps.difference_map` for the coefficients.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal.cell import inv_d2
from braggflux.integrator.crystal.symmetry import as_miller_index, is_centric, is_in_asu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.mtz import MergedTable, read_merged_mtz
from braggflux.pipelines.maps.atomic_model import (
    LENGTH_TOLERANCE,
    check_same_crystal,
    find_sites,
    read_model,
    structure_factors,
)
from braggflux.pipelines.maps.difference_map import DifferenceMap, NoMapError, difference_map

Array = NDArray[np.float64]
logger = logging.getLogger(__name__)


OWN, COUPLED = "own", "coupled"


@dataclass(frozen=True)
class SitePeak:
    """Height of the map at a site.

    Parameters
    ----------
    chain, seqid, residue, atom : str
    peak_sigma : float or None
        In the map of the coupled differences where there are any, else as ``peak_sigma_own``; None
        for the ``reason`` given.
    reason : str
    difference : str
        What ``peak_sigma`` is of. ``coupled``: DANO, the posterior of mates that a prior ties, as
        it is; ``own``: F(+) - F(-), each from its own observations, weighted by their errors.
    peak_sigma_own : float or None
        In the map of the weighted F(+) - F(-).
    """

    chain: str
    seqid: str
    residue: str
    atom: str
    peak_sigma: float | None
    reason: str = ""
    difference: str = OWN
    peak_sigma_own: float | None = None

    def __post_init__(self) -> None:
        """Set the own height where there is no other."""
        if self.difference == OWN:
            object.__setattr__(self, "peak_sigma_own", self.peak_sigma)

    @property
    def label(self) -> str:
        """Short name, like ``A/IOD204:I``."""
        return f"{self.chain}/{self.residue}{self.seqid}:{self.atom}"


class AnomalousModel:
    """Phases and sites of a model, ready to score many data sets of one crystal.

    Parameters
    ----------
    model_path : str or Path
        PDB or mmCIF.
    cell : gemmi.UnitCell
        Of the data.
    space_group : gemmi.SpaceGroup
        Of the data.
    d_min : float
        Finest resolution [A] that will be asked for.
    elements : collection of str, optional
        Elements whose atoms are sites; phosphorus and heavier without it.

    Attributes
    ----------
    sites : list of Site
    why_no_sites : str
        Reason when ``sites`` is empty.

    Raises
    ------
    UserError
        The model cannot be read, has no atoms, or is of another cell or space group.
    """

    def __init__(
        self,
        model_path: str | Path,
        cell: gemmi.UnitCell,
        space_group: gemmi.SpaceGroup,
        d_min: float,
        elements: Collection[str] | None = None,
    ) -> None:
        structure = read_model(model_path)
        check_same_crystal(structure, cell, space_group, model_path)
        self.cell, self.space_group, self.d_min = cell, space_group, d_min
        self.sites = find_sites(structure, elements)
        self.why_no_sites = ""
        if not self.sites:
            wanted = "P or heavier" if elements is None else ", ".join(sorted(elements))
            self.why_no_sites = f"{model_path} has no anomalous scatterer ({wanted})"
            logger.warning("no peak heights: %s", self.why_no_sites)
        # the margin: what is inside d_min in the data's cell may be outside in the model's
        hkl, value = structure_factors(structure, d_min * (1 - LENGTH_TOLERANCE))
        self._limit = int(np.abs(hkl).max())
        order = np.argsort(self._key(hkl))
        self._sorted_key, self._phase = self._key(hkl)[order], np.angle(value)[order]

    def phases(self, hkl: ArrayLike) -> Array:
        """Model phases [rad], (N,); NaN outside ``d_min`` and for absent reflections.

        Parameters
        ----------
        hkl : array_like, (N, 3) int
            In the CCP4 asymmetric unit.
        """
        index = as_miller_index(hkl)
        if not is_in_asu(index, self.space_group).all():
            raise ValueError("hkl must lie in the CCP4 asymmetric unit")
        inside = (np.abs(index) <= self._limit).all(axis=1)
        key = self._key(np.where(inside[:, None], index, 0))
        row = np.minimum(np.searchsorted(self._sorted_key, key), len(self._sorted_key) - 1)
        found = inside & (self._sorted_key[row] == key)
        return np.where(found, self._phase[row], np.nan)

    def _key(self, hkl: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        n = 2 * self._limit + 1
        h, k, l = np.asarray(hkl, dtype=np.int64).T + self._limit
        return (h * n + k) * n + l

    def difference_map(
        self,
        hkl: ArrayLike,
        f_plus: ArrayLike,
        sigma_plus: ArrayLike,
        f_minus: ArrayLike,
        sigma_minus: ArrayLike,
        d_min: float | None = None,
    ) -> DifferenceMap:
        """Compute the map of one data set.

        Parameters
        ----------
        hkl : array_like, (N, 3) int
            In the CCP4 asymmetric unit; ``f_plus`` is the amplitude of this index.
        f_plus, sigma_plus, f_minus, sigma_minus : array_like, (N,)
            Amplitudes; centric reflections and rows with NaN or without positive sigmas are left
            out.
        d_min : float, optional
            Leave out finer reflections [A].

        Raises
        ------
        NoMapError
            Too few pairs, or no differences at all.
        """
        columns = (np.asarray(x, dtype=float) for x in (f_plus, sigma_plus, f_minus, sigma_minus))
        f_plus, sigma_plus, f_minus, sigma_minus = columns
        difference, variance = f_plus - f_minus, sigma_plus**2 + sigma_minus**2
        is_known = np.isfinite(variance) & (sigma_plus > 0) & (sigma_minus > 0)
        difference = np.where(is_known, difference, np.nan)
        return self._map(hkl, difference, variance, d_min)

    def coupled_map(
        self, hkl: ArrayLike, difference: ArrayLike, d_min: float | None = None
    ) -> DifferenceMap:
        """Compute the map of differences that a prior has shrunk already, without weights.

        Parameters
        ----------
        hkl, d_min
            As :meth:`difference_map`.
        difference : array_like, (N,)
            ``|F+| - |F-|``; NaN is left out.

        Raises
        ------
        NoMapError
            Too few pairs, or no differences at all.
        """
        return self._map(hkl, np.asarray(difference, dtype=float), None, d_min)

    def _map(
        self, hkl: ArrayLike, difference: Array, variance: Array | None, d_min: float | None
    ) -> DifferenceMap:
        index, phase = as_miller_index(hkl), self.phases(hkl)
        ok = np.isfinite(difference) & np.isfinite(phase)
        ok &= ~is_centric(index, self.space_group)
        if d_min is not None:
            ok &= inv_d2(index, self.cell) * d_min**2 <= 1 + 1e-6
        variance = None if variance is None else variance[ok]
        return difference_map(
            self.cell, self.space_group, index[ok], difference[ok], variance, phase[ok]
        )

    def score(self, table: MergedTable, d_min: float | None = None) -> list[SitePeak]:
        """Score the sites in a merged table, by its coupled differences where they give a map.

        Parameters
        ----------
        table : MergedTable
        d_min : float, optional
            Leave out finer reflections [A].
        """
        own = self.peak_heights(table.miller_index, *amplitudes(table), d_min=d_min)
        if not own or not table.has_coupled_differences:
            return own
        try:
            density = self.coupled_map(table.miller_index, table.difference, d_min)
        except NoMapError:  # all are 0 where no step has parted the mates
            return own
        return [
            replace(
                p,
                peak_sigma=coupled.peak_sigma,
                reason="",
                difference=COUPLED,
                peak_sigma_own=p.peak_sigma,
            )
            for p, coupled in zip(own, self.peaks_in(density), strict=True)
        ]

    def peak_heights(
        self,
        hkl: ArrayLike,
        f_plus: ArrayLike,
        sigma_plus: ArrayLike,
        f_minus: ArrayLike,
        sigma_minus: ArrayLike,
        d_min: float | None = None,
    ) -> list[SitePeak]:
        """Score the sites by F(+) - F(-); parameters as :meth:`difference_map`.

        Data that give no map give peaks without a height, with the reason. A model without sites
        gives an empty list.
        """
        if not self.sites:
            return []
        try:
            density = self.difference_map(hkl, f_plus, sigma_plus, f_minus, sigma_minus, d_min)
        except NoMapError as error:
            return [SitePeak(*site.name, None, str(error)) for site in self.sites]
        return self.peaks_in(density)

    def peaks_in(self, density: DifferenceMap) -> list[SitePeak]:
        """Score the sites in a map that is already there."""
        return [
            SitePeak(*site.name, max(density.height_near(x) for x in site.fractional))
            for site in self.sites
        ]


def amplitudes(table: MergedTable) -> tuple[Array, Array, Array, Array]:
    """F(+), sigma, F(-), sigma of a merged table, from its intensities where it has no amplitudes.

    ``F = sqrt(I)`` and ``sigma_F = sqrt(I + sigma_I) - F`` for I > 0; weaker ones become 0,
    with the same formula.
    """
    if np.isfinite(table.f_plus).any() or not np.isfinite(table.i_plus).any():
        return table.f_plus, table.sigma_f_plus, table.f_minus, table.sigma_f_minus
    columns = []
    for i, sigma_i in ((table.i_plus, table.sigma_i_plus), (table.i_minus, table.sigma_i_minus)):
        positive = np.maximum(i, 0.0)  # NaN stays NaN
        columns += [np.sqrt(positive), np.sqrt(positive + sigma_i) - np.sqrt(positive)]
    return tuple(columns)


def peak_heights_from_mtz(
    mtz_path: str | Path,
    model_path: str | Path,
    *,
    d_min: float | None = None,
    elements: Collection[str] | None = None,
) -> list[SitePeak]:
    """Score a merged MTZ file against a model, by its coupled differences where it has any.

    Raises
    ------
    UserError
        A file cannot be used, Friedel mates were merged together, or the crystals differ.
    """
    merged = read_merged_mtz(mtz_path)
    if not merged.table.is_anomalous:
        raise UserError(
            f"{mtz_path} has no F(+)/F(-) or I(+)/I(-) columns, so no Bijvoet differences; "
            "merge with Friedel mates kept apart (--anomalous)"
        )
    finest = float(inv_d2(merged.table.miller_index, merged.cell).max() ** -0.5)
    if d_min is not None and d_min > 0:
        finest = max(finest, d_min)
    model = AnomalousModel(model_path, merged.cell, merged.space_group, finest, elements)
    return model.score(merged.table, d_min)
