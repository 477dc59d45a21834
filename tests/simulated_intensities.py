"""Merged amplitudes measured anew: intensities with known scales and Gaussian errors."""

from __future__ import annotations

import gemmi
import numpy as np

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.io.observations import make_unmerged

CELL = gemmi.UnitCell(40, 50, 60, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")
D_MIN = 4.0


def simulated(rng, n_images=20, n_per_image=150, f=None, asu=None, name="a", wavelength=None):
    """Observations of known F with a scale of each image and known Gaussian errors."""
    asu = asu or ReciprocalAsu(CELL, SPACE_GROUP, D_MIN, False)
    f = np.sqrt(rng.exponential(1000.0, len(asu))) if f is None else f
    image = np.repeat(np.arange(n_images), n_per_image)
    row = rng.integers(0, len(asu), len(image))
    scale = np.exp(0.3 * np.sin(image / 3.0))
    sigma = 20.0 + 0.0 * image
    intensity = scale * f[row] ** 2 + sigma * rng.standard_normal(len(image))
    xy = rng.uniform(0, 1000, (len(image), 2))
    data = make_unmerged(
        source=name,
        miller_index=asu.miller_index[row],
        intensity=intensity,
        sigma=sigma,
        image_label=image,
        metadata={"X": xy[:, 0], "Y": xy[:, 1], "BATCH": image},
        wavelength=wavelength,
        cell=CELL,
        space_group=SPACE_GROUP,
        name=name,
        has_lp_applied=True,
    )
    return data, f, asu
