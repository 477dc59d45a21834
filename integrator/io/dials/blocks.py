"""Schema of DIALS experiment lists: what a block may hold, of what we read.

Fields that are not named here may be anything. Bounds are those of what can be, not of what is
usual: a value outside is damage, or a unit gone wrong.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct, field

from braggflux.integrator.io.schema import ImageNumber, Real, Vector, Wavelength

Index = Annotated[int, Meta(ge=0)]
Rotation = Annotated[list[Real], Meta(min_length=9, max_length=9)]
Millimetres = Annotated[float, Meta(ge=-1e6, le=1e6)]
Degrees = Annotated[float, Meta(ge=-1e6, le=1e6)]
Pixels = Annotated[int, Meta(ge=-(10**7), le=10**7)]
PixelSize = Annotated[float, Meta(ge=1e-4, le=100.0)]
PanelSize = Annotated[int, Meta(ge=1, le=10**6)]
FrameNumber = Annotated[int, Meta(ge=0, le=10**9)]
Range = tuple[ImageNumber, ImageNumber]


class BeamBlock(Struct):
    """Beam; one without wavelength is polychromatic."""

    direction: Vector = (0.0, 0.0, 1.0)
    wavelength: Wavelength | None = None
    polarization_normal: Vector = (0.0, 1.0, 0.0)
    polarization_fraction: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.999
    s0_at_scan_points: list[Vector] | None = None


class Strategy(Struct):
    """How positions become pixels."""

    type: str = ""


class FrameBlock(Struct):
    """Axes of a panel or a group of panels in its parent's frame; none are the parent's."""

    fast_axis: Vector | None = None
    slow_axis: Vector | None = None
    origin: tuple[Millimetres, Millimetres, Millimetres] | None = None


class PanelBlock(FrameBlock, kw_only=True):
    """Panel."""

    pixel_size: tuple[PixelSize, PixelSize]
    image_size: tuple[PanelSize, PanelSize]
    name: str = ""
    type: str = ""
    trusted_range: tuple[Real, Real] = (0.0, 0.0)  # as dxtbx: nothing
    thickness: Annotated[float, Meta(ge=0.0, le=1e3)] = 0.0
    mu: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.0
    material: str = ""
    gain: Annotated[float, Meta(ge=1e-3, le=1e6)] = 1.0
    pedestal: Annotated[float, Meta(ge=-1e9, le=1e9)] = 0.0
    mask: list[tuple[Pixels, Pixels, Pixels, Pixels]] = field(default_factory=list)
    px_mm_strategy: Strategy = field(default_factory=Strategy)


class GroupBlock(FrameBlock, kw_only=True):
    """Node of the hierarchy of panels: a panel by its number, or a group."""

    panel: Index | None = None
    children: list[GroupBlock] = field(default_factory=list)


class DetectorBlock(Struct):
    """Detector."""

    panels: list[PanelBlock]
    hierarchy: GroupBlock | None = None


class GoniometerBlock(Struct):
    """Goniometer: of one axis, or of several, one of which turns in a scan."""

    rotation_axis: Vector | None = None
    fixed_rotation: Rotation | None = None
    setting_rotation: Rotation | None = None
    setting_rotation_at_scan_points: list[Rotation] | None = None
    axes: list[Vector] | None = None
    angles: list[Degrees] | None = None
    scan_axis: Index | None = None


class Properties(Struct):
    """Values of each image, of newer lists."""

    oscillation: Annotated[list[Degrees], Meta(min_length=1)] | None = None
    oscillation_width: Degrees | Annotated[list[Degrees], Meta(min_length=1)] | None = None


class ScanBlock(Struct):
    """Scan."""

    image_range: Range
    oscillation: tuple[Degrees, Degrees] | None = None
    properties: Properties | None = None
    valid_image_ranges: dict[str, list[Range]] | None = None


class CrystalBlock(Struct):
    """Crystal."""

    real_space_a: Vector
    real_space_b: Vector
    real_space_c: Vector
    space_group_hall_symbol: str
    A_at_scan_points: list[Rotation] | None = None


class ImagesBlock(Struct):
    """Image set: a template, or a file for each image, or neither (images in memory)."""

    template: str | None = None
    images: list[str] | None = None
    single_file_indices: list[FrameNumber] | None = None
    params: dict[str, Any] | None = None
    mask: str | None = None
    gain: str | None = None
    pedestal: str | None = None
    dx: str | None = None
    dy: str | None = None


class EntryBlock(Struct):
    """Experiment: the place of each of its models in the list of its kind."""

    identifier: str = ""
    beam: Index | None = None
    detector: Index | None = None
    goniometer: Index | None = None
    scan: Index | None = None
    crystal: Index | None = None
    imageset: Index | None = None
    profile: Index | None = None
    scaling_model: Index | None = None


class ListDocument(Struct):
    """Whole file."""

    experiment: list[EntryBlock]
    beam: list[BeamBlock] = field(default_factory=list)
    detector: list[DetectorBlock | list[PanelBlock]] = field(default_factory=list)
    goniometer: list[GoniometerBlock | None] = field(default_factory=list)
    scan: list[ScanBlock | None] = field(default_factory=list)
    crystal: list[CrystalBlock | None] = field(default_factory=list)
    imageset: list[ImagesBlock] = field(default_factory=list)
    profile: list[dict[str, Any] | None] = field(default_factory=list)
    scaling_model: list[dict[str, Any] | None] = field(default_factory=list)
