"""Frames, geometry and spots made up for tests of the extraction: two panels, 14 frames."""

import gemmi
import numpy as np
import torch

from braggflux.integrator.crystal.geometry import (
    Beam,
    Crystal,
    Experiment,
    Goniometer,
    Panel,
    Scan,
)
from braggflux.integrator.prediction.predict import Prediction
from braggflux.integrator.shoebox.extent import SpotExtent

SHAPES = [(34, 41), (27, 30)]
N_IMAGES = 14
WIDTH = 0.5
BOX = (5, 9, 7)
EXTENT = SpotExtent(0.8, 0.9, 0.25, BOX)


class ArrayFrames:
    """Frames held as arrays; counts what is read."""

    def __init__(self, panels: list[np.ndarray], usable: list[np.ndarray]) -> None:
        self.panels, self.usable = panels, usable
        self.n_images = len(panels[0])
        self.panel_shapes = [p.shape[1:] for p in panels]
        self.frames_read: list[int] = []

    def static_mask(self):
        return self.usable

    def read(self, frame):
        self.frames_read.append(frame)
        return [p[frame] for p in self.panels]


def make_experiment(shapes=tuple(SHAPES), n_images=N_IMAGES, width=WIDTH, **changes):
    panels = tuple(
        Panel(
            name=str(i),
            fast_axis=np.array([1.0, 0, 0]),
            slow_axis=np.array([0, -1.0, 0]),
            origin=np.array([-5.0 + 10 * i, 5.0, -80.0]),
            pixel_size=(0.2, 0.2),
            image_size=(fast, slow),
            trusted_range=(0, 5000),
        )
        for i, (slow, fast) in enumerate(shapes)
    )
    values = {
        "beam": Beam(np.array([0, 0, 1.0]), 1.0),
        "panels": panels,
        "goniometer": Goniometer(np.array([1.0, 0, 0])),
        "scan": Scan((1, n_images), (0.0, width)),
        "crystal": Crystal(np.eye(3) / 50.0, gemmi.SpaceGroup("P 1")),
        "identifier": "made-up",
    }
    return Experiment(**{**values, **changes})


def make_prediction(n, rng, shapes=tuple(SHAPES), n_images=N_IMAGES, zeta=None):
    """Centroids anywhere on the panels, also at edges and ends of the scan."""
    panel = rng.integers(0, len(shapes), n)
    slow, fast = np.array(shapes)[panel].T
    xyz = rng.uniform(0, 1, (n, 3)) * np.column_stack([fast, slow, np.full(n, n_images)])
    zeta = rng.uniform(0.3, 1.0, n) if zeta is None else np.full(n, zeta)

    def vectors():
        return torch.from_numpy(rng.normal(size=(n, 3)))

    return Prediction(
        miller_index=torch.from_numpy(rng.integers(-9, 9, (n, 3))),
        panel=torch.from_numpy(panel),
        xyz_px=torch.from_numpy(xyz),
        xyz_mm=vectors(),
        s1=vectors(),
        d=torch.full((n,), 0.6, dtype=torch.float64),  # the panels see less: all is watched
        zeta=torch.from_numpy(zeta),
        lp=torch.ones(n, dtype=torch.float64),
        entering=torch.from_numpy(rng.integers(0, 2, n).astype(bool)),
        s0_crystal=vectors(),
        s1_crystal=vectors(),
    )


def make_frames(rng):
    panels = [rng.poisson(3.0, (N_IMAGES, *shape)).astype(np.int32) for shape in SHAPES]
    for panel in panels:
        panel[rng.uniform(size=panel.shape) < 0.02] = -1
    usable = [np.ones(shape, bool) for shape in SHAPES]
    usable[0][10:13, :] = False
    usable[1][:, 5] = False
    return ArrayFrames(panels, usable)
