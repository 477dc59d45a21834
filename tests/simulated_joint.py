"""A small joint problem: simulated shoeboxes of reflections that share structure factors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from helpers import Spot, gaussian_voxels, make_integrator, poisson_boxes, spot_metadata
from simulated_merge import CELL, SPACE_GROUP

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.types import Flag, ShoeboxBatch
from braggflux.merge.data.scale_features import scale_features
from braggflux.merge.engine.config import MergeConfig
from braggflux.merge.engine.merger import Merger, merge_batch
from braggflux.pipelines.integration.joint_model import JointModel

SPOT = Spot(sigma_x_px=0.8, sigma_y_px=0.8, sigma_m_deg=0.08, box=(7, 9, 9))
LEVEL = 0.6


@dataclass(frozen=True)
class JointProblem:
    """Model and its shoeboxes."""

    model: JointModel
    batch: ShoeboxBatch


def joint_problem(
    n: int = 96,
    seed: int = 0,
    *,
    n_absent: int = 0,
    handover: str = "photon-counts",
    photons: float = 300.0,
    decades: float = 0.0,
) -> JointProblem:
    """``n`` boxes of a dozen pairs of Bijvoet mates; the first ``n_absent`` belong to none.

    Reflections have ``photons`` on average, or down to ``decades`` of ten less. The model is
    started from the data and then shaken, so that no gradient vanishes by symmetry.
    """
    rng = np.random.default_rng(seed)
    data = spot_metadata(n, rng, SPOT)
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 7.0, anomalous=True)
    plus = np.flatnonzero((asu.friedel_sign > 0) & ~asu.is_centric)[:12]
    rows = np.concatenate([plus, asu.friedel_mate[plus], np.flatnonzero(asu.is_centric)[:3]])
    refl_id = rng.choice(rows, n)
    strength = photons * 10 ** (-decades * rng.random(len(asu)) if decades else np.zeros(1))
    intensity = (strength * rng.gamma(1.0, 1.0, len(asu)))[refl_id] / data.lp.numpy()
    rate = intensity[:, None, None, None] * gaussian_voxels(data, SPOT) + LEVEL
    batch = poisson_boxes(rate, data, rng)
    refl_id[:n_absent] = -1
    refl_id = torch.as_tensor(refl_id)
    config = MergeConfig(handover=handover)
    features = scale_features(data, [120], [SPOT.frame_width_deg], config)
    n_obs = torch.bincount(refl_id[refl_id >= 0], minlength=len(asu))
    torch.manual_seed(seed)
    merger = Merger(asu, features, n_obs, config)
    integrator = make_integrator(data, SPOT, LEVEL)
    model = JointModel(integrator, merger, refl_id, torch.zeros(n, dtype=torch.int64))
    with torch.no_grad():
        _, table = model.integrate(batch, sample=False, use_expected=False)
        keep = (refl_id >= 0) & ((table.flags & Flag.REJECTED) == 0)
        merger.start(merge_batch(table[keep], refl_id[keep]))
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return JointProblem(model, batch)


def in_float64(problem: JointProblem) -> JointProblem:
    """Everything in double precision, for finite differences."""
    batch = problem.batch
    data = batch.metadata._map(lambda t: t.double() if t.is_floating_point() else t)
    batch = ShoeboxBatch(batch.counts.double(), batch.is_valid, data)
    return JointProblem(problem.model.double(), batch)
