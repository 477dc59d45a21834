"""Detector frames with what was predicted on them."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Experiment, Panel
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.io.dials.sweeps import sweeps_of
from braggflux.integrator.io.images import ExperimentFrames, open_frames
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.shoebox.mask import MaskBit
from braggflux.pipelines.view.columns import IntensityColumns
from braggflux.pipelines.workspace.rundir import RunDirectory

Array = NDArray[Any]

#: Pixels without a count, in what is sent; counts end one below.
NO_COUNT = 65535
#: Bits of the mask that is sent: used for a spot, left by a spot to its neighbour, not recorded.
OWN, NEIGHBOUR, LEFT_OUT = 1, 2, 4
#: Resolutions of rings [A]; those on the panel are drawn.
RINGS = (20.0, 10.0, 6.0, 4.0, 3.0, 2.5, 2.0, 1.7, 1.5, 1.3, 1.1, 1.0, 0.9, 0.8)
RING_POINTS = 361


class FrameViews:
    """Frames of a run, their boxes and masks.

    Parameters
    ----------
    run : RunDirectory
    columns : IntensityColumns
    """

    def __init__(self, run: RunDirectory, columns: IntensityColumns) -> None:
        self._run, self._columns = run, columns
        self._lock = threading.Lock()
        self._open: dict[int, ExperimentFrames] = {}

    @cached_property
    def sweeps(self) -> list[Experiment]:
        """Experiments in the order of the column ``experiment``.

        Raises
        ------
        UserError
            A file of the run is missing or does not have these sweeps.
        """
        files = [own.integrated_expt for own in self._run.data_sets()]
        sweeps = [sweep for path in files for sweep in sweeps_of(read_experiments(path))]
        if len(sweeps) != len(self._columns.sweeps):
            raise UserError(
                f"{files[0].name} has {len(sweeps)} sweeps and intensities.h5 "
                f"{len(self._columns.sweeps)}: make the run again"
            )
        return sweeps

    def check(self, sweep: int, frame: int, panel: int) -> None:
        """Raise :class:`UserError` unless there is such a frame."""
        if not 0 <= sweep < len(self._columns.sweeps):
            raise UserError(f"no sweep {sweep}: there are {len(self._columns.sweeps)}, from 0")
        record = self._columns.sweeps[sweep]
        if not 0 <= frame < record["n_images"]:
            raise UserError(f"no frame {frame} in sweep {sweep} of {record['n_images']}, from 0")
        if not 0 <= panel < len(record["panel_shapes"]):
            raise UserError(f"no panel {panel}: there are {len(record['panel_shapes'])}, from 0")

    def counts(self, sweep: int, frame: int, panel: int) -> Array:
        """Photons of a frame, (slow, fast) uint16, :data:`NO_COUNT` where there is none."""
        with self._lock:
            if sweep not in self._open:
                self._open[sweep] = open_frames(self.sweeps[sweep])
            frames = self._open[sweep]
            photons = frames.read(frame)[panel]
            is_good = frames.static_mask()[panel] & (photons >= 0)
        return np.where(is_good, np.minimum(photons, NO_COUNT - 1), NO_COUNT).astype("<u2")

    def boxes(self, sweep: int, frame: int, panel: int) -> dict[str, Any]:
        """Columns of the spots whose boxes are on a frame, and the size of a box (slow, fast)."""
        columns = self._columns
        rows = columns.on_frame(sweep, frame, panel)
        _, height, width = self._box or (0, 9, 9)
        corner = columns["corner"][rows]
        return {
            "size": [height, width],
            "row": rows.tolist(),
            "slow": corner[:, 1].tolist(),
            "fast": corner[:, 2].tolist(),
            "hkl": columns["miller_index"][rows].tolist(),
            "flags": columns["flags"][rows].tolist(),
            "signal": np.round(columns.intensity[rows] / columns.sigma[rows], 1).tolist(),
        }

    @cached_property
    def _box(self) -> tuple[int, int, int] | None:
        return box_shape(self._run)

    @cached_property
    def _store(self) -> ShoeboxStore | None:
        return ShoeboxStore.open(self._run.shoeboxes) if self._run.shoeboxes.is_file() else None

    def mask(self, sweep: int, frame: int, panel: int) -> Array:
        """Bits :data:`OWN`, :data:`NEIGHBOUR`, :data:`LEFT_OUT` of each pixel, (slow, fast)."""
        height, width = self._columns.sweeps[sweep]["panel_shapes"][panel]
        image = np.zeros((height, width), np.uint8)
        with self._lock:
            store = self._store
            if store is None:
                return image
            rows = self._columns.on_frame(sweep, frame, panel)
            bits = store.read_raw(torch.from_numpy(self._columns["refl_row"][rows].astype(int)))[1]
        corner, deep = self._columns["corner"][rows], self._columns["frames_per_layer"][rows]
        layer = (frame - corner[:, 0]) // deep
        for own, (_, slow, fast) in zip(
            bits.numpy()[np.arange(len(rows)), layer], corner, strict=True
        ):
            top, left = max(slow, 0), max(fast, 0)
            # an end below 0 would count from the other side
            bottom, right = max(slow + own.shape[0], 0), max(fast + own.shape[1], 0)
            view = image[top:bottom, left:right]
            own = own[top - slow :, left - fast :][: view.shape[0], : view.shape[1]]
            is_spot = (own & MaskBit.FOREGROUND) > 0
            is_taken, is_valid = (own & MaskBit.OVERLAPPED) > 0, (own & MaskBit.VALID) > 0
            view |= OWN * (is_spot & ~is_taken & is_valid).astype(np.uint8)
            view |= NEIGHBOUR * (is_spot & is_taken).astype(np.uint8)
            view |= LEFT_OUT * (is_spot & ~is_valid).astype(np.uint8)
        return image

    def geometry(self, sweep: int, panel: int) -> dict[str, Any]:
        """Resolution rings, and what gives the resolution of a pixel."""
        experiment = self.sweeps[sweep]
        shape, s0 = experiment.panels[panel], experiment.beam.s0
        rings = {d: ring(shape, s0, d) for d in RINGS}
        return {
            "rings": [{"d": d, "path": path} for d, path in rings.items() if path],
            "d_matrix": shape.d_matrix.tolist(),
            "s0": s0.tolist(),
            "pixel_size": list(shape.pixel_size),
        }


def box_shape(run: RunDirectory) -> tuple[int, int, int] | None:
    """(frames, slow, fast) of the shoeboxes of a run, None where they are not there (any more)."""
    import h5py

    if not run.shoeboxes.is_file():
        return None
    with h5py.File(run.shoeboxes) as handle:
        depth, height, width = (int(n) for n in handle["boxes/counts"].shape[1:])
    return depth, height, width


def ring(panel: Panel, s0: Array, d: float) -> list[list[float]]:
    """Points (fast, slow) [pixels] of a resolution ring on the plane of a panel.

    Empty where none is within a panel's size of the panel, or no beam is diffracted so far.
    """
    wavelength = 1 / np.linalg.norm(s0)
    sine = wavelength / (2 * d)
    if sine >= 1:
        return []
    two_theta = 2 * np.arcsin(sine)
    beam = s0 * wavelength
    across = np.cross(beam, [1.0, 0.0, 0.0] if abs(beam[0]) < 0.9 else [0.0, 1.0, 0.0])
    across /= np.linalg.norm(across)
    other = np.cross(beam, across)
    phi = np.linspace(0, 2 * np.pi, RING_POINTS)[:, None]
    rays = np.cos(two_theta) * beam + np.sin(two_theta) * (
        np.cos(phi) * across + np.sin(phi) * other
    )
    x, y, w = np.linalg.solve(panel.d_matrix, rays.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = np.stack([x / w, y / w], 1) / panel.pixel_size
    size = np.array(panel.image_size)
    inside = (w > 0) & (pixels >= 0).all(1) & (pixels <= size).all(1)
    if not inside.any():
        return []
    near = (w > 0) & (np.abs(pixels - size / 2) < 2 * size.max()).all(1)
    return np.round(pixels[near], 1).tolist()
