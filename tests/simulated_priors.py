"""Unmerged intensities of a toy crystal with known amplitudes, anisotropy and model.

Plain NumPy, independent of the code it tests: complex normal structure factors, a model that
correlates with them, image scales and Gaussian errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import gemmi
import numpy as np
import torch

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.training import fit, start
from braggflux.merge.io.observations import UnmergedData, make_unmerged
from braggflux.merge.model.merger import Merger
from braggflux.merge.problem import MergeProblem, build_problem

CELL = gemmi.UnitCell(50, 60, 70, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")


@dataclass(frozen=True)
class Crystal:
    """Unique reflections, true and model amplitudes, mean intensity, (R,) each."""

    asu: ReciprocalAsu
    amplitude: np.ndarray
    model: np.ndarray
    sigma: np.ndarray


def crystal(
    *, d_min=3.0, sigma_a=0.0, b=30.0, tensor=None, seed=0, anomalous=False, noise_r2=0.0
) -> Crystal:
    """E = sigma_a E_model + rest; F-, where kept apart, is F+ but for a share ``noise_r2``.

    ``tensor`` (3, 3) is the anisotropic B of the intensities [A^2]; the model has none of it, its
    B is 10 A^2 less and its scale another.
    """
    asu = ReciprocalAsu(CELL, SPACE_GROUP, d_min, anomalous)
    rng = np.random.default_rng(seed)
    plus = np.where(asu.friedel_sign > 0, np.arange(len(asu)), asu.friedel_mate)

    def normal():
        real, imaginary = rng.normal(size=(2, len(asu)))
        return np.where(asu.is_centric, real, (real + 1j * imaginary) / 2**0.5)

    model = normal()[plus]
    e = sigma_a * model + np.sqrt(1 - sigma_a**2) * normal()[plus]
    is_minus = asu.friedel_sign < 0
    e = np.where(is_minus, np.sqrt(1 - noise_r2) * e + np.sqrt(noise_r2) * normal(), e)
    s = asu.miller_index / np.array(CELL.parameters[:3])  # orthorhombic
    fall = -b / (2 * asu.d**2)
    if tensor is not None:
        fall = fall - 0.5 * np.einsum("ri,ij,rj->r", s, tensor, s)
    sigma = 1000.0 * np.exp(fall)
    model_sigma = 3.0 * np.exp(-(b - 10.0) / (2 * asu.d**2))
    return Crystal(
        asu,
        np.abs(e) * np.sqrt(asu.epsilon * sigma),
        np.abs(model) * np.sqrt(asu.epsilon * model_sigma),
        sigma,
    )


def observe(
    c: Crystal, noise: float, *, n_images=20, n_obs=4, seed=1, name="a", flicker=0.3
) -> UnmergedData:
    """Measure every reflection ``n_obs`` times on average, errors of size ``noise``."""
    rng = np.random.default_rng(seed)
    row = rng.integers(0, len(c.asu), n_obs * len(c.asu))
    image = np.sort(rng.integers(0, n_images, len(row)))
    scale = np.exp(flicker * np.sin(image / 3.0))
    x, y = rng.uniform(0, 1000, (2, len(row)))
    return make_unmerged(
        source=name,
        miller_index=c.asu.miller_index[row],
        intensity=scale * c.amplitude[row] ** 2 + noise * rng.standard_normal(len(row)),
        sigma=np.full(len(row), float(noise)),
        image_label=image,
        metadata={"X": x, "Y": y, "BATCH": image},
        wavelength=None,
        cell=CELL,
        space_group=SPACE_GROUP,
        name=name,
        has_lp_applied=True,
    )


def own_rows(problem: MergeProblem, c: Crystal) -> np.ndarray:
    """Row of the problem's first dataset for each row of the crystal; -1 beyond its limit."""
    return problem.unique.asus[0].refl_id(c.asu.miller_index)


def fitted(data: list[UnmergedData], config: MergeConfig) -> tuple[MergeProblem, Merger]:
    """Fit all observations."""
    problem = build_problem(data, config)
    torch.manual_seed(0)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    fit(merger, problem.table, config)
    return problem, merger
