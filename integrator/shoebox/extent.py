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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from integrator.crystal.geometry import Experiment
from integrator.errors import UserError
from integrator.shoebox.canvas import FrameCanvas
from integrator.shoebox.predict import Prediction

if TYPE_CHECKING:
    from integrator.io.images import FrameSource

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

HALF_WINDOW = 8
"""Pixels on each side of the centroid that are looked at."""
TRUNCATION = 3.0
"""Second moments are taken within this many standard deviations ..."""
TRUNCATED_VARIANCE = 0.97334
"""... where a unit Gaussian keeps this variance, ``1 - 2 k phi(k) / (2 Phi(k) - 1)``."""
MIN_ZETA = 0.3
MIN_SPOTS = 8
BORDER = 1.5
"""Pixels around the spot from which the background is seen."""
MAX_HALF_FRAMES = 7
"""Cap of the box along rotation: spots near the axis are cut, and known to be."""


@dataclass(frozen=True)
class SpotExtent:
    """Size of the spots and of the boxes around them.

    Parameters
    ----------
    sigma_x_px, sigma_y_px : float
        Standard deviation along fast and slow [pixels], width of the pixel removed.
    sigma_m_deg : float
        Standard deviation of the rocking curve at zeta = 1 [deg], width of the frame removed.
    box : (int, int, int)
        (frames, slow, fast), odd.
    """

    sigma_x_px: float
    sigma_y_px: float
    sigma_m_deg: float
    box: tuple[int, int, int]

    def __post_init__(self) -> None:
        sigmas = (self.sigma_x_px, self.sigma_y_px, self.sigma_m_deg)
        if not all(math.isfinite(s) and s > 0 for s in sigmas):
            raise UserError(f"spot extents must be positive numbers, got {sigmas}")
        if len(self.box) != 3 or any(n < 1 or n % 2 == 0 for n in self.box):
            raise UserError(
                f"the shoebox size must be three odd numbers (frames, slow, fast), got {self.box}"
            )

    @classmethod
    def from_sigmas(
        cls,
        sigma_x_px: float,
        sigma_y_px: float,
        sigma_m_deg: float,
        *,
        zeta: Array,
        width_deg: float,
        n_sigma: float = 4.0,
    ) -> SpotExtent:
        """Choose the box: ``n_sigma`` on both sides of a centroid anywhere in the central voxel.

        In the detector plane :data:`BORDER` is added, so that the box shows the background too.
        Along rotation the box holds nine in ten reflections of the given ``zeta``, up to
        :data:`MAX_HALF_FRAMES`.
        """
        spread = frame_sigma(sigma_m_deg, zeta, width_deg)
        half = (
            min(max(math.ceil(n_sigma * np.quantile(spread, 0.9)), 2), MAX_HALF_FRAMES),
            max(math.ceil(n_sigma * math.sqrt(sigma_y_px**2 + 1 / 12) + BORDER), 3),
            max(math.ceil(n_sigma * math.sqrt(sigma_x_px**2 + 1 / 12) + BORDER), 3),
        )
        box = tuple(2 * n + 1 for n in half)
        return cls(sigma_x_px, sigma_y_px, sigma_m_deg, box)


def frame_sigma(sigma_m_deg: float, zeta: Array, width_deg: float) -> Array:
    """Give the recorded standard deviation of the rocking curve in frames.

    ``sqrt((sigma_m / (zeta * width))^2 + 1/12)``; 1/12 is the variance of the frame itself.
    """
    rocking = sigma_m_deg / (np.maximum(zeta, 1e-3) * abs(width_deg))
    return np.sqrt(rocking**2 + 1 / 12)


@dataclass(frozen=True)
class _Crops:
    """Raw windows around strong spots: counts (N, D, H, W), -1 invalid, and what places them."""

    counts: NDArray[np.int32]
    corner: NDArray[np.int64]  # (N, 3) frame, slow, fast
    centre: Array  # (N, 3) fast, slow, frame
    zeta: Array

    def select(self, rows: NDArray) -> _Crops:
        return _Crops(self.counts[rows], self.corner[rows], self.centre[rows], self.zeta[rows])

    def offsets(self, axis: int) -> Array:
        """Voxel centre minus centroid along fast (0), slow (1) or frame (2), (N, n)."""
        length = self.counts.shape[3 - axis]
        first = self.corner[:, 2 - axis]
        return first[:, None] + np.arange(length) + 0.5 - self.centre[:, axis, None]


