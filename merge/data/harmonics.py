"""Polychromatic beam: harmonics on one spot, Lorentz and polarization factors."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from braggflux.merge.data.columns import Columns
from braggflux.merge.rows import UniqueRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Harmonics:
    """Terms that the observations are sums of, (T,) each, in the order of the observations.

    Parameters
    ----------
    observation : (T,)
    row : (T,)
        Unique reflection.
    ratio : (T,)
        Order over that of the index in the file: 1/d is larger and the wavelength smaller by it.
    """

    observation: NDArray[np.int64]
    row: NDArray[np.int64]
    ratio: NDArray[np.float64]


def log_laue_factor(
    inv_d2: NDArray[np.float64], wavelength: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Log of Lorentz and polarization factor of a still crystal in a polychromatic beam, (T,).

    The integrated intensity is i(lambda) F^2 lambda^4 / sin^2 theta P (Ren & Moffat 1995, J. Appl.
    Cryst. 28, 461), lambda / sin theta = 2 d; P = (1 + cos^2 2 theta) / 2 is the mean around the
    beam, however it is polarized. Over the value at 1 A and d = 2 A without P. The spectrum could
    learn the power of lambda and the network what depends on the place; but the power of d would
    come out as a fall of F with resolution.

    Parameters
    ----------
    inv_d2 : (T,)
        [1/A^2]
    wavelength : (T,)
        [A]
    """
    cosine = 1 - wavelength**2 * inv_d2 / 2  # of 2 theta
    return np.log(wavelength**2 / (4 * inv_d2) * (1 + cosine**2) / 2)


def single_terms(c: Columns, order: NDArray[np.int64]) -> Harmonics:
    """Return one term for each observation."""
    return Harmonics(np.arange(len(order)), c.row[order], np.ones(len(order)))


def harmonics(c: Columns, order: NDArray[np.int64], unique: UniqueRows) -> Harmonics:
    """Every harmonic of each observation inside the wavelength range and the resolution limit.

    The order n of index n h0 has wavelength lambda0 / n, h0 the index without common divisor. In a
    narrow beam it is the high orders that overlap: 8 and 9 where the range is 1.02 to 1.18 A.
    """
    index, wavelength = c.miller_index[order], c.wavelength[order]
    low, high = wavelength.min(), wavelength.max()
    divisor = np.gcd.reduce(np.abs(index), axis=1)
    primitive = index // divisor[:, None]
    longest = wavelength * divisor
    candidate = np.flatnonzero((divisor > 1) | (longest >= 2 * low))
    alone = np.setdiff1d(np.arange(len(order)), candidate)
    parts = [(alone, c.row[order][alone], np.ones(len(alone), np.int64))]
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
        parts.append((which, row, np.full(len(which), n)))
    found, rows, multiples = (np.concatenate(column) for column in zip(*parts, strict=True))
    # the index that the file gives comes first
    rank = np.lexsort((multiples != divisor[found], found))
    found, rows, multiples = found[rank], rows[rank], multiples[rank]
    logger.info("%d harmonic overlaps", len(found) - len(order))
    return Harmonics(found, rows, multiples / divisor[found])
