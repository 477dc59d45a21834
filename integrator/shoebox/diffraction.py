"""Where a reciprocal-lattice point diffracts and where its ray lands: a differentiable core.

A point ``r(phi) = S R(e, phi) F A(z) h`` diffracts when ``|s0 + r| = |s0|``. With
``w = F A h`` and ``s = S^T s0`` (both before the rotation) this reads

``a cos(phi) + b sin(phi) = c``, ``a = s . w_perp``, ``b = s . (e x w)``,
``c = -|w|^2 / 2 - (s . e)(w . e)``,

with the two roots ``atan2(b, a) +- arccos(c / hypot(a, b))``. A crystal refined scan-varying has
one ``A`` per frame boundary, interpolated linearly inside a frame; ``phi`` is then the fixed point
of the closed form with ``A`` taken at its own ``z``.

Every function takes :class:`DiffractionGeometry`, whose tensors may require gradients. Gradients
of ``phi`` are those of the implicit function: one Newton step from the detached root.

Not handled: a beam or goniometer that varies along the scan, divergence and bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from integrator.crystal.geometry import Experiment

MAX_ITERATIONS = 20
"""Of the fixed point in a scan-varying crystal; its error shrinks by the drift per turn angle."""
NEWTON_STEPS = 3


@dataclass(frozen=True)
class DiffractionGeometry:
    """Tensors of one sweep.

    Parameters
    ----------
    s0 : Tensor, (3,)
        Incident beam [1/A], from the source to the sample.
    axis : Tensor, (3,)
        Unit rotation axis before the setting rotation.
    fixed, setting : Tensor, (3, 3)
        Goniometer rotations inside and outside of the scan rotation.
    A : Tensor, (1, 3, 3) or (n_images + 1, 3, 3)
        Crystal setting [1/A], static or at the frame boundaries.
    panel_d : Tensor, (P, 3, 3)
        Columns fast axis, slow axis, origin [mm]: ``lab = d @ (x, y, 1)``.
    pixel_size, image_size : Tensor, (P, 2)
        (fast, slow) pixel [mm] and panel [pixels].
    mu, thickness : Tensor, (P,)
        Sensor absorption [1/mm] and thickness [mm]; a thickness of 0 means no parallax.
    phi_start, phi_width : Tensor, ()
        Start of the scan and width of a frame [rad].
    n_images : int
    """

    s0: Tensor
    axis: Tensor
    fixed: Tensor
    setting: Tensor
    A: Tensor
    panel_d: Tensor
    pixel_size: Tensor
    image_size: Tensor
    mu: Tensor
    thickness: Tensor
    phi_start: Tensor
    phi_width: Tensor
    n_images: int

    @classmethod
    def from_experiment(
        cls,
        experiment: Experiment,
        *,
        static: bool = False,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> DiffractionGeometry:
        """Take the tensors of a sweep; ``static`` ignores scan-varying crystal settings.

        Setting matrices that are not one per frame boundary are ignored too, as DIALS does.
        """

        def tensor(values) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        crystal, scan, gonio = experiment.crystal, experiment.scan, experiment.goniometer
        varying = crystal.A_at_scan_points
        if static or varying is None or len(varying) != scan.n_images + 1:
            varying = crystal.A[None]
        panels = experiment.panels
        return cls(
            s0=tensor(experiment.beam.s0),
            axis=tensor(gonio.rotation_axis) / tensor(gonio.rotation_axis).norm(),
            fixed=tensor(gonio.fixed_rotation),
            setting=tensor(gonio.setting_rotation),
            A=tensor(varying),
            panel_d=torch.stack([tensor(p.d_matrix) for p in panels]),
            pixel_size=tensor([p.pixel_size for p in panels]),
            image_size=tensor([p.image_size for p in panels]),
            mu=tensor([p.mu for p in panels]),
            thickness=tensor([p.thickness if p.parallax and p.mu > 0 else 0.0 for p in panels]),
            phi_start=tensor(math.radians(scan.oscillation[0])),
            phi_width=tensor(math.radians(scan.oscillation[1])),
            n_images=scan.n_images,
        )

    @property
    def lab_axis(self) -> Tensor:
        """Rotation axis in the laboratory, (3,)."""
        return self.setting @ self.axis

    def frame(self, phi: Tensor) -> Tensor:
        """Frame coordinate of a rotation angle, (N,)."""
        return (phi - self.phi_start) / self.phi_width

    def detach(self) -> DiffractionGeometry:
        """Cut the graph."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: v.detach() for k, v in tensors.items() if isinstance(v, Tensor)}
        )


