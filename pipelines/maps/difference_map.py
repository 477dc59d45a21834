"""Anomalous difference maps from amplitudes and phases.

The coefficients are ``w (|F+| - |F-|) exp(i (phi - 90 deg))`` over acentric reflections: the
imaginary part of the scattering of an atom turns the phase of its contribution by 90 degrees, so
that a map of the differences peaks at the anomalous scatterers (Strahs & Kraut 1968). The weight
is that of the linear estimate with least mean square error, ``w = S^2 / (S^2 + sigma^2)``, with
the mean square ``S^2`` of the true differences estimated shell by shell. A difference that a prior
has shrunk already (DANO of a coupled merge) is such an estimate itself and has the weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.crystal.cell import inv_d2
from braggflux.pipelines.maps.atomic_model import Site

Array = NDArray[np.float64]

#: Fewer Bijvoet pairs give no map worth the name.
MIN_PAIRS = 50
#: Pairs that one estimate of S^2 is made of.
PAIRS_PER_SHELL = 300
#: Differences beyond this many robust standard deviations of their shell are pulled in.
CLIP = 5.0
#: S^2 is at least this part of a shell's mean square difference: weights of shells whose sigmas
#: are too large, or whose differences a prior has shrunk, tend to 1 / sigma^2 instead of to 0.
LEAST_SIGNAL = 0.05
#: Median of the chi-square distribution with one degree of freedom.
CHI2_MEDIAN = 0.45493642311957283
SEARCH_RADIUS = 1.0  # [A] around an atom


class NoMapError(ValueError):
    """The data do not allow a map; the message says why."""


@dataclass(frozen=True)
class MapPeak:
    """A maximum of the map, wherever it is.

    ``nearest`` is the label of the closest site (over symmetry mates) and ``distance`` how far it
    is [A]; empty and infinite without sites.
    """

    peak_sigma: float
    fractional: tuple[float, float, float]
    nearest: str
    distance: float


@dataclass(frozen=True)
class DifferenceMap:
    """Anomalous difference map in units of its own root mean square.

    Parameters
    ----------
    grid : gemmi.FloatGrid
    n_pairs : int
        Bijvoet pairs that went in.
    d_min : float
        Of those pairs [A].
    """

    grid: gemmi.FloatGrid
    n_pairs: int
    d_min: float

    def height_near(self, fractional: ArrayLike, radius: float = SEARCH_RADIUS) -> float:
        """Highest value within ``radius`` [A] of a point, by tricubic interpolation."""
        start = self.grid.unit_cell.orthogonalize(gemmi.Fractional(*np.asarray(fractional)))
        centre = np.array(start.tolist())
        coarse, best = self._highest(centre + _ball(radius, 0.2))
        around = best + _ball(0.2, 0.05)
        around = around[np.linalg.norm(around - centre, axis=1) <= radius]
        return max(coarse, self._highest(around)[0] if len(around) else coarse)

    def _highest(self, positions: Array) -> tuple[float, Array]:
        values = [self.grid.tricubic_interpolation(gemmi.Position(*p)) for p in positions.tolist()]
        best = int(np.argmax(values))
        return float(values[best]), positions[best]

    def strongest_peaks(
        self, n: int, sites: Sequence[Site] = (), cutoff: float = 5.0
    ) -> list[MapPeak]:
        """List the ``n`` highest separate peaks above ``cutoff`` and the site nearest to each."""
        blobs = gemmi.find_blobs_by_flood_fill(
            self.grid, cutoff=cutoff, min_volume=0.0, min_score=0.0, min_peak=0.0
        )
        cell = self.grid.unit_cell
        peaks = []
        for blob in sorted(blobs, key=lambda b: -b.peak_value)[:n]:
            distances = [
                (_distance(self.grid, blob.peak_pos, x), site.label)
                for site in sites
                for x in site.fractional
            ]
            distance, label = min(distances, default=(float("inf"), ""))
            at = cell.fractionalize(blob.peak_pos)
            peaks.append(MapPeak(float(blob.peak_value), (at.x, at.y, at.z), label, distance))
        return peaks


def _distance(grid: gemmi.FloatGrid, position: gemmi.Position, fractional: Array) -> float:
    """Shortest distance [A] between a position and the symmetry mates of a point."""
    cell = grid.unit_cell
    here = np.array(cell.fractionalize(position).tolist())
    metric = np.array(cell.orth.mat.tolist())
    best = float("inf")
    for operation in grid.spacegroup.operations():
        delta = np.array(operation.apply_to_xyz(fractional.tolist())) - here
        delta -= np.round(delta)
        best = min(best, float(np.linalg.norm(metric @ delta)))
    return best


def _ball(radius: float, step: float) -> Array:
    """Points of a cubic lattice inside a sphere, (n, 3), the centre among them."""
    n = int(np.floor(radius / step + 1e-9))
    line = np.arange(-n, n + 1) * step
    points = np.stack(np.meshgrid(line, line, line), axis=-1).reshape(-1, 3)
    return points[np.linalg.norm(points, axis=1) <= radius + 1e-9]


def difference_map(
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    hkl: NDArray[np.int32],
    difference: Array,
    variance: Array | None,
    phase: Array,
) -> DifferenceMap:
    """Compute the map of Bijvoet differences of acentric reflections.

    Parameters
    ----------
    cell : gemmi.UnitCell
    space_group : gemmi.SpaceGroup
    hkl : (N, 3) int32
        Acentric, in the CCP4 asymmetric unit.
    difference, variance : (N,)
        ``|F+| - |F-|`` and its variance > 0; without variance the differences are neither weighted
        nor clipped.
    phase : (N,)
        Of F+ of the model, without anomalous scattering [rad].

    Raises
    ------
    NoMapError
        Too few pairs, or no differences at all.
    """
    if len(hkl) < MIN_PAIRS:
        raise NoMapError(f"only {len(hkl)} acentric Bijvoet pairs, {MIN_PAIRS} needed")
    if not np.any(difference):
        raise NoMapError("all Bijvoet differences are zero")
    s2 = inv_d2(hkl, cell)
    amplitude = difference
    if variance is not None:
        amplitude = weighted_differences(difference, variance, s2)
    coefficient = (amplitude * np.exp(1j * (phase - np.pi / 2))).astype(np.complex64)
    data = gemmi.ComplexAsuData(cell, space_group, np.ascontiguousarray(hkl), coefficient)
    grid = data.transform_f_phi_to_map(sample_rate=3.0)
    grid.normalize()
    return DifferenceMap(grid, len(hkl), float(s2.max() ** -0.5))


def weighted_differences(difference: Array, variance: Array, s2: Array) -> Array:
    """Clip and weight Bijvoet differences, shell by shell.

    Parameters
    ----------
    difference, variance : (N,)
    s2 : (N,)
        1 / d^2; only its order matters.
    """
    n_shells = max(1, len(difference) // PAIRS_PER_SHELL)
    result = np.zeros(len(difference))
    for shell in np.array_split(np.argsort(s2, kind="stable"), n_shells):
        x, var = difference[shell], variance[shell]
        mean_square = np.median(x**2) / CHI2_MEDIAN
        if mean_square == 0.0:  # more than half are exactly zero
            mean_square = np.mean(x**2)
        signal = max(_signal_variance(x, var), LEAST_SIGNAL * mean_square)
        if signal > 0.0:
            limit = CLIP * np.sqrt(mean_square)
            result[shell] = np.clip(x, -limit, limit) * signal / (signal + var)
    return result


def _signal_variance(x: Array, variance: Array) -> float:
    """S^2 for which the median of ``x^2 / (S^2 + variance)`` is that of chi-square; 0 if none."""

    def excess(signal: float) -> float:
        return float(np.median(x**2 / (signal + variance))) - CHI2_MEDIAN

    from scipy.optimize import brentq  # `merge` without a model does without

    if excess(0.0) <= 0.0:
        return 0.0
    return float(brentq(excess, 0.0, float(np.max(x**2)) / CHI2_MEDIAN, rtol=1e-4))