def measure_extent(
    frames: FrameSource,
    experiment: Experiment,
    prediction: Prediction,
    *,
    n_sigma: float = 4.0,
    max_spots: int = 2000,
    n_blocks: int = 4,
    seed: int = 0,
) -> SpotExtent:
    """Measure the extent of the strongest spots in a few blocks of frames.

    Parameters
    ----------
    frames : FrameSource
        Read in ``n_blocks`` blocks spread over the scan, a few degrees in all.
    experiment : Experiment
    prediction : Prediction
        All reflections of the sweep.
    n_sigma : float
        Half size of the box in standard deviations.
    max_spots : int
        The strongest so many are used.
    n_blocks : int
    seed : int
        Of the choice among too many candidates.

    Raises
    ------
    UserError
        When too few spots stand out.
    """
    width = experiment.scan.oscillation[1]
    rng = np.random.default_rng(seed)
    half_frames = int(np.clip(math.ceil(1.0 / abs(width)), 4, 20))
    blocks = _blocks(frames.n_images, 4 * half_frames + 1, n_blocks)
    crops = [
        _crop_block(frames, experiment, prediction, block, half_frames, rng) for block in blocks
    ]
    merged = _Crops(*(np.concatenate(parts) for parts in zip(*map(_fields, crops), strict=True)))
    counts, strong = _subtract_background(merged, max_spots)
    if len(strong.zeta) < MIN_SPOTS:
        raise UserError(
            f"only {len(strong.zeta)} strong spots stand where reflections are predicted, at "
            f"least {MIN_SPOTS} are needed to measure the spot size: check that the EXPT file "
            "belongs to these images, or give the size with the options for the spot extent"
        )
    sigma = _fit(counts, strong, width)
    logger.info("spot extent %.2f x %.2f px, %.3f deg from %d spots", *sigma, len(strong.zeta))
    return SpotExtent.from_sigmas(
        *sigma, zeta=prediction.zeta.numpy(), width_deg=width, n_sigma=n_sigma
    )


def _fields(crops: _Crops) -> tuple[NDArray, ...]:
    return crops.counts, crops.corner, crops.centre, crops.zeta


