"""DIALS .expt blocks (dxtbx models as JSON) to and from the geometry dataclasses.

The frames are the same on both sides (imgCIF laboratory frame, mm, 1/A); angles are degrees in
the file. ``decode_*`` takes one block of the schema and refuses what is no rotation, axis or cell
(ValueError that names the field); ``encode_*`` makes a JSON block that dxtbx reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Beam, Crystal, Goniometer, Panel, Scan
from braggflux.integrator.io.dials.blocks import (
    BeamBlock,
    CrystalBlock,
    DetectorBlock,
    FrameBlock,
    GoniometerBlock,
    GroupBlock,
    PanelBlock,
    ScanBlock,
)

Block = dict[str, Any]
#: More would be months of a detector that writes a hundred a second: a damaged number.
MAX_IMAGES = 10**6
_IDENTITY = tuple(np.eye(3).ravel())
#: How far lengths of unit vectors, and cosines of right angles, may be off: digits of text files.
_LENGTH, _SKEW = 0.02, 0.01
_CELL_LENGTHS = (1.0, 1e5)
#: Of a cell over the product of its lengths.
_FLAT = 1e-3


def decode_beam(block: BeamBlock) -> Beam:
    """Read a monochromatic beam."""
    if block.wavelength is None:
        raise ValueError("the beam has no wavelength; only monochromatic ones are supported")
    points = _at_scan_points(block.s0_at_scan_points, (3,))
    if points is not None:
        lengths = np.linalg.norm(points, axis=1) * block.wavelength
        _require(
            np.all((lengths > 0.5) & (lengths < 2.0)),
            f"s0_at_scan_points are {lengths.min():g} to {lengths.max():g} times 1/wavelength",
        )
    return Beam(
        direction=_unit(block.direction, "direction"),
        wavelength=block.wavelength,
        polarization_normal=_unit(block.polarization_normal, "polarization_normal"),
        polarization_fraction=block.polarization_fraction,
        s0_at_scan_points=points,
    )


def encode_beam(beam: Beam) -> Block:
    """Write a monochromatic beam."""
    block: Block = {
        "direction": beam.direction.tolist(),
        "wavelength": beam.wavelength,
        "divergence": 0.0,
        "sigma_divergence": 0.0,
        "polarization_normal": beam.polarization_normal.tolist(),
        "polarization_fraction": beam.polarization_fraction,
        "flux": 0.0,
        "transmission": 1.0,
    }
    if beam.s0_at_scan_points is not None:
        block["s0_at_scan_points"] = beam.s0_at_scan_points.tolist()
    return block


def decode_detector(block: DetectorBlock | list[PanelBlock]) -> tuple[Panel, ...]:
    """Read the panels, each in the laboratory frame.

    A panel's own frame is relative to its parent in ``hierarchy``, whose nodes nest.
    """
    panels = block if isinstance(block, list) else block.panels
    frames = [np.eye(4)] * len(panels)
    if isinstance(block, DetectorBlock) and block.hierarchy is not None:
        _collect_frames(block.hierarchy, np.eye(4), frames)
    return tuple(
        _decode_panel(panel, frame, f"panels[{number}]")
        for number, (panel, frame) in enumerate(zip(panels, frames, strict=True))
    )


def _collect_frames(
    node: GroupBlock, parent: NDArray[np.float64], frames: list[NDArray[np.float64]]
) -> None:
    """Write the frame of each panel's parent into ``frames``, walking down the hierarchy."""
    if node.panel is not None:
        _require(node.panel < len(frames), f"hierarchy names panel {node.panel} of {len(frames)}")
        frames[node.panel] = parent
        return
    frame = parent @ _frame(node, "hierarchy")
    for child in node.children:
        _collect_frames(child, frame, frames)


def _frame(block: FrameBlock, name: str) -> NDArray[np.float64]:
    """(4, 4) affine matrix of a panel or group in its parent's frame."""
    frame = np.eye(4)
    if block.fast_axis is None or block.slow_axis is None or block.origin is None:
        return frame
    fast = _unit(block.fast_axis, f"{name}.fast_axis")
    slow = _unit(block.slow_axis, f"{name}.slow_axis")
    _require(
        abs(fast @ slow) < _SKEW,
        f"{name}: fast_axis {block.fast_axis} and slow_axis {block.slow_axis} are not orthogonal",
    )
    frame[:3, 0], frame[:3, 1], frame[:3, 2] = fast, slow, np.cross(fast, slow)
    frame[:3, 3] = block.origin
    return frame


