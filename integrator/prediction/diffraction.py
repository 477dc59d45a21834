"""Where a reciprocal-lattice point diffracts and where its ray lands: a differentiable core.

A point ``r(phi) = S R(e, phi) F A(z) h`` diffracts when ``|s0 + r| = |s0|``. With
``w = F A h`` and ``s = S^T s0`` (both before the rotation) this reads

``a cos(phi) + b sin(phi) = c``, ``a = s . w_perp``, ``b = s . (e x w)``,
``c = -|w|^2 / 2 - (s . e)(w . e)``,

with the two roots ``atan2(b, a) +- arccos(c / hypot(a, b))``. A crystal, beam or goniometer
refined scan-varying has one ``A``, ``s0`` or ``S`` per frame boundary, interpolated linearly
inside a frame; ``phi`` is then the fixed point of the closed form with them taken at its own
``z``.

Every function takes :class:`DiffractionGeometry`, whose tensors may require gradients. Gradients
of ``phi`` are those of the implicit function: one Newton step from the detached root.

Not handled: divergence and bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from braggflux.integrator.crystal.geometry import Array, Experiment
from braggflux.integrator.io.dials.lookup import read_offsets

MAX_ITERATIONS = 20
"""Of the fixed point in a scan-varying crystal; its error shrinks by the drift per turn angle."""
NEWTON_STEPS = 3


@dataclass(frozen=True)
class DiffractionGeometry:
    """Tensors of one sweep.

    Parameters
    ----------
    s0 : Tensor, (1, 3) or (n_images + 1, 3)
        Incident beam [1/A], from the source to the sample, static or at the frame boundaries.
    axis : Tensor, (3,)
        Unit rotation axis before the setting rotation.
    fixed : Tensor, (3, 3)
        Goniometer rotation inside of the scan rotation.
    setting : Tensor, (1, 3, 3) or (n_images + 1, 3, 3)
        Goniometer rotation outside of it.
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
    offsets : tuple of Tensor, (2, slow, fast), optional
        Per panel, what is added to ideal (fast, slow) positions [pixels].
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
    offsets: tuple[Tensor, ...] | None = None

    @classmethod
    def from_experiment(
        cls,
        experiment: Experiment,
        *,
        static: bool = False,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> DiffractionGeometry:
        """Take the tensors of a sweep; ``static`` ignores what was refined scan-varying.

        Values that are not one per frame boundary are ignored too, as DIALS does.

        Raises
        ------
        UserError
            When the images need distortion maps that cannot be read.
        """

        def tensor(values: ArrayLike) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def along_scan(at_scan_points: Array | None, constant: Array) -> Tensor:
            if static or at_scan_points is None or len(at_scan_points) != scan.n_images + 1:
                return tensor(constant[None])
            return tensor(at_scan_points)

        gonio, scan, crystal = experiment.rotation
        beam, panels = experiment.beam, experiment.panels
        offsets = read_offsets(experiment)
        return cls(
            s0=along_scan(beam.s0_at_scan_points, beam.s0),
            axis=tensor(gonio.rotation_axis) / tensor(gonio.rotation_axis).norm(),
            fixed=tensor(gonio.fixed_rotation),
            setting=along_scan(gonio.setting_rotation_at_scan_points, gonio.setting_rotation),
            A=along_scan(crystal.A_at_scan_points, crystal.A),
            panel_d=torch.stack([tensor(p.d_matrix) for p in panels]),
            pixel_size=tensor([p.pixel_size for p in panels]),
            image_size=tensor([p.image_size for p in panels]),
            mu=tensor([p.mu for p in panels]),
            thickness=tensor([p.thickness if p.parallax and p.mu > 0 else 0.0 for p in panels]),
            phi_start=tensor(math.radians(scan.oscillation[0])),
            phi_width=tensor(math.radians(scan.oscillation[1])),
            n_images=scan.n_images,
            offsets=None if offsets is None else tuple(map(tensor, offsets)),
        )

    @property
    def is_varying(self) -> bool:
        """Whether crystal, beam or goniometer vary along the scan."""
        return max(len(self.A), len(self.s0), len(self.setting)) > 1

    def at(self, values: Tensor, phi: Tensor) -> Tensor:
        """Value of ``A``, ``s0`` or ``setting`` at rotation angles, (N, ...) or (1, ...).

        Linear inside a frame, held constant beyond the ends of the scan.
        """
        if len(values) == 1:
            return values
        first, weight = self._frame_and_weight(phi)
        weight = weight.reshape(-1, *[1] * (values.ndim - 1))
        return (1 - weight) * values[first] + weight * values[first + 1]

    def drift(self, values: Tensor, phi: Tensor) -> Tensor:
        """Change of such a value per radian of rotation, (N, ...) or (1, ...)."""
        if len(values) == 1:
            return torch.zeros_like(values)
        first, _ = self._frame_and_weight(phi.detach())
        return (values[first + 1] - values[first]) / self.phi_width

    def _frame_and_weight(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        z = self.frame(phi).clamp(0, self.n_images)
        first = z.detach().floor().long().clamp_max(self.n_images - 1)
        return first, z - first

    def lab_axis(self, phi: Tensor) -> Tensor:
        """Rotation axis in the laboratory at rotation angles, (N, 3) or (1, 3)."""
        return self.at(self.setting, phi) @ self.axis

    def frame(self, phi: Tensor) -> Tensor:
        """Frame coordinate of a rotation angle, (N,)."""
        return (phi - self.phi_start) / self.phi_width

    def detach(self) -> DiffractionGeometry:
        """Cut the graph."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {
            k: v.detach() for k, v in values.items() if isinstance(v, Tensor)
        }
        return replace(self, **tensors)


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
        if not geometry.is_varying or len(active) == 0:
            break
    if not geometry.is_varying:
        return phi, reach
    # Near the rotation axis the fixed point is slow or fails: finish with Newton's steps, and
    # tell what still does not lie on the sphere.
    for _ in range(NEWTON_STEPS):
        excess, slope = _excess(geometry, hkl, phi)
        phi = phi - (excess / torch.where(slope == 0, torch.inf, slope)).clamp(-0.01, 0.01)
    excess, _ = _excess(geometry, hkl, phi)
    on_sphere = excess.abs() <= 1e-9 * geometry.s0[0].dot(geometry.s0[0])
    return phi, torch.where(on_sphere, reach.clamp(-1, 1), torch.inf)


def closed_form(
    geometry: DiffractionGeometry, hkl: Tensor, root: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor]:
    """Root of the Ewald condition with everything as it is at ``phi``: (phi, reach)."""
    middle, half, reach = both_roots(geometry, hkl, phi)
    return middle + root * half, reach


def both_roots(
    geometry: DiffractionGeometry, hkl: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both crossings of the Ewald sphere with everything as it is at some rotation angles.

    Parameters
    ----------
    geometry : DiffractionGeometry
    hkl : Tensor, (N, 3)
    phi : Tensor, (N,) or (1,)
        [rad]

    Returns
    -------
    middle, half : Tensor, (N,)
        The crossings are at ``middle + half`` and ``middle - half`` [rad].
    reach : Tensor, (N,)
        As of :func:`solve_ewald`.
    """
    w = _before_rotation(geometry, geometry.at(geometry.A, phi), hkl)
    s = apply(geometry.at(geometry.setting, phi).mT, geometry.at(geometry.s0, phi))
    along, s_along = w @ geometry.axis, s @ geometry.axis
    a = (w * s).sum(1) - along * s_along
    b = (w * torch.linalg.cross(s, geometry.axis.expand_as(s))).sum(1)  # s . (e x w)
    c = -0.5 * (w * w).sum(1) - along * s_along
    reach = c / torch.hypot(a, b).clamp_min(1e-300)
    return torch.atan2(b, a), torch.arccos(reach.clamp(-1, 1)), reach


def scattering_vector(geometry: DiffractionGeometry, hkl: Tensor, phi: Tensor) -> Tensor:
    """Reciprocal-lattice vector in the laboratory at rotation ``phi``, (N, 3) [1/A]."""
    w = _before_rotation(geometry, geometry.at(geometry.A, phi), hkl)
    return apply(geometry.at(geometry.setting, phi), rotate(w, geometry.axis, phi))


def _before_rotation(geometry: DiffractionGeometry, A: Tensor, hkl: Tensor) -> Tensor:
    """``F A h``, (N, 3)."""
    return apply(geometry.fixed @ A, hkl)


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Multiply (N or 1, 3, 3) matrices with (N or 1, 3) vectors, row by row."""
    return (matrix @ vector[:, :, None])[:, :, 0]


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
    s1 = geometry.at(geometry.s0, phi) + scattering_vector(geometry, hkl, phi)
    return Rays(phi, s1, slope * torch.sign(geometry.phi_width.detach()) < 0)


def _excess(geometry: DiffractionGeometry, hkl: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """``|s0 + r|^2 - |s0|^2`` [1/A^2] and its derivative by phi, each (N,)."""
    r = scattering_vector(geometry, hkl, phi)
    s0 = geometry.at(geometry.s0, phi)
    excess = (r * r).sum(1) + 2 * (r * s0).sum(1)
    dr = torch.linalg.cross(geometry.lab_axis(phi).expand_as(r), r)
    if geometry.is_varying:
        setting = geometry.at(geometry.setting, phi)
        w = _before_rotation(geometry, geometry.drift(geometry.A, phi), hkl)
        dr = dr + apply(setting, rotate(w, geometry.axis, phi))
        w = _before_rotation(geometry, geometry.at(geometry.A, phi), hkl)
        dr = dr + apply(geometry.drift(geometry.setting, phi), rotate(w, geometry.axis, phi))
    slope = 2 * ((r + s0) * dr).sum(1) + 2 * (r * geometry.drift(geometry.s0, phi)).sum(1)
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
    sensor (the strategy ``ParallaxCorrectedPxMmStrategy`` of dxtbx), and the distortion maps
    (``Offset...PxMmStrategy``).

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
    px = (mm + _parallax(geometry, s1, panel)) / geometry.pixel_size[panel]
    return Impacts(mm, px if geometry.offsets is None else px + _offset(geometry, px, panel))


def _offset(geometry: DiffractionGeometry, px: Tensor, panel: Tensor) -> Tensor:
    """Distortion of the detector at ideal positions [pixels], (N, 2): that of the pixel."""
    assert geometry.offsets is not None
    offset = torch.zeros_like(px)
    for number, maps in enumerate(geometry.offsets):
        rows = torch.nonzero(panel == number)[:, 0]
        fast, slow = px[rows].detach().floor().long().unbind(1)
        slow, fast = slow.clamp(0, maps.shape[1] - 1), fast.clamp(0, maps.shape[2] - 1)
        offset[rows] = maps[:, slow, fast].T
    return offset


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
