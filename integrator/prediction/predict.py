"""All reflections of a sweep: which are recorded, where and when.

The geometry lives in :mod:`braggflux.integrator.prediction.diffraction`; here Miller indices are
listed, the crossings inside the scan are kept and each ray is given its panel. The result agrees
with ``dials.predict`` (Waterman et al. (2013) J. Synchrotron Rad. 20, 829 describe the
conventions); we solve the crossing in a scan-varying crystal exactly where DIALS replaces the arc
by its chord.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.crystal import corrections
from braggflux.integrator.crystal.geometry import Crystal, Experiment
from braggflux.integrator.errors import UserError
from braggflux.integrator.prediction import diffraction
from braggflux.integrator.prediction.diffraction import DiffractionGeometry
from braggflux.integrator.records import TensorRecord

CHUNK = 250_000
"""Miller indices solved at a time: bounds the memory of large cells."""
SCAN_MARGIN = math.radians(5.0)
"""How far outside of the scan the mean crystal may predict a reflection that is inside."""
REACH_MARGIN = 0.02
"""How far beyond the Ewald sphere (relative) the mean crystal may miss one that crosses it."""


@dataclass(frozen=True)
class Prediction(TensorRecord):
    """Predicted reflections of one experiment, in no particular order.

    Positions and ``s1`` carry the gradients of the geometry; ``zeta`` and ``lp`` do not.

    Parameters
    ----------
    miller_index : Tensor, (N, 3) int64
    panel : Tensor, (N,) int64
    xyz_px : Tensor, (N, 3)
        (fast, slow, frame), continuous; see ``braggflux.integrator.crystal.geometry``.
    xyz_mm : Tensor, (N, 3)
        [mm, mm, rad], without parallax.
    s1 : Tensor, (N, 3)
        Diffracted beam vector [1/A] in the laboratory.
    d : Tensor, (N,)
        Resolution [A] of the static cell.
    zeta : Tensor, (N,)
        ``|e1 . m2|``, in [0, 1].
    lp : Tensor, (N,)
        Multiplies raw intensity.
    entering : Tensor, (N,) bool
    s0_crystal, s1_crystal : Tensor, (N, 3)
        Unit vectors along both beams with the whole goniometer rotation undone.
    """

    miller_index: Tensor
    panel: Tensor
    xyz_px: Tensor
    xyz_mm: Tensor
    s1: Tensor
    d: Tensor
    zeta: Tensor
    lp: Tensor
    entering: Tensor
    s0_crystal: Tensor
    s1_crystal: Tensor


def predict_reflections(
    experiment: Experiment,
    d_min: float | None = None,
    *,
    d_max: float | None = None,
    padding_frames: float = 0.0,
    static: bool = False,
    geometry: DiffractionGeometry | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Prediction:
    """Predict every reflection that the scan records.

    Parameters
    ----------
    experiment : Experiment
        With a crystal, a goniometer and a scan.
    d_min, d_max : float, optional
        Resolution limits [A]; by default all that the detector can see.
    padding_frames : float
        Predict so far before and after the scan, too.
    static : bool
        Ignore a scan-varying crystal.
    geometry : DiffractionGeometry, optional
        Tensors (with gradients, say) that replace those of the experiment.
    dtype : torch.dtype
    device : torch.device or str

    Returns
    -------
    Prediction
        Reflections absent by lattice centring are left out; screw and glide absences are not.

    Raises
    ------
    UserError
        For a still, for a resolution that the wavelength cannot reach, and for no reflection.
    """
    crystal = experiment.rotation.crystal
    geometry = geometry or DiffractionGeometry.from_experiment(
        experiment, static=static, dtype=dtype, device=device
    )
    if d_min is None:
        d_min = detector_limit(experiment)
    if d_min <= 0.5 * experiment.beam.wavelength:
        raise UserError(
            f"d_min of {d_min:g} A cannot be reached: at {experiment.beam.wavelength:g} A it must "
            f"be above {0.5 * experiment.beam.wavelength:.3f} A; give a larger --d-min"
        )
    hits = [
        _crossings(
            geometry, torch.from_numpy(chunk).to(geometry.s0), (d_min, d_max), padding_frames
        )
        for chunk in _chunks(candidate_indices(crystal, 0.98 * d_min))
    ]
    hkl, phi, panel = (torch.cat(column) for column in zip(*hits, strict=True))
    if len(hkl) == 0:
        raise UserError(
            f"no reflection to {d_min:g} A falls on the frames of experiment "
            f"{experiment.identifier or '(unnamed)'}: check cell, orientation and scan of the "
            "EXPT file, or give a smaller --d-min"
        )
    rays = diffraction.trace_rays(geometry, hkl, phi)
    impacts = diffraction.intersect(geometry, rays.s1, panel)
    return _describe(experiment, geometry, hkl, panel, rays, impacts)


def prediction_from_columns(
    experiment: Experiment,
    columns: Mapping[str, NDArray[Any]],
    *,
    dtype: torch.dtype = torch.float64,
) -> Prediction:
    """Prediction from the columns of a DIALS table that holds the full set.

    Parameters
    ----------
    experiment : Experiment
    columns : mapping
        ``miller_index``, ``panel``, ``s1``, ``xyzcal.px``, ``xyzcal.mm`` and, if present,
        ``entering``.

    Raises
    ------
    UserError
        When a column is missing.
    """
    geometry = DiffractionGeometry.from_experiment(experiment, dtype=dtype)
    needed = ("miller_index", "panel", "s1", "xyzcal.px", "xyzcal.mm")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(
            f"the reflection table lacks the column(s) {', '.join(missing)}; needed are "
            f"{', '.join(needed)}: give a table made by dials.predict, dials.integrate or "
            "dials.refine"
        )

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(columns[name], dtype=np.float64)).to(dtype)

    hkl, mm, px = tensor("miller_index"), tensor("xyzcal.mm"), tensor("xyzcal.px")
    panel = torch.from_numpy(np.asarray(columns["panel"]).astype(np.int64))
    if len(panel) and int(panel.max()) >= len(experiment.panels):
        raise UserError(
            f"the reflection table names panel {int(panel.max())}, but the detector has "
            f"{len(experiment.panels)} panel(s) (0 is the first): the EXPT and REFL files do not "
            "belong together"
        )
    if "entering" in columns:
        entering = torch.from_numpy(np.asarray(columns["entering"]).astype(bool))
    else:
        entering = diffraction.trace_rays(geometry, hkl, mm[:, 2]).entering
    rays = diffraction.Rays(mm[:, 2], tensor("s1"), entering)
    impacts = diffraction.Impacts(mm[:, :2], px[:, :2])
    record = _describe(experiment, geometry, hkl, panel, rays, impacts)
    # The table's own frame coordinate: it may come from a scan cut out of a longer one.
    record.xyz_px[:, 2] = px[:, 2]
    return record


def candidate_indices(crystal: Crystal, d_min: float) -> NDArray[np.int32]:
    """Miller indices within a resolution sphere that the lattice centring allows, (N, 3) int32.

    Absences by screw axes and glide planes stay in, as in ``dials.predict``: they are measured as
    zero, which is how a wrong space group shows.
    """
    A = crystal.A
    limit = np.floor(np.linalg.norm(np.linalg.inv(A), axis=1) / d_min).astype(int)
    k, l = np.meshgrid(*(np.arange(-n, n + 1) for n in limit[1:]), indexing="ij")
    plane = np.stack([np.zeros(k.size, int), k.ravel(), l.ravel()], axis=1)
    kept = []
    for h in range(-limit[0], limit[0] + 1):
        plane[:, 0] = h
        r = plane @ A.T
        inside = (r * r).sum(1) <= 1 / d_min**2
        kept.append(plane[inside].astype(np.int32))
    hkl = np.concatenate(kept)
    hkl = hkl[hkl.any(axis=1)]
    centring = np.array(crystal.space_group.operations().cen_ops)  # multiples of 1 / Op.DEN
    return hkl[(hkl @ centring.T % gemmi.Op.DEN == 0).all(axis=1)]


def require_recorded(
    experiments: Sequence[Experiment], d_min: float | None, tolerance: float = 0.0
) -> None:
    """Refuse a resolution limit that is beyond what the detector records.

    Parameters
    ----------
    experiments : sequence of Experiment
    d_min : float or None
        [A]
    tolerance : float
        Relative; of a geometry that is not refined yet.

    Raises
    ------
    UserError
    """
    limit = min(map(detector_limit, experiments), default=0.0)
    if d_min is not None and d_min < limit * (1 - tolerance):
        raise UserError(
            f"d_min of {d_min:g} A is beyond the detector, whose corners record {limit:.2f} A: "
            f"give --d-min {np.ceil(limit * 100) / 100:.2f} or larger"
        )


def detector_limit(experiment: Experiment) -> float:
    """Smallest d [A] that the corners of the panels record."""
    s0 = experiment.beam.s0
    corners = np.array([(0, 0), (1, 0), (0, 1), (1, 1)])
    limit = np.inf
    for panel in experiment.panels:
        mm = corners * np.array(panel.image_size) * np.array(panel.pixel_size)
        lab = np.column_stack([mm, np.ones(4)]) @ panel.d_matrix.T
        s1 = lab / np.linalg.norm(lab, axis=1)[:, None] * np.linalg.norm(s0)
        limit = min(limit, float((1 / np.linalg.norm(s1 - s0, axis=1)).min()))
    return limit


def _chunks(hkl: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    return [hkl[i : i + CHUNK] for i in range(0, max(len(hkl), 1), CHUNK)]


def _crossings(
    geometry: DiffractionGeometry,
    hkl: Tensor,
    limits: tuple[float, float | None],
    padding: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Crossings of the Ewald sphere on the scan that hit a panel: (hkl, phi, panel).

    The crystal at mid-scan finds candidates with a margin; those are solved with the crystal as
    it is when they diffract and tested again.
    """
    geometry = geometry.detach()
    varying = geometry.is_varying
    middle = geometry.phi_start + 0.5 * geometry.n_images * geometry.phi_width
    half_scan = (0.5 * geometry.n_images + padding) * geometry.phi_width.abs()
    margin = SCAN_MARGIN if varying else 0.0
    n_turns = math.ceil(float(half_scan + margin) / (2 * math.pi) - 0.5) if half_scan > 0 else 0
    found: list[tuple[Tensor, Tensor]] = []
    between, half, reach = diffraction.both_roots(geometry, hkl, middle[None])
    for sign in (1.0, -1.0):
        root = torch.full((len(hkl),), sign).to(hkl)
        near = between + root * half
        near = near + 2 * math.pi * torch.round((middle - near) / (2 * math.pi))
        on_sphere = reach.abs() <= 1 + (REACH_MARGIN if varying else 0.0)
        for turn in range(-n_turns - 1, n_turns + 2):
            phi = near + 2 * math.pi * turn
            rows = torch.nonzero(on_sphere & ((phi - middle).abs() <= half_scan + margin))[:, 0]
            if len(rows) == 0:
                continue
            solved, reached = diffraction.solve_ewald(geometry, hkl[rows], root[rows], phi[rows])
            z = geometry.frame(solved)
            keep = (reached.abs() <= 1) & (z >= -padding) & (z < geometry.n_images + padding)
            found.append((hkl[rows[keep]], solved[keep]))
    hkl = torch.cat([hkl[:0], *(f[0] for f in found)])
    phi = torch.cat([middle.new_zeros(0), *(f[1] for f in found)])
    return _on_detector(geometry, hkl, phi, limits)


