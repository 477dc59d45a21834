"""What no crystal, beam, detector or measurement can be: the value checks of the fuzz suite.

Written apart from the program's own checks; a value that the program accepts and that fails here
is a fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.merge.io.observations import UnmergedData

#: Name -> lowest and highest value that is possible.
RANGES = {
    "wavelength": (0.01, 200.0),
    "polarization_fraction": (0.0, 1.0),
    "gain": (1e-3, 1e6),
    "pixel_size": (1e-5, 100.0),
    "image_size": (1, 1e6),
    "thickness": (0.0, 1e3),
    "mu": (0.0, 1e6),
    "pedestal": (-1e9, 1e9),
    "trusted_range": (-1e300, 1e300),
    "origin": (-1e6, 1e6),
    "oscillation": (-1e6, 1e6),
    "n_images": (1, 1e7),
    "cell length": (1.0, 1e5),
    "cell angle": (1.0, 179.0),
}


def _outside(name: str, values: Any) -> list[str]:
    low, high = RANGES[name]
    array = np.asarray(values, float)
    if array.size and not np.all((array >= low) & (array <= high)):
        return [f"{name} {array.ravel()[:6].tolist()}"]
    return []


def _not_rotation(name: str, matrix: Any) -> list[str]:
    matrix = np.asarray(matrix, float)
    identity = np.swapaxes(matrix, -1, -2) @ matrix
    good = np.isfinite(matrix).all() and np.abs(identity - np.eye(3)).max() < 0.02
    return [] if good and np.all(np.linalg.det(matrix) > 0) else [f"{name} is no rotation"]


def _not_vector(name: str, vector: Any) -> list[str]:
    length = np.linalg.norm(np.asarray(vector, float), axis=-1)
    return [] if np.all((length > 1e-6) & (length < 1e6)) else [f"{name} of length {length}"]


def cell(parameters: Sequence[float]) -> list[str]:
    """Unit cell [A, degrees]."""
    wrong = _outside("cell length", parameters[:3]) + _outside("cell angle", parameters[3:])
    if not wrong:
        a, b, c = np.cos(np.radians(parameters[3:]))
        if not 1 - a * a - b * b - c * c + 2 * a * b * c > 0:
            wrong = [f"cell without volume {parameters}"]
    return wrong


def experiments(found: Iterable[Experiment]) -> list[str]:
    """Models of an .expt."""
    wrong: list[str] = []
    for e in found:
        wrong += _outside("wavelength", e.beam.wavelength)
        wrong += _outside("polarization_fraction", e.beam.polarization_fraction)
        wrong += _not_vector("direction", e.beam.direction)
        wrong += _not_vector("polarization_normal", e.beam.polarization_normal)
        if e.beam.s0_at_scan_points is not None:
            wrong += _outside("wavelength", 1 / np.linalg.norm(e.beam.s0_at_scan_points, axis=1))
        for panel in e.panels:
            for name in ("gain", "pixel_size", "image_size", "thickness", "mu", "pedestal"):
                wrong += _outside(name, getattr(panel, name))
            wrong += _outside("trusted_range", panel.trusted_range)
            wrong += _outside("origin", panel.origin)
            axes = np.stack([panel.fast_axis, panel.slow_axis])
            if not np.abs(axes @ axes.T - np.eye(2)).max() < 0.02:
                wrong.append(f"panel axes {axes.tolist()}")
            if np.abs(np.asarray(panel.mask, float)).max(initial=0) > 1e7:
                wrong.append(f"mask {panel.mask}")
        if (g := e.goniometer) is not None:
            wrong += _not_vector("rotation_axis", g.rotation_axis)
            wrong += _not_rotation("fixed_rotation", g.fixed_rotation)
            wrong += _not_rotation("setting_rotation", g.setting_rotation)
            if g.setting_rotation_at_scan_points is not None:
                wrong += _not_rotation("setting rotation", g.setting_rotation_at_scan_points)
        if e.scan is not None:
            wrong += _outside("n_images", e.scan.n_images)
            wrong += _outside("oscillation", e.scan.oscillation)
            if max(map(abs, e.scan.image_range)) > 1e9:
                wrong.append(f"image_range {e.scan.image_range}")
        if e.crystal is not None:
            wrong += cell(e.crystal.unit_cell.parameters)
            for A in () if (p := e.crystal.A_at_scan_points) is None else p:
                wrong += _outside("cell length", np.linalg.norm(np.linalg.inv(A), axis=1))
        if e.images is not None and min(e.images.indices, default=0) < 0:
            wrong.append(f"images {e.images.indices}")
        if e.scan is not None and e.images is not None and len(e.images.indices) > 1e7:
            wrong.append("more images than there can be")
    return wrong


def unmerged(datasets: Iterable[UnmergedData]) -> list[str]:
    """Observations that are merged."""
    wrong: list[str] = []
    for data in datasets:
        finite = {"intensity": data.intensity, "sigma": data.sigma}
        places = ("XDET", "YDET", "ROT", "BATCH", "frame", "zeta", "ewald_offset")
        finite |= {n: c for n, c in data.metadata.items() if n in places}
        wrong += [f"{n} is not finite" for n, c in finite.items() if not np.isfinite(c).all()]
        if not np.all(data.sigma > 0):
            wrong.append("sigma is not positive")
        if np.abs(data.intensity).max(initial=0) > 1e30 or data.sigma.max(initial=0) > 1e30:
            wrong.append("intensity or sigma beyond 1e30")
        if np.abs(data.miller_index).max(initial=0) > 32767:
            wrong.append("index beyond 32767")
        if data.wavelength is not None and not np.isfinite(data.wavelength).all():
            wrong.append("wavelength is not finite")
        if data.labels.wavelength is not None:
            wrong += _outside("wavelength", data.labels.wavelength)
        wrong += cell(data.cell.parameters)
    return wrong


def finite(named: Mapping[str, Any]) -> list[str]:
    """Arrays by name."""
    arrays = {n: np.asarray(a) for n, a in named.items()}
    return [
        f"{n} is not finite"
        for n, a in arrays.items()
        if a.dtype.kind == "f" and not np.isfinite(a).all()
    ]


def settings(mapping: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Numbers of a configuration."""
    wrong = []
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            wrong += settings(value, f"{prefix}{name}.")
        numbers = value if isinstance(value, (list, tuple)) else [value]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if not math.isfinite(number) or abs(number) > 1e9 or number < 0:
                wrong.append(f"{prefix}{name} = {number}")
    return wrong