def _decode_panel(block: PanelBlock, parent: NDArray[np.float64], name: str) -> Panel:
    frame = parent @ _frame(block, name)
    strategy = block.px_mm_strategy.type
    return Panel(
        name=block.name,
        fast_axis=frame[:3, 0],
        slow_axis=frame[:3, 1],
        origin=frame[:3, 3],
        pixel_size=block.pixel_size,
        image_size=block.image_size,
        trusted_range=block.trusted_range,
        thickness=block.thickness,
        mu=block.mu,
        material=block.material,
        parallax="ParallaxCorrected" in strategy,
        gain=block.gain,
        type=block.type,
        pedestal=block.pedestal,
        mask=tuple(block.mask),
        is_distorted=strategy.startswith("Offset"),
    )


def encode_detector(panels: Sequence[Panel]) -> Block:
    """Write a flat detector: every panel in the laboratory frame."""
    return {"panels": [_encode_panel(panel) for panel in panels]}


def _encode_panel(panel: Panel) -> Block:
    strategy = "ParallaxCorrectedPxMmStrategy" if panel.parallax else "SimplePxMmStrategy"
    if panel.is_distorted:
        strategy = "Offset" + strategy.removeprefix("Simple")
    return {
        "name": panel.name,
        "type": panel.type,
        "fast_axis": panel.fast_axis.tolist(),
        "slow_axis": panel.slow_axis.tolist(),
        "origin": panel.origin.tolist(),
        "raw_image_offset": [0, 0],
        "image_size": list(panel.image_size),
        "pixel_size": list(panel.pixel_size),
        "trusted_range": list(panel.trusted_range),
        "thickness": panel.thickness,
        "material": panel.material,
        "mu": panel.mu,
        "identifier": "",
        "mask": [list(rectangle) for rectangle in panel.mask],
        "gain": panel.gain,
        "pedestal": panel.pedestal,
        "px_mm_strategy": {"type": strategy},
    }


def decode_goniometer(block: GoniometerBlock) -> Goniometer:
    """Read a single- or multi-axis goniometer.

    The axes of the latter are listed from the crystal outwards: those before the scan axis
    give the fixed rotation, those after it the setting rotation.
    """
    points = block.setting_rotation_at_scan_points
    varying = _at_scan_points(points, (3, 3))
    if varying is not None:
        _require_rotations(varying, "setting_rotation_at_scan_points")
    if block.axes is not None and block.angles is not None and block.scan_axis is not None:
        axes, angles, scan = block.axes, block.angles, block.scan_axis
        _require(
            scan < len(axes) == len(angles),
            f"scan_axis is {scan} of {len(axes)} axes with {len(angles)} angles",
        )
        units = np.array([_unit(axis, f"axes[{k}]") for k, axis in enumerate(axes)])
        return Goniometer(
            rotation_axis=units[scan],
            fixed_rotation=_compose(units[:scan], angles[:scan]),
            setting_rotation=_compose(units[scan + 1 :], angles[scan + 1 :]),
            setting_rotation_at_scan_points=varying,
        )
    if block.rotation_axis is None:
        raise ValueError("neither rotation_axis nor axes, angles and scan_axis are there")
    return Goniometer(
        rotation_axis=_unit(block.rotation_axis, "rotation_axis"),
        fixed_rotation=_rotation(block.fixed_rotation, "fixed_rotation"),
        setting_rotation=_rotation(block.setting_rotation, "setting_rotation"),
        setting_rotation_at_scan_points=varying,
    )


def _compose(axes: NDArray[np.float64], angles_deg: Sequence[float]) -> NDArray[np.float64]:
    """Rotate about each axis in turn, the first one first."""
    from scipy.spatial.transform import Rotation  # 14 MiB that reading other files does without

    total = np.eye(3)
    for axis, angle in zip(axes, angles_deg, strict=True):
        total = Rotation.from_rotvec(np.radians(angle) * axis).as_matrix() @ total
    return total


def encode_goniometer(goniometer: Goniometer) -> Block:
    """Write a single-axis goniometer."""
    block: Block = {
        "rotation_axis": goniometer.rotation_axis.tolist(),
        "fixed_rotation": goniometer.fixed_rotation.ravel().tolist(),
        "setting_rotation": goniometer.setting_rotation.ravel().tolist(),
    }
    if goniometer.setting_rotation_at_scan_points is not None:
        points = goniometer.setting_rotation_at_scan_points.reshape(-1, 9)
        block["setting_rotation_at_scan_points"] = points.tolist()
    return block


def decode_scan(block: ScanBlock) -> Scan:
    """Read a scan, from ``oscillation`` or from the newer ``properties`` (a start per image)."""
    first, last = image_range = block.image_range
    _require(first <= last, f"image_range {image_range} is empty")
    n_images = last - first + 1
    _require(n_images <= MAX_IMAGES, f"image_range {image_range} is of more than {MAX_IMAGES}")
    properties = block.properties
    if properties is None or properties.oscillation is None:
        if block.oscillation is None:
            raise ValueError("oscillation is missing")
        return Scan(image_range, block.oscillation)
    starts = np.array(properties.oscillation)
    _require(
        len(starts) == n_images,
        f"properties.oscillation has {len(starts)} values for {n_images} images",
    )
    width = properties.oscillation_width
    if isinstance(width, list):
        width = width[0]
    elif width is None:
        width = float((starts[-1] - starts[0]) / (len(starts) - 1)) if len(starts) > 1 else 0.0
    if not np.allclose(starts, starts[0] + width * np.arange(len(starts)), atol=1e-3):
        raise ValueError("the scan's images are not of equal width")
    return Scan(image_range, (float(starts[0]), width))


