"""DIALS .expt blocks (dxtbx models as JSON) to and from the geometry dataclasses.

The frames are the same on both sides (imgCIF laboratory frame, mm, 1/A); angles are degrees in
the file. ``decode_*`` takes one JSON block, ``encode_*`` makes one that dxtbx reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Beam, Crystal, Goniometer, Panel, Scan

Block = dict[str, Any]
Number = TypeVar("Number", int, float)
_IDENTITY = tuple(np.eye(3).ravel())


def decode_beam(block: Block) -> Beam:
    """Read a monochromatic beam."""
    if "wavelength" not in block:
        raise ValueError(f"beam of type {block.get('__id__')!r}; only monochromatic is supported")
    return Beam(
        direction=np.asarray(block["direction"], dtype=float),
        wavelength=float(block["wavelength"]),
        polarization_normal=np.asarray(block.get("polarization_normal", (0, 1, 0)), dtype=float),
        polarization_fraction=float(block.get("polarization_fraction", 0.999)),
        s0_at_scan_points=_at_scan_points(block, "s0_at_scan_points", (3,)),
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


def decode_detector(block: Block | list[Block]) -> tuple[Panel, ...]:
    """Read the panels, each in the laboratory frame.

    A panel's own frame is relative to its parent in ``hierarchy``, whose nodes nest.
    """
    panels = block if isinstance(block, list) else block["panels"]
    frames = [np.eye(4)] * len(panels)
    if isinstance(block, dict) and "hierarchy" in block:
        _collect_frames(block["hierarchy"], np.eye(4), frames)
    return tuple(_decode_panel(p, f) for p, f in zip(panels, frames, strict=True))


def _collect_frames(
    node: Block, parent: NDArray[np.float64], frames: list[NDArray[np.float64]]
) -> None:
    """Write the frame of each panel's parent into ``frames``, walking down the hierarchy."""
    if "panel" in node:
        frames[node["panel"]] = parent
        return
    frame = parent @ _frame(node)
    for child in node.get("children", ()):
        _collect_frames(child, frame, frames)


def _frame(block: Block) -> NDArray[np.float64]:
    """(4, 4) affine matrix of a panel or group in its parent's frame."""
    frame = np.eye(4)
    if not {"fast_axis", "slow_axis", "origin"} <= block.keys():
        return frame
    fast = np.asarray(block["fast_axis"], dtype=float)
    slow = np.asarray(block["slow_axis"], dtype=float)
    frame[:3, 0] = fast / np.linalg.norm(fast)
    frame[:3, 1] = slow / np.linalg.norm(slow)
    frame[:3, 2] = np.cross(frame[:3, 0], frame[:3, 1])
    frame[:3, 3] = block["origin"]
    return frame


def _decode_panel(block: Block, parent: NDArray[np.float64]) -> Panel:
    frame = parent @ _frame(block)
    strategy = block.get("px_mm_strategy", {}).get("type", "")
    return Panel(
        name=block.get("name", ""),
        fast_axis=frame[:3, 0],
        slow_axis=frame[:3, 1],
        origin=frame[:3, 3],
        pixel_size=_pair(block["pixel_size"], float),
        image_size=_pair(block["image_size"], int),
        trusted_range=_pair(block.get("trusted_range", (0.0, 0.0)), float),  # as dxtbx: nothing
        thickness=float(block.get("thickness", 0.0)),
        mu=float(block.get("mu", 0.0)),
        material=block.get("material", ""),
        parallax="ParallaxCorrected" in strategy,
        gain=float(block.get("gain", 1.0)),
        type=block.get("type", ""),
        pedestal=float(block.get("pedestal", 0.0)),
        mask=tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in block.get("mask", ())),
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


def decode_goniometer(block: Block) -> Goniometer:
    """Read a single- or multi-axis goniometer.

    The axes of the latter are listed from the crystal outwards: those before the scan axis
    give the fixed rotation, those after it the setting rotation.
    """
    varying = _at_scan_points(block, "setting_rotation_at_scan_points", (3, 3))
    if {"axes", "angles", "scan_axis"} <= block.keys():
        axes, angles = np.asarray(block["axes"], dtype=float), block["angles"]
        scan = int(block["scan_axis"])
        return Goniometer(
            rotation_axis=axes[scan],
            fixed_rotation=_compose(axes[:scan], angles[:scan]),
            setting_rotation=_compose(axes[scan + 1 :], angles[scan + 1 :]),
            setting_rotation_at_scan_points=varying,
        )
    return Goniometer(
        rotation_axis=np.asarray(block["rotation_axis"], dtype=float),
        fixed_rotation=_matrix(block.get("fixed_rotation", _IDENTITY)),
        setting_rotation=_matrix(block.get("setting_rotation", _IDENTITY)),
        setting_rotation_at_scan_points=varying,
    )


def _compose(axes: NDArray[np.float64], angles_deg: Sequence[float]) -> NDArray[np.float64]:
    """Rotate about each axis in turn, the first one first."""
    from scipy.spatial.transform import Rotation  # 14 MiB that reading other files does without

    total = np.eye(3)
    for axis, angle in zip(axes, angles_deg, strict=True):
        vector = np.radians(angle) * axis / np.linalg.norm(axis)
        total = Rotation.from_rotvec(vector).as_matrix() @ total
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


def decode_scan(block: Block) -> Scan:
    """Read a scan, from ``oscillation`` or from the newer ``properties`` (a start per image)."""
    image_range = _pair(block["image_range"], int)
    if image_range[1] < image_range[0]:
        raise ValueError(f"image range {image_range} is empty")
    properties = block.get("properties", {})
    if "oscillation" not in properties:
        return Scan(image_range, _pair(block["oscillation"], float))
    starts = np.asarray(properties["oscillation"], dtype=float)
    if "oscillation_width" in properties:
        width = float(np.ravel(properties["oscillation_width"])[0])
    else:
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


def decode_crystal(block: Block) -> Crystal:
    """Read a crystal: real-space axes, Hall symbol and, when scan-varying, A per boundary."""
    axes = np.array([block[f"real_space_{name}"] for name in "abc"], dtype=float)
    return Crystal(
        A=np.linalg.inv(axes),
        space_group=_space_group(block["space_group_hall_symbol"]),
        A_at_scan_points=_at_scan_points(block, "A_at_scan_points", (3, 3)),
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


def _at_scan_points(block: Block, name: str, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Values at the frame boundaries, (n_images + 1, ...); None where there are none."""
    points = block.get(name)
    return np.asarray(points, dtype=float).reshape(-1, *shape) if points else None


def _matrix(values: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(values, dtype=float).reshape(3, 3)


def _pair(values: Sequence[float], kind: Callable[[float], Number]) -> tuple[Number, Number]:
    first, second = values
    return kind(first), kind(second)
