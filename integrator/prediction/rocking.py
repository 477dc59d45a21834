r"""How long a reflection diffracts: width of its rocking curve, in degrees and in frames.

Along ``e3 = zeta (phi - phi_c)`` mosaicity gives all reflections one width. Crystals or domains
of finite size make every lattice point a small solid of radius ``1 / size``, whatever its index:
seen from the origin, at the distance ``1 / d``, it spans an angle proportional to d (Scherrer,
1918). Both are independent,

    sigma(d)^2 = mosaic^2 + (size_rate d)^2,

so that the lowest orders of a small crystal diffract over ten times the angle of the highest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
T = TypeVar("T", NDArray[np.float64], torch.Tensor)

MIN_COVERAGE = 3.5
"""Standard deviations of the rocking curve, on both sides, that a box must hold."""
WIDTH_ERROR = 0.03
"""Relative error of a measured width at least: curves are no Gaussians."""
SIGNIFICANT = 4.0
"""Standard errors by which the widths must rise with d: few reflections show how far."""


@dataclass(frozen=True)
class RockingWidth:
    """Standard deviation of rocking curves at zeta = 1.

    Parameters
    ----------
    mosaic_deg : float
        Part that all reflections have [deg].
    size_rate : float
        Part of finite domains, per length of d [deg/A].
    """

    mosaic_deg: float
    size_rate: float = 0.0

    def at(self, d: T) -> T:
        """Width of reflections of resolution ``d`` (N,) [A], without that of frames [deg]."""
        return (self.mosaic_deg**2 + (self.size_rate * d) ** 2) ** 0.5

    @classmethod
    def fitted(cls, sigma: Array, d: Array, frame: Array) -> RockingWidth:
        """Least squares for the widths ``sigma`` (G,) [deg] of groups of resolution ``d`` [A].

        Without a clear rise with d all have one width. What was measured are variances to which
        frames of the width ``frame`` (G,) [deg at zeta = 1] had added theirs.
        """
        constant = cls(float(np.sqrt(np.mean(sigma**2))))
        if len(sigma) < 3 or not (sigma > 0).all() or np.ptp(d) == 0:
            return constant
        recorded = sigma**2 + frame**2 / 12
        design = np.column_stack([np.ones_like(d), d**2]) / recorded[:, None]
        target = sigma**2 / recorded
        normal = np.linalg.inv(design.T @ design)
        parts = normal @ (design.T @ target)
        residual = np.mean((design @ parts - target) ** 2) * len(d) / (len(d) - 2)
        error = math.sqrt(normal[1, 1] * max(residual, (2 * WIDTH_ERROR) ** 2))
        if parts[1] < SIGNIFICANT * error:
            return constant
        if parts[0] <= 0:
            rate = design[:, 1] @ target / (design[:, 1] @ design[:, 1])
            return cls(0.0, math.sqrt(rate))
        return cls(math.sqrt(parts[0]), math.sqrt(parts[1]))


def frame_sigma(sigma_m_deg: float | Array, zeta: Array, width_deg: float) -> Array:
    """Give the recorded standard deviation of the rocking curve in frames.

    ``sqrt((sigma_m / (zeta * width))^2 + 1/12)``; 1/12 is the variance of the frame itself.
    """
    rocking = sigma_m_deg / (np.maximum(zeta, 1e-3) * abs(width_deg))
    return np.sqrt(rocking**2 + 1 / 12)


def frames_per_layer(spread: Array, n_layers: int) -> NDArray[np.int64]:
    """Consecutive frames that each layer of a box of ``n_layers`` sums, (N,).

    Near the rotation axis the rocking curve lasts for many frames. Sums of Poisson counts are
    Poisson counts, and a curve so wide has no detail as fine as a frame: wider layers hold all of
    it in a box of the same size.

    Parameters
    ----------
    spread : ndarray, (N,)
        Recorded standard deviation of the rocking curve [frames].
    n_layers : int
        Layers of the box, odd.
    """
    # the centroid lies anywhere in the middle frame: half a frame less on one side
    return np.ceil((2 * MIN_COVERAGE * spread + 1) / n_layers).clip(1).astype(np.int64)


def min_zeta(sigma_m_deg: Array) -> Array:
    """Give the least zeta at which rocking curves of widths (N,) are what the model says.

    ``d zeta / d phi`` is about 1, so that over one standard deviation sigma_m / zeta of the
    rocking curve zeta changes by ``sigma_m / zeta^2`` of itself: by a quarter at the limit,
    ``2 sqrt(sigma_m)``. Nearer to the axis the point only grazes the sphere, and the Lorentz
    factor promises up to three times the photons that it gives. DIALS stops at 0.05.
    """
    return np.maximum(0.05, 2 * np.sqrt(np.radians(sigma_m_deg)))
