"""Photons of what a detector recorded, and when there are none to count.

The .expt decides which values are measured and what they are worth, as in dxtbx: the trusted
range, pedestal and gain of the panel, or the maps of the image set in their place. The likelihood
needs counted photons, whole and not below zero. Values between whole photons are made whole
without changing their mean; a detector whose read-out noise reaches below zero is refused: its
negative values left out, the mean of the others would be too high.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError

log = logging.getLogger(__name__)

INVALID = int(np.iinfo(np.int32).min)
"""In raw frames: the detector says that there is no value (a mask code, not a number)."""
NO_COUNT = -1
"""In frames of photons: no count, or one that is not trusted."""
TOLERATED = 1e-4
"""Share of a frame's pixels that may be negative and left out: the mean moves by about as much."""
ROUNDING = 0.005
"""Relative change of the mean up to which values are rounded to the nearest whole photon."""
_LARGEST = int(np.iinfo(np.int32).max)
_CODES = (-1, -2)  # of signed images: gaps, dead and hot pixels
_FEW = 9.5  # photons; above, rounding no longer matters

Pixels = NDArray[np.int32] | NDArray[np.floating[Any]]
PerPixel = float | NDArray[np.float64]


class PhotonScale:
    """What the values of one panel mean.

    Parameters
    ----------
    trusted_range : (float, float)
        [ADU], as in the .expt. Up to DIALS 3.12 both ends are the first values that are *not*
        trusted, and photon counters start at -1; since 3.13 they are trusted, and counters start
        at 0. Hence a negative lower end means the former, any other the latter. An empty range
        trusts nothing.
    gain : float or ndarray, (slow, fast)
        ADU per photon.
    pedestal : float or ndarray, (slow, fast)
        [ADU]

    Attributes
    ----------
    is_calibrated : ndarray of bool, () or (slow, fast)
        Where gain and pedestal can be used: not where they are no number, or the gain is not
        positive.
    last : int
        Highest trusted value, of whole ones [ADU].
    keeps_counts : bool
        Whether whole values up to ``last`` are photons, and all of them trusted.
    """

    def __init__(
        self,
        trusted_range: tuple[float, float],
        gain: PerPixel = 1.0,
        pedestal: PerPixel = 0.0,
    ) -> None:
        self.low, self.high = low, high = trusted_range
        # of whole numbers: integers compare twice as fast as they do with floating numbers
        first, last = (
            (np.floor(low) + 1, np.ceil(high) - 1) if low < 0 else (np.ceil(low), np.floor(high))
        )
        self._first, self.last = int(max(first, INVALID + 1)), int(min(last, _LARGEST))
        self.is_calibrated = np.isfinite(gain) & np.isfinite(pedestal) & (np.asarray(gain) > 0)
        self._gain = np.where(self.is_calibrated, gain, 1.0)
        self._pedestal = np.where(self.is_calibrated, pedestal, 0.0)
        self._is_identity = bool(np.all(gain == 1.0) and np.all(pedestal == 0.0))

    @property
    def keeps_counts(self) -> bool:  # noqa: D102 - an attribute to its users
        return self._is_identity and self._first <= 0 and not self.is_empty

    @property
    def is_empty(self) -> bool:
        """Whether no value is trusted."""
        return self.high <= max(self.low, 0.0)

    def is_trusted(self, adu: Pixels) -> NDArray[np.bool_]:
        """Whether values are measured ones."""
        if self.is_empty:
            return np.zeros(adu.shape, dtype=bool)
        if adu.dtype.kind == "i":
            return (adu >= self._first) & (adu <= self.last)
        above = adu > max(self.low, INVALID) if self.low < 0 else adu >= self.low
        return above & ~self.is_overload(adu)

    def is_overload(self, adu: Pixels) -> NDArray[np.bool_]:
        """Whether values lie above the trusted range."""
        if adu.dtype.kind == "i":
            return adu > self.last
        return adu >= self.high if self.low < 0 else adu > self.high

    def is_whole(self, adu: Pixels) -> bool:
        """Whether values are whole photons as they are."""
        return self._is_identity and adu.dtype.kind == "i"

    def scaled(self, adu: Pixels) -> Pixels:
        """Return photons, not made whole."""
        return adu if self.is_whole(adu) else (adu.astype(float) - self._pedestal) / self._gain

    def photons(self, adu: Pixels, dither: np.random.Generator | None = None) -> NDArray[np.int32]:
        """Return whole photons, the trusted range not applied.

        Parameters
        ----------
        adu : ndarray, (slow, fast)
        dither : numpy.random.Generator, optional
            Round up with a probability that is the fraction, instead of to the nearest.
        """
        if self.is_whole(adu):
            return adu.astype(np.int32)
        exact = self.scaled(adu)
        whole = np.rint(exact) if dither is None else np.floor(exact + dither.random(exact.shape))
        limits = np.iinfo(np.int32)
        return whole.clip(limits.min, limits.max).astype(np.int32)


