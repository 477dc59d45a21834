"""How large the spots are, measured on the frames themselves.

Strong predicted spots are cropped, their background subtracted, and the marginals along fast,
slow and rotation pooled over spots as functions of the distance to the predicted centroid. A
pooled marginal is a profile sampled finer than a pixel; its standard deviation comes from the
second moment inside three standard deviations, corrected for what a Gaussian loses there. Pixels
and frames of finite width broaden it by ``width^2 / 12``, which is subtracted.

Errors of prediction are part of the measured extent, as they should be: boxes are placed where
spots are predicted.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from braggflux.integrator.errors import UserError
from braggflux.integrator.prediction.rocking import RockingWidth, frame_sigma
from braggflux.integrator.shoebox.spikes import Windows, take_windows
from braggflux.integrator.shoebox.sweep import Sweep

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

HALF_WINDOW = 8
"""Pixels on each side of the centroid that are looked at."""
TRUNCATION, STARTS = 3.0, ((1.2, 1.5), (0.8, 0.6))
"""Standard deviations of the core that second moments are taken within, and first sigmas [pixels,
frames] that are tried until neighbours stay outside."""
NARROW, DOUBT = (2.0, 1.5), 1.25
"""Truncations where they do not: the second where the first says so much more."""
TRIMMED = 0.02
"""Share of spots left out on either side of a bin of the pooled profile."""
MIN_ZETA = 0.3
MIN_SPOTS = 8
OWN_SPOTS = 50
"""A sweep with fewer strong spots is measured together with others."""
MIN_STRENGTH = 5.0
"""Signal to noise of a strong spot."""
MAX_CANDIDATES = 1500
"""Windows cropped at a time: bounds the memory."""
WHOLE_FRAMES = 4
"""Frames about the centroid that a spot must have to be measured."""
BORDER = 1.5
"""Pixels around the spot from which the background is seen."""
MAX_HALF_FRAMES = 7
"""Cap of the box along rotation in layers; spots near the axis get layers of several frames."""
ROCKING_GROUPS = 8
"""Of spots by resolution, of OWN_SPOTS at least, in which the rocking width is measured."""


@dataclass(frozen=True)
class SpotExtent:
    """Size of the spots and of the boxes around them.

    Parameters
    ----------
    sigma_x_px, sigma_y_px : float
        Standard deviation along fast and slow [pixels], width of the pixel removed.
    sigma_m_deg : float
        Standard deviation of the rocking curve at zeta = 1 [deg], width of the frame removed,
        pooled over the spots.
    box : (int, int, int)
        (frames, slow, fast), odd.
    rocking : RockingWidth, optional
        How it depends on the resolution; by default not.
    """

    sigma_x_px: float
    sigma_y_px: float
    sigma_m_deg: float
    box: tuple[int, int, int]
    rocking: RockingWidth | None = None

    def __post_init__(self) -> None:
        sigmas = (self.sigma_x_px, self.sigma_y_px, self.sigma_m_deg)
        if not all(math.isfinite(s) and s > 0 for s in sigmas):
            raise UserError(f"spot extents must be positive numbers, got {sigmas}")
        if len(self.box) != 3 or any(n < 1 or n % 2 == 0 for n in self.box):
            raise UserError(
                f"the shoebox size must be three odd numbers (frames, slow, fast), got {self.box}"
            )

    @property
    def rocking_width(self) -> RockingWidth:
        """Rocking width by resolution."""
        return self.rocking or RockingWidth(self.sigma_m_deg)

    @classmethod
    def from_sigmas(
        cls,
        sigmas: tuple[float, float, float],
        rocking: RockingWidth,
        spread: Array,
        n_sigma: float = 4.0,
    ) -> SpotExtent:
        """Choose the box: ``n_sigma`` on both sides of a centroid anywhere in the central voxel.

        In the detector plane :data:`BORDER` is added, so that the box shows the background too.
        Along rotation the box holds nine in ten reflections, of which ``spread`` are the recorded
        rocking widths [frames], up to :data:`MAX_HALF_FRAMES`.
        """
        sigma_x_px, sigma_y_px, _ = sigmas
        half = (
            min(max(math.ceil(n_sigma * np.quantile(spread, 0.9)), 2), MAX_HALF_FRAMES),
            max(math.ceil(n_sigma * math.sqrt(sigma_y_px**2 + 1 / 12) + BORDER), 3),
            max(math.ceil(n_sigma * math.sqrt(sigma_x_px**2 + 1 / 12) + BORDER), 3),
        )
        depth, height, width = (2 * n + 1 for n in half)
        return cls(*sigmas, (depth, height, width), rocking)


@dataclass(frozen=True)
class _StrongSpots:
    """Strong spots in windows around their predicted centroids.

    Parameters
    ----------
    net : ndarray, (N, D, H, W) float32
        Photons less background; NaN where invalid.
    offset : tuple of ndarray, (N, W), (N, H), (N, D)
        Distance of the voxel centres from the centroid along fast [pixels], slow [pixels] and
        rotation [deg at zeta = 1].
    step : ndarray, (N,)
        Width of a frame [deg at zeta = 1].
    d : ndarray, (N,)
        Resolution [A].
    """

    net: NDArray[np.float32]
    offset: tuple[Array, Array, Array]
    step: Array
    d: Array

    def __len__(self) -> int:
        return len(self.step)

    @staticmethod
    def join(parts: Sequence[_StrongSpots]) -> _StrongSpots:
        """Pool spots with windows of one size."""
        offset = tuple(np.concatenate([p.offset[axis] for p in parts]) for axis in range(3))
        return _StrongSpots(
            np.concatenate([p.net for p in parts]),
            (offset[0], offset[1], offset[2]),
            np.concatenate([p.step for p in parts]),
            np.concatenate([p.d for p in parts]),
        )

    def select(self, rows: NDArray[np.int64]) -> _StrongSpots:
        """Return some of the spots."""
        x, y, m = (offset[rows] for offset in self.offset)
        return _StrongSpots(self.net[rows], (x, y, m), self.step[rows], self.d[rows])


def measure_extent(
    sweeps: Sequence[Sweep],
    *,
    n_sigma: float = 4.0,
    find_hot: bool = False,
    max_spots: int = 2000,
    n_blocks: int = 4,
    seed: int = 0,
) -> SpotExtent:
    """Measure the extent of the strongest spots in a few blocks of frames.

    Sweeps with :data:`OWN_SPOTS` strong spots are measured one by one, the others together; the
    answer has the largest of each number, so that the boxes hold the spots of every sweep.

    Parameters
    ----------
    sweeps : sequence of Sweep
        Of each, ``n_blocks`` blocks of frames spread over the scan are read.
    n_sigma : float
        Half size of the box in standard deviations.
    find_hot : bool
        Leave out hot pixels that the masks do not know.
    max_spots : int
        The strongest so many are used, per sweep.
    n_blocks : int
    seed : int
        Of the choice among too many candidates.

    Raises
    ------
    UserError
        When too few spots stand out.
    """
    widths = [abs(sweep.experiment.rotation.scan.oscillation[1]) for sweep in sweeps]
    half_frames = int(np.clip(math.ceil(1.0 / min(widths)), 4, 20))
    rng = np.random.default_rng(seed)
    found = []
    for sweep in sweeps:
        blocks = _blocks(sweep.frames.n_images, 4 * half_frames + 1, n_blocks)
        chosen = [_candidates(sweep, block, half_frames, rng) for block in blocks]
        take_windows(sweep.frames, [windows for _, windows in chosen], find_hot=find_hot)
        parts = [_strong_spots(sweep, *some, max_spots // n_blocks) for some in chosen]
        found.append(_StrongSpots.join(parts))
    groups = [spots for spots in found if len(spots) >= OWN_SPOTS]
    rest = [spots for spots in found if len(spots) < OWN_SPOTS]
    if sum(map(len, rest)) >= MIN_SPOTS:
        groups.append(_StrongSpots.join(rest))
    if not groups:
        longest = max(sweep.frames.n_images for sweep in sweeps)
        hint = "check that the EXPT belongs to these images, or give the size in the configuration"
        if longest <= WHOLE_FRAMES:
            hint = f"scans of {longest} images hold no whole spots, give more of the sweep"
        raise UserError(
            f"only {sum(map(len, found))} strong spots stand where reflections are predicted, at "
            f"least {MIN_SPOTS} are needed to measure the spot size: {hint}"
        )
    found_sigmas = [_fit(spots) for spots in groups]
    x, y, m = (float(largest) for largest in np.max(found_sigmas, axis=0))
    widest = groups[int(np.argmax([sigmas[2] for sigmas in found_sigmas]))]
    rocking = _rocking_width(widest, m)
    logger.info(
        "spot extent %.2f x %.2f px, %.3f deg from %d spots", x, y, m, sum(map(len, groups))
    )
    if rocking.size_rate:
        logger.info(
            "rocking width %.3f deg and, added in squares, %.4f deg per A of d: domains of finite "
            "size",
            rocking.mosaic_deg,
            rocking.size_rate,
        )
    zeta, d = (
        np.concatenate([getattr(sweep.prediction, name).numpy() for sweep in sweeps])
        for name in ("zeta", "d")
    )
    spread = frame_sigma(rocking.at(d), zeta, min(widths))
    return SpotExtent.from_sigmas((x, y, m), rocking, spread, n_sigma)


def _rocking_width(spots: _StrongSpots, sigma_m_deg: float) -> RockingWidth:
    """Rocking width by resolution, from groups of spots; the pooled one if it is the same."""
    n_groups = min(ROCKING_GROUPS, len(spots) // OWN_SPOTS)
    groups = [spots.select(rows) for rows in np.array_split(np.argsort(spots.d), n_groups or 1)]
    sigma = np.array([_fit(group)[2] for group in groups])
    d, frame = np.array([(np.median(g.d), np.sqrt(np.mean(g.step**2))) for g in groups]).T
    fitted = RockingWidth.fitted(sigma, d, frame)
    return fitted if fitted.size_rate else RockingWidth(sigma_m_deg)


def _blocks(n_images: int, length: int, n_blocks: int) -> list[tuple[int, int]]:
    """Half-open frame ranges spread over the scan; all of it when it is short."""
    if n_images > n_blocks * length:
        starts = np.linspace(0, n_images - length, n_blocks).astype(int)
        return [(int(start), int(start) + length) for start in starts]
    edges = np.linspace(0, n_images, max(1, n_images // length) + 1).astype(int)
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def _candidates(
    sweep: Sweep, block: tuple[int, int], half_frames: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Windows]:
    """Rows of spots whose centroid lies in a block of frames, and the windows around them."""
    centre, zeta = sweep.prediction.xyz_px.numpy(), sweep.prediction.zeta.numpy()
    inside = (centre[:, 2] >= block[0]) & (centre[:, 2] < block[1]) & (zeta > MIN_ZETA)
    rows = np.nonzero(inside)[0]
    if len(rows) > MAX_CANDIDATES:
        rows = np.sort(rng.choice(rows, MAX_CANDIDATES, replace=False))
    half = (half_frames, HALF_WINDOW, HALF_WINDOW)
    corner = np.floor(centre[rows, ::-1]).astype(np.int64) - half
    depth, height, width = (2 * n + 1 for n in half)
    panel = sweep.prediction.panel.numpy()[rows]
    return rows, Windows(block, panel, corner, (depth, height, width))


def _strong_spots(
    sweep: Sweep, rows: NDArray[np.int64], windows: Windows, max_spots: int
) -> _StrongSpots:
    """Strongest of some spots."""
    centre = sweep.prediction.xyz_px.numpy()[rows].astype(float)
    zeta = sweep.prediction.zeta.numpy()[rows].astype(float)
    corner, counts = windows.corner, windows.counts
    dx, dy, dz = (
        corner[:, 2 - axis, None] + np.arange(counts.shape[3 - axis]) + 0.5 - centre[:, axis, None]
        for axis in range(3)
    )
    net, strength = _subtract_background(counts, dx, dy, dz)
    best = np.argsort(-strength)[:max_spots]
    best = best[strength[best] > MIN_STRENGTH]
    step = zeta * abs(sweep.experiment.rotation.scan.oscillation[1])
    dm = dz * step[:, None]
    d = sweep.prediction.d.numpy()[rows].astype(float)
    return _StrongSpots(net[best], (dx[best], dy[best], dm[best]), step[best], d[best])


def _subtract_background(
    counts: NDArray[np.int32], dx: Array, dy: Array, dz: Array
) -> tuple[NDArray[np.float32], Array]:
    """Net photons, (N, D, H, W), NaN where invalid, and signal to noise, (N,), 0 if incomplete."""
    radius2 = dy[:, :, None] ** 2 + dx[:, None, :] ** 2  # (N, H, W)
    net = np.where(counts >= 0, counts, np.nan).astype(np.float32)
    ring = np.where((radius2 > (HALF_WINDOW - 2) ** 2)[:, None], net, np.nan)
    ring = ring.reshape(len(ring), -1)
    enough = np.isfinite(ring).sum(1) > 20
    level = np.zeros(len(ring), np.float32)
    if enough.any():
        middle = np.nanmedian(ring[enough], axis=1, keepdims=True)
        # neighbours stand out above the Poisson spread of the background and are left out
        quiet = ring[enough] <= middle + 4 * np.sqrt(middle + 1)
        level[enough] = np.nanmean(np.where(quiet, ring[enough], np.nan), axis=1)
    net -= level[:, None, None, None]
    core = (radius2 <= 3.0**2)[:, None] & (np.abs(dz) <= WHOLE_FRAMES / 2)[:, :, None, None]
    complete = ~(np.isnan(net) & core).any(axis=(1, 2, 3)) & enough
    signal = np.where(core, net, 0).sum(axis=(1, 2, 3))
    noise = np.sqrt(np.maximum(signal, 0) + level * core.sum(axis=(1, 2, 3)) + 1)
    return net, np.where(complete, signal / noise, 0.0)


def _fit(spots: _StrongSpots) -> tuple[float, ...]:
    """(sigma_x, sigma_y, sigma_m) with the width of pixel and frame removed.

    Dense neighbours may widen the core to the window: then a smaller start, or a narrower core.
    """
    scale = [*[np.ones_like(spots.step)] * 2, spots.step]  # width of a voxel in units of sigma
    reach = [np.median(np.abs(offset).max(axis=1)) / TRUNCATION for offset in spots.offset]
    for start in STARTS:
        sigma = _core_sigmas(spots, start, scale, TRUNCATION)
        if (np.array(sigma) < reach).all():
            break
    else:
        sigma, narrow = (_core_sigmas(spots, STARTS[-1], scale, cut) for cut in NARROW)
        sigma = narrow if (np.divide(sigma, narrow) > DOUBT).any() else sigma
    narrowed = zip(sigma, (float(np.mean(width**2)) / 12 for width in scale), strict=True)
    return tuple(math.sqrt(max(s**2 - b, (0.05 * s) ** 2)) for s, b in narrowed)


def _core_sigmas(
    spots: _StrongSpots, start: tuple[float, float], scale: Sequence[Array], truncation: float
) -> list[float]:
    """Sigmas in a core that follows the running estimate; ``start`` [pixels, frames]."""
    sigma = [start[0], start[0], start[1] * float(np.median(spots.step))]
    net = np.nan_to_num(spots.net)
    marginals = ("ndhw,nd,nh->nw", "ndhw,nd,nw->nh", "ndhw,nh,nw->nd")
    others = ((2, 1), (2, 0), (1, 0))
    for _ in range(8):
        core = [
            (np.abs(offset) <= truncation * s).astype(np.float32)
            for offset, s in zip(spots.offset, sigma, strict=True)
        ]
        for axis in range(3):
            weights = (core[other] for other in others[axis])
            marginal = np.einsum(marginals[axis], net, *weights, optimize=True)
            density = marginal / scale[axis][:, None]
            at, last = spots.offset[axis], sigma[axis]
            sigma[axis] = _profile_sigma(at, density, last, scale[axis], truncation)
    return sigma


def _profile_sigma(at: Array, marginal: Array, sigma: float, scale: Array, cut: float) -> float:
    """Take the standard deviation of the pooled profile inside a few of the running estimate.

    The trimmed mean over spots in each bin ignores a neighbour or a zinger in a few of them.
    """
    inside = np.abs(at) <= cut * sigma
    total = (np.where(inside, marginal, 0) * scale[:, None]).sum(axis=1)
    density = marginal / np.maximum(total, 1e-6)[:, None]
    n_bins = int(np.clip(inside.sum() // 50, 7, 49))
    edges = np.linspace(-cut * sigma, cut * sigma, n_bins + 1)
    which = np.digitize(at[inside], edges[1:-1]).astype(np.int16)
    order = np.argsort(which, kind="stable")
    ends = np.searchsorted(which[order], np.arange(1, n_bins))
    of_bins = np.split(density[inside][order], ends)
    profile = np.array([_trimmed_mean(v) if len(v) else 0.0 for v in of_bins]).clip(0)
    centres = 0.5 * (edges[1:] + edges[:-1])
    if profile.sum() <= 0:
        return sigma
    # about the prediction, not about the mean: the box sits where the spot is predicted
    second = (profile * centres**2).sum() / profile.sum()
    # what a unit Gaussian keeps of its variance inside
    density_there = np.exp(-(cut**2) / 2.0) / math.sqrt(2 * math.pi)
    kept = 1 - 2 * cut * density_there / (2 * ndtr(cut) - 1)
    return math.sqrt(second / kept)


def _trimmed_mean(values: Array) -> float:
    """Mean without the :data:`TRIMMED` share on either side; scipy.stats takes long to import."""
    n = int(TRIMMED * len(values))
    inner = np.partition(values, (n, len(values) - n - 1))[n : len(values) - n]
    return float(np.mean(inner))
