"""Beam, panels, goniometer, scan and crystal of an experiment, as plain NumPy float64 values.

Frames and signs are those of dxtbx/imgCIF (laboratory frame in mm and 1/Angstrom):

* ``s0 = -direction / wavelength`` points along the beam; ``s1 = s0 + r`` with ``|s1| = |s0|``.
* ``r(phi) = setting_rotation @ R(rotation_axis, phi) @ fixed_rotation @ A(phi) @ h``.
* Pixel coordinates are continuous, (fast, slow), with the centre of the first pixel at (0.5, 0.5).
* Frame coordinates ``z`` are continuous and counted from the scan's own start: z = 0 at the start
  of its first image, whatever the number of that image. Files of DIALS count differently; see
  :mod:`braggflux.integrator.io.dials.frames`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError

Array = NDArray[np.float64]

#: Frames that are narrower are stills to dxtbx.
MIN_WIDTH_DEG = 1e-7


@dataclass(frozen=True)
class Beam:
    """Monochromatic beam.

    Parameters
    ----------
    direction : Array, (3,)
        Unit vector from the sample towards the source (dxtbx convention).
    wavelength : float
        [A]
    polarization_normal : Array, (3,)
        Normal of the polarization plane.
    polarization_fraction : float
        Fraction polarized in the plane; 0.5 is unpolarized.
    s0_at_scan_points : Array, (n_images + 1, 3), optional
        Incident beam vector [1/A] at the frame boundaries, when refined scan-varying.
    """

    direction: Array
    wavelength: float
    polarization_normal: Array = field(default_factory=lambda: np.array([0.0, 1.0, 0.0]))
    polarization_fraction: float = 0.999
    s0_at_scan_points: Array | None = None

    @property
    def s0(self) -> Array:
        """Incident beam vector, (3,) [1/A], pointing from the source to the sample.

        The mean of a scan-varying one: refinement may leave ``direction`` far from it, with the
        detector moved in turn.
        """
        if self.s0_at_scan_points is not None:
            return self.s0_at_scan_points.mean(axis=0)
        return -self.direction / np.linalg.norm(self.direction) / self.wavelength


@dataclass(frozen=True)
class Panel:
    """One flat detector panel.

    ``mu`` [1/mm] and ``thickness`` [mm] give the parallax correction when ``parallax`` is true.
    Photons are ``(ADU - pedestal) / gain``. ``mask`` holds untrusted rectangles (fast0, slow0,
    fast1, slow1) in pixels, half-open. ``is_distorted`` says that pixel positions need the maps
    ``dx``, ``dy`` of the images.
    """

    name: str
    fast_axis: Array
    slow_axis: Array
    origin: Array
    pixel_size: tuple[float, float]
    image_size: tuple[int, int]  # (fast, slow) pixels
    trusted_range: tuple[float, float] = (0.0, 1.0e9)
    thickness: float = 0.0
    mu: float = 0.0
    material: str = ""
    parallax: bool = False
    gain: float = 1.0
    type: str = "SENSOR_PAD"
    pedestal: float = 0.0
    mask: tuple[tuple[int, int, int, int], ...] = ()
    is_distorted: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(slow, fast): the shape of the panel's image array."""
        return self.image_size[1], self.image_size[0]

    @property
    def d_matrix(self) -> Array:
        """(3, 3) matrix whose columns are fast axis, slow axis and origin: lab = d @ (x, y, 1)."""
        return np.stack([self.fast_axis, self.slow_axis, self.origin], axis=1)


@dataclass(frozen=True)
class Goniometer:
    """Single-axis goniometer: ``S @ R(axis, phi) @ F``.

    ``setting_rotation_at_scan_points``, when refined scan-varying, has one ``S`` per frame
    boundary: (n_images + 1, 3, 3).
    """

    rotation_axis: Array
    fixed_rotation: Array = field(default_factory=lambda: np.eye(3))
    setting_rotation: Array = field(default_factory=lambda: np.eye(3))
    setting_rotation_at_scan_points: Array | None = None

    @property
    def lab_axis(self) -> Array:
        """Rotation axis in the laboratory frame, (3,), unit length."""
        axis = self.setting_rotation @ self.rotation_axis
        return axis / np.linalg.norm(axis)