def rounding_changes_mean(exact: Sequence[Pixels]) -> bool:
    """Whether rounding to the nearest whole photon would bias few photons.

    It does not where the detector resolves single photons: values then scatter evenly around
    whole numbers. It does where the charge of photons is spread, or the gain is a mean one.

    Parameters
    ----------
    exact : sequence of ndarray
        Trusted photons of one frame, not made whole.
    """
    few = np.concatenate([values[np.abs(values) < _FEW].ravel() for values in exact])
    near = np.rint(few)
    # by number of photons, so that no bias cancels another
    bias = np.bincount(near.astype(int) + int(_FEW) + 1, weights=few - near)
    return bool(np.abs(bias).sum() > ROUNDING * np.abs(few).sum())


class NegativeCounts:
    """Refuses frames whose noise reaches below zero; lets the codes of bad pixels pass.

    A bad pixel has the same negative value on every image, noise has not. Outside of the trusted
    range -1 and -2 are codes, whatever they do.

    Parameters
    ----------
    name : str
        Of the images, for the message.
    scales : sequence of PhotonScale
        One per panel.
    """

    def __init__(self, name: str, scales: Sequence[PhotonScale]) -> None:
        self._name, self._scales = name, scales
        self._is_code: list[NDArray[np.bool_]] | None = None
        self._has_spoken = False

    def check(
        self,
        image: int,
        values: Sequence[Pixels],
        usable: Sequence[NDArray[np.bool_]],
        photons: Sequence[NDArray[np.int32]],
        another: Callable[[], Sequence[Pixels] | None],
    ) -> None:
        """Look for negative counts on a frame.

        Parameters
        ----------
        image : int
            Number of the image, for the message.
        values : sequence of ndarray, (slow, fast)
            Raw frame [ADU].
        usable : sequence of ndarray, (slow, fast) bool
            Static mask.
        photons : sequence of ndarray, (slow, fast)
            Of ``values``, the trusted range not applied.
        another : callable
            Returns the raw frame of another image, None where there is none.

        Raises
        ------
        UserError
            When more than :data:`TOLERATED` of the usable pixels are.
        """
        negative = [
            mask & self._is_negative(adu, counts, scale)
            for adu, mask, counts, scale in zip(values, usable, photons, self._scales, strict=True)
        ]
        n_usable = sum(map(np.count_nonzero, usable))
        allowed = TOLERATED * n_usable
        n_negative = sum(map(np.count_nonzero, negative))
        if n_negative <= allowed:
            if n_negative and not self._has_spoken:
                self._has_spoken = True
                log.info(
                    "%s: image %d has %d negative of %d pixels; as few as these are left out",
                    *(self._name, image, n_negative, n_usable),
                )
            return
        if self._is_code is None:
            other = another()
            self._is_code = [
                np.isin(adu, _CODES) if other is None else adu == other[i]
                for i, adu in enumerate(values)
            ]
        noise = [n & ~code for n, code in zip(negative, self._is_code, strict=True)]
        n_noise = sum(map(np.count_nonzero, noise))
        if n_noise > allowed:
            lowest = min(c[n].min() for c, n in zip(photons, noise, strict=True) if n.any())
            self._refuse(image, n_noise, n_usable, int(lowest))

    @staticmethod
    def _is_negative(
        adu: Pixels, photons: NDArray[np.int32], scale: PhotonScale
    ) -> NDArray[np.bool_]:
        below = (photons < 0) & (adu != INVALID)
        if not below.any():
            return below
        return below & (scale.is_trusted(adu) | ((adu < 0) & ~np.isin(adu, _CODES)))

    def _refuse(self, image: int, n_noise: int, n_usable: int, lowest: int) -> None:
        low, high = self._scales[0].low, self._scales[0].high
        raise UserError(
            f"{self._name}: image {image} has {n_noise} of {n_usable} pixels "
            f"({n_noise / n_usable:.2%}) below zero, down to {lowest} photons (trusted range of "
            f"the .expt {low:g} to {high:g}) that are no codes of bad pixels: the noise of a "
            "charge-integrating detector, or too large a pedestal. Only counted photons are "
            "modelled: integrate these images with dials.integrate and give the table to "
            "braggflux merge"
        )