class Rays(NamedTuple):
    """Diffracted rays: rotation angle [rad] (N,), beam vector [1/A] (N, 3), entering (N,) bool.

    ``entering`` says that the point moves from outside to inside of the Ewald sphere.
    """

    phi: Tensor
    s1: Tensor
    entering: Tensor


class Impacts(NamedTuple):
    """Where rays land: (fast, slow) [mm] and [pixels], each (N, 2)."""

    mm: Tensor
    px: Tensor


def setting_at(geometry: DiffractionGeometry, z: Tensor) -> Tensor:
    """Crystal setting at frame coordinates, (N, 3, 3); held constant beyond the ends.

    A static crystal gives one matrix, (1, 3, 3).
    """
    if len(geometry.A) == 1:
        return geometry.A
    z = z.clamp(0, geometry.n_images)
    first = z.detach().floor().long().clamp_max(geometry.n_images - 1)
    weight = (z - first)[:, None, None]
    return (1 - weight) * geometry.A[first] + weight * geometry.A[first + 1]


def solve_ewald(
    geometry: DiffractionGeometry, hkl: Tensor, root: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotation angle at which reflections diffract.

    Parameters
    ----------
    geometry : DiffractionGeometry
    hkl : Tensor, (N, 3)
    root : Tensor, (N,)
        +1 or -1: which of the two crossings.
    phi : Tensor, (N,)
        Starting angle [rad]; chooses the turn, the answer is the root nearest to it.

    Returns
    -------
    phi : Tensor, (N,)
        [rad]; the point of closest approach where the sphere is not reached.
    reach : Tensor, (N,)
        ``c / hypot(a, b)``: the sphere is crossed where its absolute value is at most 1; infinite
        where no crossing was found.
    """
    geometry, phi = geometry.detach(), phi.detach().clone()
    reach = torch.zeros_like(phi)
    active = torch.arange(len(phi), device=phi.device)
    for _ in range(MAX_ITERATIONS):
        start = phi[active]
        angle, reach[active] = closed_form(geometry, hkl[active], root[active], start)
        turns = torch.round((start - angle) / (2 * math.pi))
        phi[active] = angle + 2 * math.pi * turns
        active = active[(phi[active] - start).abs() > 1e-10]
        if len(geometry.A) == 1 or len(active) == 0:
            break
    if len(geometry.A) == 1:
        return phi, reach
    # Near the rotation axis the fixed point is slow or fails: finish with Newton's steps, and
    # tell what still does not lie on the sphere.
    for _ in range(NEWTON_STEPS):
        excess, slope = _excess(geometry, hkl, phi)
        phi = phi - (excess / torch.where(slope == 0, torch.inf, slope)).clamp(-0.01, 0.01)
    excess, _ = _excess(geometry, hkl, phi)
    on_sphere = excess.abs() <= 1e-9 * geometry.s0.dot(geometry.s0)
    return phi, torch.where(on_sphere, reach.clamp(-1, 1), torch.inf)


def closed_form(
    geometry: DiffractionGeometry, hkl: Tensor, root: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor]:
    """Root of the Ewald condition with the crystal as it is at ``phi``: (phi, reach)."""
    A = setting_at(geometry, geometry.frame(phi))
    w = (geometry.fixed @ A @ hkl[:, :, None])[:, :, 0]
    s = geometry.setting.T @ geometry.s0
    along = w @ geometry.axis
    a = w @ s - along * (s @ geometry.axis)
    b = w @ torch.linalg.cross(s, geometry.axis)  # s . (e x w)
    c = -0.5 * (w * w).sum(1) - along * (s @ geometry.axis)
    reach = c / torch.hypot(a, b).clamp_min(1e-300)
    return torch.atan2(b, a) + root * torch.arccos(reach.clamp(-1, 1)), reach


def scattering_vector(geometry: DiffractionGeometry, hkl: Tensor, phi: Tensor) -> Tensor:
    """Reciprocal-lattice vector in the laboratory at rotation ``phi``, (N, 3) [1/A]."""
    A = setting_at(geometry, geometry.frame(phi))
    w = (geometry.fixed @ A @ hkl[:, :, None])[:, :, 0]
    return rotate(w, geometry.axis, phi) @ geometry.setting.T


def rotate(vector: Tensor, axis: Tensor, angle: Tensor) -> Tensor:
    """Rotate (N, 3) vectors about a unit axis by (N,) angles [rad] (Rodrigues)."""
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    axis = axis.expand_as(vector)
    along = (vector * axis).sum(1, keepdim=True) * axis
    return along + cos * (vector - along) + sin * torch.linalg.cross(axis, vector)


def trace_rays(geometry: DiffractionGeometry, hkl: Tensor, phi: Tensor) -> Rays:
    """Rays of reflections at their diffracting angle, with gradients.

    Parameters
    ----------
    geometry : DiffractionGeometry
    hkl : Tensor, (N, 3)
        In the dtype of the geometry.
    phi : Tensor, (N,)
        From :func:`solve_ewald`.

    Returns
    -------
    Rays
    """
    # The distance to the sphere is 0 at phi, so that one Newton step leaves the value as it is
    # and carries the gradient d(phi) = -d(excess) / (d excess / d phi) of the implicit function.
    excess, slope = _excess(geometry, hkl, phi)
    slope = slope.detach()
    phi = phi - excess / torch.where(slope == 0, torch.inf, slope)
    s1 = geometry.s0 + scattering_vector(geometry, hkl, phi)
    return Rays(phi, s1, slope * torch.sign(geometry.phi_width.detach()) < 0)


def _excess(geometry: DiffractionGeometry, hkl: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """``|s0 + r|^2 - |s0|^2`` [1/A^2] and its derivative by phi, each (N,)."""
    r = scattering_vector(geometry, hkl, phi)
    excess = (r * r).sum(1) + 2 * r @ geometry.s0
    slope = 2 * torch.linalg.cross(geometry.lab_axis.expand_as(r), r) @ geometry.s0
    if len(geometry.A) > 1:
        first = geometry.frame(phi).detach().floor().long().clamp(0, geometry.n_images - 1)
        drift = (geometry.A[first + 1] - geometry.A[first]) / geometry.phi_width
        w = (geometry.fixed @ drift @ hkl[:, :, None])[:, :, 0]
        dr = rotate(w, geometry.axis, phi) @ geometry.setting.T
        slope = slope + 2 * ((r + geometry.s0) * dr).sum(1)
    return excess, slope


def choose_panel(geometry: DiffractionGeometry, s1: Tensor) -> Tensor:
    """Panel that each ray hits, (N,) int64; -1 where it hits none, the nearest of several."""
    with torch.no_grad():
        v = torch.einsum("pij,nj->npi", torch.linalg.inv(geometry.panel_d), s1)
        inverse_distance = v[:, :, 2]
        mm = (
            v[:, :, :2] / torch.where(inverse_distance > 0, inverse_distance, torch.nan)[..., None]
        )
        inside = (mm >= 0) & (mm <= geometry.image_size * geometry.pixel_size)
        score = torch.where(inside.all(2), inverse_distance, -torch.inf)
        best, panel = score.max(1)
    return torch.where(best > 0, panel, -1)


def intersect(geometry: DiffractionGeometry, s1: Tensor, panel: Tensor) -> Impacts:
    """Where rays land on their panels, with gradients.

    The pixel position includes the parallax: photons are absorbed at a mean depth of
    ``1/mu - (t/cos + 1/mu) exp(-mu t / cos)`` along the ray, t/cos being the path through the
    sensor (the strategy ``ParallaxCorrectedPxMmStrategy`` of dxtbx).

    Parameters
    ----------
    geometry : DiffractionGeometry
    s1 : Tensor, (N, 3)
    panel : Tensor, (N,) int64
        From :func:`choose_panel`, none negative.
    """
    d = geometry.panel_d[panel]
    v = torch.linalg.solve(d, s1)
    mm = v[:, :2] / v[:, 2:]
    return Impacts(mm, (mm + _parallax(geometry, s1, panel)) / geometry.pixel_size[panel])


def _parallax(geometry: DiffractionGeometry, s1: Tensor, panel: Tensor) -> Tensor:
    """Shift of the recorded position [mm], (N, 2) along fast and slow."""
    fast, slow = geometry.panel_d[panel, :, 0], geometry.panel_d[panel, :, 1]
    direction = s1 / s1.norm(dim=1, keepdim=True)
    normal = torch.linalg.cross(fast, slow)
    cos = (direction * normal).sum(1).abs()
    path = geometry.thickness[panel] / cos
    mu = torch.where(path > 0, geometry.mu[panel], 1.0)
    depth = 1 / mu - (path + 1 / mu) * torch.exp(-mu * path)  # 0 for a path of 0
    shift = torch.stack([(direction * fast).sum(1), (direction * slow).sum(1)], dim=1)
    return shift * depth[:, None]
