"""What the model tests share: goodness of fit, standard errors, simulated boxes.

The simulation is plain NumPy and SciPy, independent of the code it tests: a Gaussian spot whose
voxels are products of differences of the error function, on a flat or tilted background.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tolerances
import torch
from scipy import stats
from scipy.special import erf

from braggflux.integrator.config import IntegratorConfig
from braggflux.integrator.model.background import MeanBackground
from braggflux.integrator.model.encoder import PositionFeatures
from braggflux.integrator.model.integrator import Integrator
from braggflux.integrator.model.profile import SpotShape
from braggflux.integrator.types import ReflectionMetadata, ShoeboxBatch


def assert_within_se(values, expected, n_sigma: float = tolerances.N_SIGMA) -> None:
    """Mean of independent ``values`` (N, ...) equals ``expected`` within its standard error."""
    values = np.asarray(values, dtype=float)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    off = np.abs(values.mean(0) - np.asarray(expected))
    assert np.all(off <= n_sigma * error + 1e-12), f"off by {off / error} standard errors"


def assert_goodness_of_fit(samples, cdf) -> None:
    """Kolmogorov-Smirnov at the false-alarm rate that the whole suite shares."""
    p = stats.kstest(np.asarray(samples, dtype=float), cdf).pvalue
    assert p > tolerances.GOF_FALSE_ALARM / tolerances.GOF_TESTS, f"p = {p:.2g}"


def robust_spread(z) -> float:
    """Standard deviation of a normal law with the same 16 to 84 % range."""
    low, high = np.quantile(np.asarray(z), [0.1587, 0.8413])
    return float((high - low) / 2)


@dataclass(frozen=True)
class Spot:
    """Gaussian spot in boxes of one size."""

    sigma_x_px: float = 1.0
    sigma_y_px: float = 0.9
    sigma_m_deg: float = 0.1
    box: tuple[int, int, int] = (11, 11, 11)
    frame_width_deg: float = 0.1


def spot_metadata(n: int, rng: np.random.Generator, spot: Spot = Spot()) -> ReflectionMetadata:
    """Metadata of ``n`` spots at random sub-pixel positions inside the centre voxel of the box."""
    depth, height, width = spot.box
    corner = rng.integers(0, 80, (n, 3))
    centre = np.array([depth // 2, height // 2, width // 2])
    position = corner + centre + rng.random((n, 3))  # (frame, slow, fast)
    zeta = rng.uniform(0.7, 1.0, n)
    rocking = spot.sigma_m_deg / zeta / spot.frame_width_deg
    unit = rng.normal(size=(2, n, 3))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    f32 = lambda a: torch.as_tensor(np.ascontiguousarray(a), dtype=torch.float32)  # noqa: E731
    return ReflectionMetadata(
        refl_row=torch.arange(n),
        miller_index=torch.as_tensor(rng.integers(-9, 10, (n, 3))),
        experiment=torch.zeros(n, dtype=torch.int64),
        panel=torch.zeros(n, dtype=torch.int64),
        xyz_px=f32(position[:, ::-1]),
        xyz_mm=f32(position[:, ::-1] * 0.1),
        s1=f32(unit[1]),
        s0_crystal=f32(unit[0]),
        s1_crystal=f32(unit[1]),
        d=f32(rng.uniform(2.0, 10.0, n)),
        lp=f32(rng.uniform(0.5, 1.0, n)),
        zeta=f32(zeta),
        frame_sigma=f32(np.sqrt(rocking**2 + 1 / 12)),
        corner=torch.as_tensor(corner),
        frames_per_layer=torch.ones(n, dtype=torch.int64),
    )


def gaussian_voxels(metadata: ReflectionMetadata, spot: Spot) -> np.ndarray:
    """Share of a Gaussian spot in each voxel, (N, D, H, W), by the error function."""
    xyz = metadata.xyz_px.double().numpy()
    corner = metadata.corner.numpy()
    rocking = spot.sigma_m_deg / metadata.zeta.double().numpy() / spot.frame_width_deg
    ones = np.ones(len(xyz))
    sigmas = (rocking, spot.sigma_y_px * ones, spot.sigma_x_px * ones)
    shares = []
    for axis, (n, sigma) in enumerate(zip(spot.box, sigmas, strict=True)):
        edges = corner[:, axis, None] + np.arange(n + 1) - xyz[:, 2 - axis, None]
        shares.append(0.5 * np.diff(erf(edges / sigma[:, None] / np.sqrt(2)), axis=1))
    return np.einsum("bi,bj,bk->bijk", *shares)


def tilted_background(level: float, slopes: np.ndarray, box: tuple[int, int, int]) -> np.ndarray:
    """``level`` exp(plane) with relative ``slopes`` (N, 3) (fast, slow, frame) per half box."""
    t, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in box), indexing="ij")
    plane = np.tensordot(slopes, np.stack([x, y, t]), axes=1)
    return level * np.exp(plane)


def poisson_boxes(
    rate: np.ndarray,
    metadata: ReflectionMetadata,
    rng: np.random.Generator,
    is_valid: np.ndarray | None = None,
) -> ShoeboxBatch:
    """Shoeboxes of Poisson counts, 0 where not valid."""
    counts = rng.poisson(rate).astype(np.float32)
    if is_valid is None:
        is_valid = np.ones(counts.shape, dtype=bool)
    return ShoeboxBatch(torch.as_tensor(counts * is_valid), torch.as_tensor(is_valid), metadata)


def make_integrator(
    metadata: ReflectionMetadata, spot: Spot, level: float, config: IntegratorConfig | None = None
) -> Integrator:
    """Untrained integrator with a Gaussian profile and a flat mean background of ``level``."""
    shape = SpotShape(
        spot.sigma_x_px, spot.sigma_y_px, spot.sigma_m_deg, spot.box, (spot.frame_width_deg,)
    )
    image = torch.full((120, 120), level)
    return Integrator(
        shape,
        MeanBackground([[image]], [torch.ones(120)], spot.box),
        PositionFeatures.from_metadata(metadata),
        config or IntegratorConfig(),
    )
