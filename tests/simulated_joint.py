"""A small joint problem: simulated shoeboxes of reflections that share structure factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from helpers import Spot, gaussian_voxels, make_integrator, poisson_boxes, spot_metadata
from simulated_merge import CELL, SPACE_GROUP

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.types import ReflectionMetadata, ShoeboxBatch
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.training import start_amplitudes
from braggflux.pipelines.integration.joint_model import JointModel
from braggflux.pipelines.integration.problem import join

SPOT = Spot(sigma_x_px=0.8, sigma_y_px=0.8, sigma_m_deg=0.08, box=(7, 9, 9))
LEVEL = 0.6
ABSENT = (1, 0, 0)
D_MIN = 7.0
N_FRAMES = 120


@dataclass(frozen=True)
class JointProblem:
    """Model and its shoeboxes."""

    model: JointModel
    batch: ShoeboxBatch


@dataclass(frozen=True)
class Store:
    """What a joint model reads of a shoebox store; all boxes can be used."""

    data: ReflectionMetadata
    path: Path = Path("simulated")

    def __len__(self) -> int:
        return len(self.data)

    def metadata(self) -> ReflectionMetadata:
        return self.data

    @property
    def flags(self) -> torch.Tensor:
        return torch.zeros(len(self), dtype=torch.int64)

    @property
    def experiments(self) -> list[dict]:
        return [
            {
                "unit_cell": list(CELL.parameters),
                "space_group": SPACE_GROUP.xhm(),
                "image_range": [1, N_FRAMES],
                "oscillation_deg": [0.0, SPOT.frame_width_deg],
                "wavelength": 1.0,
            }
        ]


def joint_problem(
    n: int = 96,
    seed: int = 0,
    *,
    n_absent: int = 0,
    photons: float = 300.0,
    decades: float = 0.0,
    **changes,
) -> JointProblem:
    """``n`` boxes of a dozen pairs of Bijvoet mates; the first ``n_absent`` belong to none.

    Reflections have ``photons`` on average, or down to ``decades`` of ten less. The model is
    started from the data and then shaken, so that no gradient vanishes by symmetry. ``changes``
    are settings of the merge.
    """
    rng = np.random.default_rng(seed)
    data = spot_metadata(n, rng, SPOT)
    asu = ReciprocalAsu(CELL, SPACE_GROUP, D_MIN, anomalous=True)
    plus = np.flatnonzero((asu.friedel_sign > 0) & ~asu.is_centric)[:12]
    rows = np.concatenate([plus, asu.friedel_mate[plus], np.flatnonzero(asu.is_centric)[:3]])
    refl_id = rng.choice(rows, n)
    strength = photons * 10 ** (-decades * rng.random(len(asu)) if decades else np.zeros(1))
    intensity = (strength * rng.gamma(1.0, 1.0, len(asu)))[refl_id] / data.lp.numpy()
    rate = intensity[:, None, None, None] * gaussian_voxels(data, SPOT) + LEVEL
    hkl = asu.miller_index[refl_id].astype(np.int64)
    hkl[:n_absent] = ABSENT
    d = torch.as_tensor(asu.d[refl_id], dtype=torch.float32)
    data = replace(data, miller_index=torch.as_tensor(hkl), d=d)
    batch = poisson_boxes(rate, data, rng)
    given = {"anomalous": True, "prior": "double-wilson", "overloads": "keep", "d_min": D_MIN}
    given |= changes
    settings = MergeConfig(**given)
    torch.manual_seed(seed)
    _, model = join(make_integrator(data, SPOT, LEVEL), Store(data), settings)
    with torch.no_grad():
        _, table = model.integrate(batch, sample=False, use_expected=False)
        observed = model.observe(table)
        model.merger.count(observed)
        start_amplitudes(model.merger, observed)  # scales are 1 / LP, as they start
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return JointProblem(model, batch)


def in_float64(problem: JointProblem) -> JointProblem:
    """Everything in double precision, for finite differences."""
    batch = problem.batch
    data = batch.metadata._map(lambda t: t.double() if t.is_floating_point() else t)
    batch = ShoeboxBatch(batch.counts.double(), batch.is_valid, data)
    return JointProblem(problem.model.double(), batch)


def ordinary() -> JointProblem:
    return joint_problem(40)


def without_photons() -> JointProblem:
    problem = joint_problem(40)
    return with_counts(problem, torch.zeros_like(problem.batch.counts))


def a_million_counts() -> JointProblem:
    return joint_problem(40, photons=1e6)


def all_in_one_pixel() -> JointProblem:
    problem = joint_problem(40)
    counts = torch.zeros_like(problem.batch.counts)
    counts[:, 3, 4, 4] = problem.batch.counts.sum((1, 2, 3))
    return with_counts(problem, counts)


def one_valid_frame() -> JointProblem:
    problem = joint_problem(40)
    is_valid = torch.zeros_like(problem.batch.is_valid)
    is_valid[:, 3] = problem.batch.is_valid[:, 3]
    batch = ShoeboxBatch(problem.batch.counts, is_valid, problem.batch.metadata)
    return replace(problem, batch=batch)


def one_reflection() -> JointProblem:
    problem = joint_problem(40)
    return replace(problem, batch=problem.batch[torch.tensor([0])])


def with_counts(problem: JointProblem, counts: torch.Tensor) -> JointProblem:
    batch = ShoeboxBatch(counts, problem.batch.is_valid, problem.batch.metadata)
    return replace(problem, batch=batch)


EXTREMES = (
    ordinary,
    without_photons,
    a_million_counts,
    all_in_one_pixel,
    one_valid_frame,
    one_reflection,
)