@dataclass(frozen=True)
class Scan:
    """Rotation scan.

    ``image_range`` is 1-based and inclusive; ``oscillation`` is (start, width) of the first image
    in degrees.
    """

    image_range: tuple[int, int]
    oscillation: tuple[float, float]

    @property
    def n_images(self) -> int:
        """Number of images."""
        return self.image_range[1] - self.image_range[0] + 1

    @property
    def array_range(self) -> tuple[int, int]:
        """DIALS' half-open range of array indices: image n has the index n - 1."""
        return self.image_range[0] - 1, self.image_range[1]

    def phi_deg(self, z: Array) -> Array:
        """Rotation angle [deg] at frame coordinate ``z`` (0 = start of the first image)."""
        return self.oscillation[0] + self.oscillation[1] * np.asarray(z, dtype=float)


@dataclass(frozen=True)
class Crystal:
    """Crystal setting.

    ``A = U B`` maps Miller indices to 1/A at phi = 0 (columns a*, b*, c*). ``A_at_scan_points``,
    when refined scan-varying, has one matrix per frame *boundary*: (n_images + 1, 3, 3).
    """

    A: Array
    space_group: gemmi.SpaceGroup
    A_at_scan_points: Array | None = None

    @property
    def unit_cell(self) -> gemmi.UnitCell:
        """Unit cell of the static setting."""
        real = np.linalg.inv(self.A)  # rows a, b, c
        metric = real @ real.T
        a, b, c = np.sqrt(np.diag(metric))
        angles = (metric[1, 2] / (b * c), metric[0, 2] / (a * c), metric[0, 1] / (a * b))
        return gemmi.UnitCell(a, b, c, *np.degrees(np.arccos(angles)))


@dataclass(frozen=True)
class ExternalLookup:
    """Files of what DIALS knows of the pixels of an image set, besides the images themselves.

    ``mask`` of usable pixels; ``gain`` [ADU per photon] and ``pedestal`` [ADU] in place of the
    panels'; ``dx``, ``dy`` [pixels], added to positions on the ideal detector.
    """

    mask: str | None = None
    gain: str | None = None
    pedestal: str | None = None
    dx: str | None = None
    dy: str | None = None


@dataclass(frozen=True)
class ImageFiles:
    """Where the frames are.

    ``paths`` has one entry for a multi-image file (HDF5 master) and one per frame otherwise;
    ``indices`` are the 0-based frame numbers inside the file (for a template: 0 .. n-1).
    ``params`` are what dxtbx' format class is told (``multi_panel`` of ``dials.import``, say).
    """

    paths: tuple[str, ...]
    indices: tuple[int, ...] = ()
    lookup: ExternalLookup = ExternalLookup()
    params: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One sweep (or still) with everything known of its geometry.

    ``valid_images`` are the ranges of images, numbered as in the scan and inclusive, that an
    earlier ``exclude_images`` of DIALS has left; none means all. ``dataset`` names the data set
    whose amplitudes it measures, where a run has several.
    """

    beam: Beam
    panels: tuple[Panel, ...]
    goniometer: Goniometer | None = None
    scan: Scan | None = None
    crystal: Crystal | None = None
    images: ImageFiles | None = None
    identifier: str = ""
    valid_images: tuple[tuple[int, int], ...] = ()
    dataset: str = ""

    @property
    def is_still(self) -> bool:
        """Whether nothing rotates, as in dxtbx: no scan, no goniometer, or frames of no width."""
        if self.scan is None or self.goniometer is None:
            return True
        return abs(self.scan.oscillation[1]) < MIN_WIDTH_DEG

    @property
    def can_be_integrated(self) -> bool:
        """Whether shoeboxes can be cut: a crystal that rotates."""
        return self.crystal is not None and not self.is_still

    @property
    def rotation(self) -> Rotation:
        """The models of a sweep that can be integrated.

        Raises
        ------
        UserError
            It cannot; the message says what it lacks.
        """
        name = f"experiment {self.identifier or '(unnamed)'}"
        if self.crystal is None:
            raise UserError(f"{name} has no crystal: give an indexed or refined EXPT file")
        if not self.panels:
            raise UserError(f"{name} has a detector without panels: give an EXPT file of images")
        if self.goniometer is None or self.scan is None or self.is_still:
            raise UserError(
                f"{name} is a still: shoeboxes need a rotation scan; merge stills with "
                "braggflux merge --stills"
            )
        return Rotation(self.goniometer, self.scan, self.crystal)


class Rotation(NamedTuple):
    """What every experiment has that can be integrated."""

    goniometer: Goniometer
    scan: Scan
    crystal: Crystal
