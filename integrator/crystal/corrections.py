"""Lorentz, polarization and detector-efficiency factors of a rotation photograph.

Raw intensities are proportional to ``P / L`` (``1 / L`` is the Lorentz factor of textbooks):
:func:`lp_correction` is what multiplies them. Sources: Kahn et al., J. Appl. Cryst.
15 (1982) 330 (polarization); Kabsch, Acta Cryst. D66 (2010) 133, section 2 (zeta and the
Lorentz factor). Rows are reflections; unit vectors are made here, so that lengths do not matter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def lp_correction(
    s1: ArrayLike,
    s0: ArrayLike,
    rotation_axis: ArrayLike | None,
    polarization_normal: ArrayLike,
    polarization_fraction: float,
) -> Array:
    """L/P correction that multiplies raw intensity (DIALS column ``lp``).

    ``L = |u . (m x u0)|``: how fast the reciprocal lattice point crosses the Ewald sphere, so that
    raw intensity times ``L`` is free of the crossing time. ``P = p (1 - (u . (n x u0))^2) +
    (1 - p) (1 - (u . n)^2)``: the part of the incident field that is perpendicular to the
    diffracted beam, written for any ``n`` as ``(1 - 2 p)(1 - (u . n)^2) + p (1 + (u . u0)^2)``.

    Parameters
    ----------
    s1 : array_like, (N, 3)
        Diffracted beam, laboratory frame.
    s0 : array_like, (3,)
        Incident beam.
    rotation_axis : array_like, (3,), or None
        In the laboratory frame. None for stills: ``L = 1``.
    polarization_normal : array_like, (3,)
        Normal ``n`` of the plane of polarization.
    polarization_fraction : float
        Fraction ``p`` of the intensity polarized in that plane; 0.5 is unpolarized.

    Returns
    -------
    Array, (N,)
        0 for reflections on the rotation axis, whose intensity is infinite.
    """
    u, u0 = _unit(s1), _unit(s0)
    normal = np.asarray(polarization_normal, dtype=float)
    crossing: Array | float = 1.0
    if rotation_axis is not None:
        crossing = np.abs(u @ np.cross(_unit(rotation_axis), u0))
    p = polarization_fraction
    polarization = (1.0 - 2.0 * p) * (1.0 - (u @ normal) ** 2) + p * (1.0 + (u @ u0) ** 2)
    return crossing / polarization


def zeta_factor(s1: ArrayLike, s0: ArrayLike, rotation_axis: ArrayLike) -> Array:
    """Component of the rotation axis along ``e1`` (DIALS column ``zeta``, signed).

    ``e1 = s1 x s0 / |s1 x s0|``. A spot of mosaic width ``sigma_m`` has the width
    ``sigma_m / |zeta|`` in rotation angle.

    Parameters
    ----------
    s1 : array_like, (N, 3)
    s0 : array_like, (3,)
    rotation_axis : array_like, (3,)

    Returns
    -------
    Array, (N,)
        In [-1, 1]; the sign changes across the plane of beam and rotation axis.
    """
    e1 = _unit(np.cross(_unit(s1), _unit(s0)))
    return e1 @ _unit(rotation_axis)


def quantum_efficiency(
    s1: ArrayLike, panel_normal: ArrayLike, mu: ArrayLike, thickness: ArrayLike
) -> Array:
    """Fraction of photons that the sensor absorbs (DIALS column ``qe``).

    ``1 - exp(-mu t / cos(angle to the normal))``; intensities are to be divided by it.

    Parameters
    ----------
    s1 : array_like, (N, 3)
    panel_normal : array_like, (3,) or (N, 3)
        Either sign.
    mu : array_like, scalar or (N,)
        Attenuation coefficient [1/mm].
    thickness : array_like, scalar or (N,)
        [mm]

    Returns
    -------
    Array, (N,)
    """
    cosine = np.abs(np.sum(_unit(s1) * _unit(panel_normal), axis=-1))
    return -np.expm1(-np.asarray(mu) * np.asarray(thickness) / cosine)


def _unit(vectors: ArrayLike) -> Array:
    array = np.asarray(vectors, dtype=float)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)
