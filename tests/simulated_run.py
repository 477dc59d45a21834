"""A run directory with intensities of any number and nothing trained, for the viewer."""

from __future__ import annotations

import json
from pathlib import Path

import gemmi
import numpy as np
import torch

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.io.intensity_file import write_intensities
from braggflux.integrator.types import IntensityTable, ReflectionMetadata
from braggflux.pipelines.workspace.rundir import RunDirectory

CELL, SPACE_GROUP = (79.4, 79.4, 37.8, 90.0, 90.0, 90.0), "P 43 21 2"
N_IMAGES, BOX = 400, 7


def write_run(folder: Path, n: int = 500, name: str = "run") -> RunDirectory:
    """Write config, provenance and intensities.h5 of a run that has ended."""
    run = RunDirectory(folder / name)
    run.path.mkdir(parents=True)
    run.config_file.write_text("training:\n  epochs: 1\n")
    session = {"started": "2026-11-30T01:00:00", "ended": "2026-11-30T02:00:00"}
    record = {"sessions": [session | {"braggflux": "0.1.0"}], "inputs": {}, "notes": {}}
    run.provenance_file.write_text(json.dumps(record))
    write_intensities(run.intensities, intensities(n), [sweep()])
    return run


def sweep() -> dict[str, object]:
    return {
        "identifier": "",
        "wavelength": 1.0,
        "n_images": N_IMAGES,
        "image_range": [1, N_IMAGES],
        "oscillation_deg": [0.0, 0.25],
        "unit_cell": list(CELL),
        "space_group": SPACE_GROUP,
        "panel_shapes": [[619, 487]],
        "pixel_size_mm": [[0.172, 0.172]],
        "images": ["frames.h5"],
    }


def intensities(n: int) -> IntensityTable:
    """Observations in the order of their frames; row 3 is not integrated."""
    random = np.random.default_rng(0)
    hkl = random.integers(-30, 31, (n, 3))
    hkl[(hkl == 0).all(1)] = 1
    centre = np.sort(random.uniform(0, N_IMAGES, n))
    place = np.stack([random.uniform(5, 480, n), random.uniform(5, 610, n), centre], 1)
    corner = np.floor(place[:, ::-1]) - [BOX // 2, 5, 5]
    cell = gemmi.UnitCell(*CELL)
    d = cell.calculate_d_array(hkl.astype(np.int32))
    vectors = torch.zeros(n, 3)
    one = torch.ones(n)
    metadata = ReflectionMetadata(
        refl_row=torch.arange(n),
        miller_index=torch.from_numpy(hkl),
        experiment=torch.zeros(n, dtype=torch.int64),
        panel=torch.zeros(n, dtype=torch.int64),
        xyz_px=torch.from_numpy(place).float(),
        xyz_mm=vectors,
        s1=vectors,
        s0_crystal=vectors,
        s1_crystal=vectors,
        d=torch.from_numpy(np.asarray(d)).float(),
        lp=one,
        zeta=one,
        frame_sigma=one,
        corner=torch.from_numpy(corner.astype(np.int64)),
        frames_per_layer=torch.ones(n, dtype=torch.int64),
    )
    photons = torch.from_numpy(random.gamma(0.5, 400.0, n)).float()
    flags = torch.from_numpy(random.choice([0, 4], n))
    flags[3] = 8
    return IntensityTable(metadata, ShiftedPoisson(photons + 20, 20 * one, one), 0.3 * one, flags)