def encode_scan(scan: Scan) -> Block:
    """Write a scan; exposure times and epochs are unknown to us and zero."""
    return {
        "image_range": list(scan.image_range),
        "batch_offset": 0,
        "oscillation": list(scan.oscillation),
        "exposure_time": [0.0] * scan.n_images,
        "epochs": [0.0] * scan.n_images,
        "valid_image_ranges": {},
    }


def decode_crystal(block: CrystalBlock) -> Crystal:
    """Read a crystal: real-space axes, Hall symbol and, when scan-varying, A per boundary."""
    axes = np.array([block.real_space_a, block.real_space_b, block.real_space_c])
    _require_cell(axes, "real_space_a, b, c")
    varying = _at_scan_points(block.A_at_scan_points, (3, 3))
    if varying is not None:
        for number, inverse in enumerate(np.linalg.inv(varying)):
            _require_cell(inverse, f"A_at_scan_points[{number}]")
    return Crystal(
        A=np.linalg.inv(axes),
        space_group=_space_group(block.space_group_hall_symbol),
        A_at_scan_points=varying,
    )


def _space_group(hall: str) -> gemmi.SpaceGroup:
    """Find the tabulated setting that a Hall symbol (with or without basis change) generates."""
    try:
        found = gemmi.find_spacegroup_by_ops(gemmi.symops_from_hall(hall.strip()))
    except RuntimeError as error:
        raise ValueError(f"Hall symbol {hall!r}: {error}") from error
    if found is None:
        raise ValueError(f"space group with Hall symbol {hall!r} is not a tabulated setting")
    return found


def encode_crystal(crystal: Crystal) -> Block:
    """Write a crystal."""
    axes = np.linalg.inv(crystal.A)
    block: Block = {"__id__": "crystal"}
    block |= {f"real_space_{name}": axis.tolist() for name, axis in zip("abc", axes, strict=True)}
    block["space_group_hall_symbol"] = crystal.space_group.hall
    if crystal.A_at_scan_points is not None:
        points = crystal.A_at_scan_points.reshape(-1, 9)
        block["A_at_scan_points"] = points.tolist()
    return block


def _at_scan_points(
    points: Sequence[Sequence[float]] | None, shape: tuple[int, ...]
) -> NDArray[np.float64] | None:
    """Values at the frame boundaries, (n_images + 1, ...); None where there are none."""
    return np.asarray(points, dtype=float).reshape(-1, *shape) if points else None


def _require(is_so: object, what: str) -> None:
    if not is_so:
        raise ValueError(what)


def _unit(vector: Sequence[float], name: str) -> NDArray[np.float64]:
    """Give a direction the length 1, as dxtbx does; of one far from it nobody knows what it is."""
    array = np.asarray(vector, dtype=float)
    length = np.linalg.norm(array)
    _require(1e-3 < length < 1e3, f"{name} {vector} has the length {length:g}, 1 is expected")
    return array / length


def _rotation(values: Sequence[float] | None, name: str) -> NDArray[np.float64]:
    """(3, 3) matrix of nine values, the identity without."""
    matrix = np.asarray(_IDENTITY if values is None else values, dtype=float).reshape(3, 3)
    _require_rotations(matrix[None], name)
    return matrix


def _require_rotations(matrices: NDArray[np.float64], name: str) -> None:
    """Refuse matrices, (N, 3, 3), that are no rotations."""
    largest = np.abs(matrices).max()
    is_rotation = largest < 1.0 + _LENGTH
    if is_rotation:
        off = np.abs(np.swapaxes(matrices, 1, 2) @ matrices - np.eye(3)).max()
        is_rotation = bool(off < _SKEW and np.all(np.linalg.det(matrices) > 0.0))
    _require(is_rotation, f"{name} is no rotation")


def _require_cell(axes: NDArray[np.float64], name: str) -> None:
    """Refuse axes a, b, c, the rows [A], that are no unit cell."""
    lengths = np.linalg.norm(axes, axis=1)
    low, high = _CELL_LENGTHS
    _require(
        np.all((lengths >= low) & (lengths <= high)),
        f"{name} have the lengths {lengths.tolist()} A, {low:g} to {high:g} are allowed",
    )
    share = abs(np.linalg.det(axes / lengths[:, None]))
    _require(share > _FLAT, f"{name} lie in one plane")