def _blocks(n_images: int, length: int, n_blocks: int) -> list[tuple[int, int]]:
    """Half-open frame ranges spread over the scan; all of it when it is short."""
    if n_images <= n_blocks * length:
        edges = np.linspace(0, n_images, max(1, n_images // length) + 1).astype(int)
    else:
        starts = np.linspace(0, n_images - length, n_blocks).astype(int)
        return [(int(s), int(s) + length) for s in starts]
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def _crop_block(
    frames: FrameSource,
    experiment: Experiment,
    prediction: Prediction,
    block: tuple[int, int],
    half_frames: int,
    rng: np.random.Generator,
    limit: int = 4000,
) -> _Crops:
    """Windows of the spots whose centroid lies in a block; frames outside of it are invalid."""
    centre = prediction.xyz_px.numpy().astype(float)
    zeta = prediction.zeta.numpy().astype(float)
    inside = (centre[:, 2] >= block[0]) & (centre[:, 2] < block[1]) & (zeta > MIN_ZETA)
    rows = np.nonzero(inside)[0]
    if len(rows) > limit:
        rows = np.sort(rng.choice(rows, limit, replace=False))
    centre, panel = centre[rows], prediction.panel.numpy()[rows]
    half = np.array([half_frames, HALF_WINDOW, HALF_WINDOW])
    corner = np.floor(centre[:, ::-1]).astype(np.int64) - half
    size = 2 * half + 1
    counts = np.full((len(rows), *size), -1, dtype=np.int32)
    canvas = FrameCanvas(frames.panel_shapes, HALF_WINDOW + 3)
    usable = frames.static_mask()
    highest = [p.trusted_range[1] for p in experiment.panels]
    for frame in range(*block):
        step = frame - corner[:, 0]
        active = np.nonzero((step >= 0) & (step < size[0]))[0]
        canvas.load(frames.read(frame), usable, highest)
        index = canvas.windows(panel[active], corner[active, 1], corner[active, 2], size[1:])
        counts[active, step[active]] = canvas.counts[index]
    return _Crops(counts, corner, centre, zeta[rows])


def _subtract_background(crops: _Crops, max_spots: int) -> tuple[NDArray[np.float32], _Crops]:
    """Net counts (NaN where invalid) of the strongest complete spots, and their crops."""
    dx, dy, dz = (crops.offsets(axis) for axis in range(3))
    radius2 = dy[:, :, None] ** 2 + dx[:, None, :] ** 2  # (N, H, W)
    counts = np.where(crops.counts >= 0, crops.counts, np.nan).astype(np.float32)
    ring = np.where((radius2 > (HALF_WINDOW - 2) ** 2)[:, None], counts, np.nan)
    ring = ring.reshape(len(ring), -1)
    enough = np.isfinite(ring).sum(1) > 20
    level = np.zeros(len(ring), np.float32)
    if enough.any():
        middle = np.nanmedian(ring[enough], axis=1, keepdims=True)
        # neighbours stand out above the Poisson spread of the background and are left out
        quiet = ring[enough] <= middle + 4 * np.sqrt(middle + 1)
        level[enough] = np.nanmean(np.where(quiet, ring[enough], np.nan), axis=1)
    counts -= level[:, None, None, None]
    core = (radius2 <= 3.0**2)[:, None] & (np.abs(dz) <= 2.0)[:, :, None, None]
    complete = ~(np.isnan(counts) & core).any(axis=(1, 2, 3)) & enough
    signal = np.where(core, counts, 0).sum(axis=(1, 2, 3))
    noise = np.sqrt(np.maximum(signal, 0) + level * core.sum(axis=(1, 2, 3)) + 1)
    strength = np.where(complete, signal / noise, 0.0)
    order = np.argsort(-strength)[:max_spots]
    order = order[strength[order] > 5.0]
    return counts[order], crops.select(order)


def _fit(counts: NDArray[np.float32], crops: _Crops, width: float) -> tuple[float, float, float]:
    """(sigma_x, sigma_y, sigma_m): marginals inside a core that follows the running estimate."""
    step = crops.zeta * abs(width)
    sigma = [1.2, 1.2, 1.5 * float(np.median(step))]
    scale = [np.ones_like(step), np.ones_like(step), step]  # a voxel's width in units of sigma
    offset = [crops.offsets(axis) * scale[axis][:, None] for axis in range(3)]
    counts = np.nan_to_num(counts)
    for _ in range(8):
        weight = [
            (np.abs(offset[axis]) <= TRUNCATION * sigma[axis]).astype(np.float32)
            for axis in range(3)
        ]
        for axis, contraction in enumerate(("ndhw,nd,nh->nw", "ndhw,nd,nw->nh", "ndhw,nh,nw->nd")):
            others = {0: (2, 1), 1: (2, 0), 2: (1, 0)}[axis]
            marginal = np.einsum(contraction, counts, *(weight[o] for o in others), optimize=True)
            sigma[axis] = _profile_sigma(
                offset[axis], marginal / scale[axis][:, None], sigma[axis], scale[axis]
            )
    net = [
        math.sqrt(max(sigma[a] ** 2 - float(np.mean(scale[a] ** 2)) / 12, (0.05 * sigma[a]) ** 2))
        for a in range(3)
    ]
    return net[0], net[1], net[2]


def _profile_sigma(offset: Array, marginal: Array, sigma: float, scale: Array) -> float:
    """Take the standard deviation of the pooled profile inside three of the running estimate.

    The median over spots in each bin ignores a neighbour or a zinger in a few of them.
    """
    inside = np.abs(offset) <= TRUNCATION * sigma
    total = (np.where(inside, marginal, 0) * scale[:, None]).sum(axis=1)
    density = marginal / np.maximum(total, 1e-6)[:, None]
    n_bins = int(np.clip(inside.sum() // 50, 7, 49))
    edges = np.linspace(-TRUNCATION * sigma, TRUNCATION * sigma, n_bins + 1)
    which = np.digitize(offset[inside], edges[1:-1])
    values = density[inside]
    profile = np.array(
        [np.median(values[which == b]) if (which == b).any() else 0.0 for b in range(n_bins)]
    ).clip(0)
    centres = 0.5 * (edges[1:] + edges[:-1])
    if profile.sum() <= 0:
        return sigma
    mean = (profile * centres).sum() / profile.sum()
    second = (profile * (centres - mean) ** 2).sum() / profile.sum()
    return math.sqrt(second / TRUNCATED_VARIANCE)
