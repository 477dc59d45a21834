"""A rotation experiment on a toy crystal, as the merge sees it: counts with known F and scales.

Plain NumPy, independent of the model: rotation geometry by the Ewald condition, double-Wilson
amplitudes, frame-wise scale, radiation damage, absorption and Poisson counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import gemmi
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.types import IntensityTable, ReflectionMetadata
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.fit.full_batch import FullBatchFit, restart_doubted
from braggflux.merge.fit.half_set_correlation import half_set_correlation
from braggflux.merge.fit.training import start
from braggflux.merge.io.formats.photon_table import STORE_ROW, photon_observations
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.amplitudes import scaled_observations
from braggflux.merge.output.datasets import MergedDataset, merged_datasets
from braggflux.merge.problem import build_problem
from braggflux.merge.rows import UniqueRows

CELL = gemmi.UnitCell(31, 36, 41, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")
WAVELENGTH = 1.0
FRAME_WIDTH = 1.0
DAMAGE = 2.0  # growth of B over the scan [A^2]


@dataclass(frozen=True)
class Truth:
    """What the simulation drew."""

    amplitude: np.ndarray  # (R,)
    wilson_sigma: np.ndarray  # (R,)
    log_frame_scale: np.ndarray  # (n_frames,)
    log_scale: np.ndarray  # (N,), all of K
    intensity: np.ndarray  # (N,), expected photons, without the relative error


@dataclass(frozen=True)
class Experiment:
    """Table, unique reflections and truth."""

    asu: ReciprocalAsu
    table: IntensityTable
    refl_id: torch.Tensor
    n_frames: int
    truth: Truth

    @property
    def record(self) -> dict:
        """Cell, space group and scan of the sweep, as the integrator's file has them."""
        return {
            "unit_cell": list(CELL.parameters),
            "space_group": SPACE_GROUP.xhm(),
            "image_range": [1, self.n_frames],
            "oscillation_deg": [0.0, FRAME_WIDTH],
        }

    def merging(self, **changes) -> Merging:
        """Untrained merger of this experiment, as a run of `braggflux run` has it."""
        given = {"anomalous": True, "prior": "double-wilson", "overloads": "keep"} | changes
        config = MergeConfig(**given)
        unique = UniqueRows([self.asu], None, config.prior == "double-wilson")
        data = photon_observations(self.table, [self.record], "simulated")
        problem = build_problem([data], config, unique=unique)
        torch.manual_seed(0)
        merger = Merger(unique, problem.table, config)
        merger.prior.couple()
        own = data.metadata[STORE_ROW][problem.source].astype(int)
        return Merging(self, config, merger, problem.table, torch.as_tensor(own))

    def with_sweeps(self, number: torch.Tensor) -> IntensityTable:
        """Table whose observations are of the sweeps ``number``, (N,)."""
        metadata = replace(self.table.metadata, experiment=number)
        return replace(self.table, metadata=metadata)

    def subset(self, rows: np.ndarray) -> Experiment:
        """Some of the observations, renumbered as an experiment of their own."""
        rows = torch.as_tensor(rows)
        table = self.table[rows]
        metadata = replace(table.metadata, refl_row=torch.arange(len(rows)))
        table = replace(table, metadata=metadata)
        truth = replace(
            self.truth, log_scale=self.truth.log_scale[rows], intensity=self.truth.intensity[rows]
        )
        return replace(self, table=table, refl_id=self.refl_id[rows], truth=truth)