def _on_detector(
    geometry: DiffractionGeometry,
    hkl: Tensor,
    phi: Tensor,
    limits: tuple[float, float | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep crossings within the resolution limits whose ray hits a panel: (hkl, phi, panel)."""
    d_min, d_max = limits
    r = diffraction.scattering_vector(geometry, hkl, phi)
    inv_d = r.norm(dim=1)
    panel = diffraction.choose_panel(geometry, geometry.at(geometry.s0, phi) + r)
    keep = (panel >= 0) & (inv_d <= 1 / d_min)
    if d_max is not None:
        keep &= inv_d >= 1 / d_max
    return hkl[keep], phi[keep], panel[keep]


def _describe(
    experiment: Experiment,
    geometry: DiffractionGeometry,
    hkl: Tensor,
    panel: Tensor,
    rays: diffraction.Rays,
    impacts: diffraction.Impacts,
) -> Prediction:
    """Everything that follows from hkl, phi, s1 and the position."""
    s1, s0 = rays.s1, geometry.at(geometry.s0, rays.phi)
    setting = geometry.at(geometry.setting, rays.phi)
    # of the mean beam and axis, as in DIALS
    constant = (s1, geometry.s0.mean(0), geometry.setting.mean(0) @ geometry.axis)
    ray, incident, axis = (v.detach().cpu().double().numpy() for v in constant)
    beam = experiment.beam
    lp = corrections.lp_correction(
        ray, incident, axis, beam.polarization_normal, beam.polarization_fraction
    )
    zeta = np.abs(corrections.zeta_factor(ray, incident, axis))

    def undo_goniometer(vector: Tensor) -> Tensor:
        unit = vector / vector.norm(dim=1, keepdim=True)
        inside = diffraction.apply(setting.mT, unit)
        return diffraction.rotate(inside, geometry.axis, -rays.phi) @ geometry.fixed

    A = torch.from_numpy(experiment.rotation.crystal.A).to(hkl)
    frame = geometry.frame(rays.phi)[:, None]
    return Prediction(
        miller_index=hkl.round().long(),
        panel=panel,
        xyz_px=torch.cat([impacts.px, frame], dim=1),
        xyz_mm=torch.cat([impacts.mm, rays.phi[:, None]], dim=1),
        s1=s1,
        d=1 / (hkl @ A.T).norm(dim=1),
        zeta=torch.from_numpy(zeta).to(s1),
        lp=torch.from_numpy(lp).to(s1),
        entering=rays.entering,
        s0_crystal=undo_goniometer(s0.expand_as(s1)),
        s1_crystal=undo_goniometer(s1),
    )