@dataclass(frozen=True)
class Merging:
    """A merger and the observations that it is fitted to.

    ``own_row`` is (N,): the row of the experiment of each observation of ``table``.
    """

    experiment: Experiment
    config: MergeConfig
    merger: Merger
    table: ObservationTable
    own_row: torch.Tensor

    @property
    def row(self) -> torch.Tensor:
        """Unique reflection of each observation, (N,)."""
        return self.table.terms.row

    def used(self, is_used: torch.Tensor) -> ObservationTable:
        """Table of which only some observations are used."""
        return self.table.with_masks(is_used, is_used)

    def log_scale(self) -> np.ndarray:
        """Fitted log K of each row of the experiment, (N,); F^2 in photons."""
        with torch.no_grad():
            found = self.merger.scale(self.table.everything()).log_k
        return torch.zeros_like(found).index_put((self.own_row,), found).numpy()

    def merged(self, table: ObservationTable | None = None) -> MergedDataset:
        """What is written of a table, or of all observations."""
        table = self.table if table is None else table
        scaled = scaled_observations(self.merger, table)
        (dataset,) = merged_datasets(self.merger, table, self.merger.unique, scaled)
        return dataset


def double_wilson(asu: ReciprocalAsu, one_minus_r2: float, rng, photons: float):
    """Amplitudes (R,) and Sigma (R,): F- = r F+ + noise of variance epsilon Sigma (1 - r^2)."""
    sigma = photons * np.exp(-20.0 / (2 * asu.d**2))
    scale = np.sqrt(asu.epsilon * sigma)
    normal = lambda: (rng.normal(size=len(asu)) + 1j * rng.normal(size=len(asu))) / 2**0.5  # noqa: E731
    plus = normal()
    plus = np.where(asu.is_centric, rng.normal(size=len(asu)), plus)
    row = np.where(asu.friedel_sign > 0, np.arange(len(asu)), asu.friedel_mate)
    coupled = np.sqrt(1 - one_minus_r2) * plus[row] + np.sqrt(one_minus_r2) * normal()
    value = np.where(asu.friedel_sign > 0, plus, coupled)
    return np.abs(value) * scale, sigma


def crossings(hkl: np.ndarray, orientation: np.ndarray, span_deg: float):
    """Rows of ``hkl``, angles [rad] and s1 (laboratory) where they cross the Ewald sphere."""
    axis, s0 = np.array([1.0, 0, 0]), np.array([0, 0, 1.0]) / WAVELENGTH
    fractional = np.array(CELL.frac.mat.tolist()).T
    r = hkl @ (orientation @ fractional).T
    across = r - np.outer(r @ axis, axis)
    a, b = across @ s0, np.cross(axis, r) @ s0
    target = -0.5 * (r**2).sum(1)
    size = np.hypot(a, b)
    ok = np.abs(target) < 0.98 * size  # not along the blind cone
    rows, angles = [], []
    for sign in (1, -1):
        phi = np.arctan2(b, a)[ok] + sign * np.arccos(target[ok] / size[ok])
        rows.append(np.flatnonzero(ok))
        angles.append(phi % (2 * np.pi))
    rows, angles = np.concatenate(rows), np.concatenate(angles)
    inside = angles < np.radians(span_deg)
    rows, angles = rows[inside], angles[inside]
    turned = Rotation.from_rotvec(angles[:, None] * axis).apply(r[rows])
    return rows, angles, s0 + turned, axis


def simulate(
    *,
    span_deg: float = 360.0,
    d_min: float = 3.0,
    photons: float = 400.0,
    background: float = 20.0,
    one_minus_r2: float = 0.01,
    relative_error: float = 0.0,
    damage: float = DAMAGE,
    flicker: float = 0.1,
    absorption: float = 0.1,
    seed: int = 0,
) -> Experiment:
    """Turn the crystal once around and count."""
    rng = np.random.default_rng(seed)
    asu = ReciprocalAsu(CELL, SPACE_GROUP, d_min, anomalous=True)
    amplitude, sigma = double_wilson(asu, one_minus_r2, rng, photons)
    n = int(40 / d_min) + 1
    grid = np.stack(np.meshgrid(*[np.arange(-n, n + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    hkl = grid[asu.refl_id(grid) >= 0]
    orientation = Rotation.from_rotvec([0.3, -0.5, 0.8]).as_matrix()
    rows, angles, s1, axis = crossings(hkl, orientation, span_deg)
    hkl = hkl[rows]
    refl_id = asu.refl_id(hkl)
    n_frames = round(span_deg / FRAME_WIDTH)
    frame = np.degrees(angles) / FRAME_WIDTH
    unturn = Rotation.from_rotvec(-angles[:, None] * axis)
    s0_crystal = unturn.apply(np.tile([0, 0, 1.0], (len(hkl), 1)))
    s1_crystal = unturn.apply(s1 * WAVELENGTH)
    lp = rng.uniform(0.5, 1.0, len(hkl))
    gamma = flicker * (rng.normal(size=n_frames) + np.sin(np.arange(n_frames) / 40))
    log_scale = -np.log(lp) + np.log(frame_average(np.exp(gamma), frame, 0.4))
    log_scale -= damage * (frame / n_frames) / (2 * asu.d[refl_id] ** 2)
    # a quadratic form of the directions: harmonics of order 2, alike for both beams
    log_scale += absorption * sum(
        v[:, 0] * v[:, 1] + v[:, 2] ** 2 for v in (-s0_crystal, s1_crystal)
    )
    expected = np.exp(log_scale) * amplitude[refl_id] ** 2
    flicked = expected * np.exp(relative_error * rng.normal(size=len(hkl)))
    beta = background * rng.uniform(0.5, 1.5, len(hkl))
    counts = rng.poisson(flicked + beta)
    table = _table(hkl, s1, s0_crystal, s1_crystal, frame, asu.d[refl_id], lp, counts, beta)
    truth = Truth(amplitude, sigma, gamma, log_scale, expected)
    return Experiment(asu, table, torch.as_tensor(refl_id), n_frames, truth)


def frame_average(scale: np.ndarray, frame: np.ndarray, rocking: float) -> np.ndarray:
    """Scale under a Gaussian rocking curve of ``rocking`` frames, by sampling it."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    index = np.floor(frame[:, None] + rocking * nodes).astype(int).clip(0, len(scale) - 1)
    return scale[index] @ (weights / weights.sum())


def _table(hkl, s1, s0_crystal, s1_crystal, frame, d, lp, counts, beta) -> IntensityTable:
    n = len(hkl)
    f32 = lambda a: torch.as_tensor(np.ascontiguousarray(a), dtype=torch.float32)  # noqa: E731
    xy = s1[:, :2] / s1[:, 2:].clip(0.2) * 100
    position = np.column_stack([xy / 0.1, frame])
    zeros = torch.zeros(n, dtype=torch.int64)
    metadata = ReflectionMetadata(
        refl_row=torch.arange(n),
        miller_index=torch.as_tensor(hkl),
        experiment=zeros,
        panel=zeros,
        xyz_px=f32(position),
        xyz_mm=f32(np.column_stack([xy, np.radians(frame)])),
        s1=f32(s1),
        s0_crystal=f32(s0_crystal),
        s1_crystal=f32(s1_crystal),
        d=f32(d),
        lp=f32(lp),
        frame_sigma=torch.full((n,), (0.4**2 + 1 / 12) ** 0.5),
        zeta=torch.ones(n),
        corner=torch.zeros(n, 3, dtype=torch.int64),
        frames_per_layer=zeros + 1,
    )
    likelihood = ShiftedPoisson(f32(counts), f32(beta), torch.ones(n))
    return IntensityTable(metadata, likelihood, torch.ones(n), zeros)


def fit(merging: Merging, n_steps: int = 200, n_epochs: int = 5) -> None:
    """Full-batch steps as in the epochs of a run, the correlation of mates after each."""
    merger, table = merging.merger, merging.table
    start(merger, table)
    full_batch = FullBatchFit(merger, merging.config)
    n = n_steps // n_epochs
    for epoch in range(n_epochs):
        restart_doubted(merger, table)
        full_batch.steps(table, n, lambda k, epoch=epoch: (epoch + k / n) / n_epochs)
        if merger.prior.is_coupled:
            half_set_correlation(merger, table, seed=0)
