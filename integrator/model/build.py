"""An integrator for a shoebox store, started from the data in it."""

from __future__ import annotations

import logging

import numpy as np
import torch

from braggflux.integrator.config import IntegratorConfig
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.model.background import MeanBackground
from braggflux.integrator.model.encoder import PositionFeatures
from braggflux.integrator.model.integrator import Integrator
from braggflux.integrator.model.local_shape import PlaceFeatures
from braggflux.integrator.model.profile import SpotShape
from braggflux.integrator.model.saved_integrator import SavedIntegrator
from braggflux.integrator.model.start import (
    MIN_PHOTONS,
    spot_brightness,
    stands_alone,
    start_local_shape,
    start_profile,
)
from braggflux.integrator.prediction.rocking import RockingWidth
from braggflux.integrator.shoebox.background import mean_image
from braggflux.integrator.types import Flag, ShoeboxBatch

logger = logging.getLogger(__name__)

CHUNK, MAX_CHUNKS = 4096, 64
"""Boxes read at a time, and how often, to find strong spots: a quarter of a million is enough."""
MIN_ALONE = 50
"""Strong spots that stand alone, without which all are taken."""
NOTABLE = 0.1
"""Share of strong spots with something else in their boxes that no sound sweep has."""


def build_integrator(
    store: ShoeboxStore, config: IntegratorConfig, saved: SavedIntegrator | None = None
) -> Integrator:
    """Integrator with untrained networks and a Gaussian profile of the measured extent.

    Where one was ``saved``, its networks and its profile, on its grid; the grid is laid on the
    rocking curves of this store.
    """
    sigma_x, sigma_y, sigma_m = (float(v) for v in store.attributes["extent"])
    mosaic, size_rate = (float(v) for v in store.attributes.get("rocking", (sigma_m, 0.0)))
    rocking = RockingWidth(mosaic, size_rate) if size_rate or saved else None
    if saved is not None:
        sigma_x, sigma_y, sigma_m = saved.sigma
    shape = SpotShape(sigma_x, sigma_y, sigma_m, store.box, sweep_widths(store), rocking)
    background = mean_background(store, config.background_smoothing_px)
    metadata = store.metadata()
    features = PositionFeatures.from_metadata(metadata)
    place = PlaceFeatures.from_metadata(metadata, len(store.experiments))
    integrator = Integrator(shape, background, features, config, place)
    if saved is not None:
        saved.give_to(integrator)
    return integrator


def sweep_widths(store: ShoeboxStore) -> tuple[float, ...]:
    """Frame width of every sweep [deg]."""
    return tuple(float(e["oscillation_deg"][1]) for e in store.experiments)


def mean_background(store: ShoeboxStore, smoothing_px: float) -> MeanBackground:
    """Mean background of a store's sweeps, smoothed by ``smoothing_px``.

    A pixel's mean over a few hundred frames of 0.1 photon is uncertain by a tenth and more, and
    background has no structure as fine as a pixel.
    """
    images, levels = [], []
    for number in range(len(store.experiments)):
        field = store.background(number)
        panels = zip(field.total, field.count, strict=True)
        images.append([torch.from_numpy(mean_image(*panel, smoothing_px)) for panel in panels])
        levels.append(torch.as_tensor(field.frame_ratio, dtype=torch.float32).clamp_min(0.05))
    return MeanBackground(images, levels, store.box)


def start_from_strong_spots(
    integrator: Integrator, store: ShoeboxStore, seed: int, *, has_profile: bool = False
) -> int:
    """Set the mean profile from the strongest whole spots; returns how many were used.

    An integrator that ``has_profile`` keeps it: only where its spots lie and how wide they are is
    set.

    Raises
    ------
    UserError
        No spot is bright enough to show a profile.
    """
    brightness = torch.zeros(len(store))
    chunks = range(0, len(store), CHUNK)
    # of a long scan, parts from all over it
    for k in np.unique(np.linspace(0, len(chunks) - 1, MAX_CHUNKS).astype(int)):
        rows = slice(chunks[k], chunks[k] + CHUNK)
        brightness[rows] = spot_brightness(integrator, store.read(rows))
    brightness[(store.flags & (Flag.REJECTED | Flag.MASKED_CORE | Flag.PARTIAL_EDGE)) > 0] = 0.0
    bright = torch.nonzero(brightness > MIN_PHOTONS)[:, 0]
    if not len(bright):
        raise UserError(
            f"no predicted reflection has more than {MIN_PHOTONS:.0f} photons above the noise on "
            f"unmasked voxels (brightest: {float(brightness.max()):.0f}), so no profile can be "
            "learned; check that the EXPT belongs to these frames, and the pixel mask"
        )
    n_used = integrator.config.n_profile_spots
    # the upper half by brightness, thinned at random: the very brightest lie at low angle only
    bright = bright[brightness[bright].argsort(descending=True)][: max(len(bright) // 2, 50)]
    order = torch.randperm(len(bright), generator=torch.Generator().manual_seed(seed))
    chosen = bright[order[:n_used]].sort().values
    strong = _undisturbed(integrator, store.read(chosen))
    start = start_local_shape if has_profile else start_profile
    start(integrator, strong)
    return len(strong)


def _undisturbed(integrator: Integrator, strong: ShoeboxBatch) -> ShoeboxBatch:
    """Leave out the strong spots with photons beside them that nobody predicted."""
    is_alone = stands_alone(integrator, strong)
    n_alone = int(is_alone.sum())
    if n_alone < len(strong) * (1 - NOTABLE):
        logger.warning(
            "%d of %d strong spots have photons of something else in their boxes: look for a "
            "second lattice (dials.index max_lattices=2; give an EXPT with both), salt or ice",
            len(strong) - n_alone,
            len(strong),
        )
    if n_alone == len(strong) or n_alone < min(MIN_ALONE, len(strong)):
        return strong
    return strong[torch.nonzero(is_alone)[:, 0]]
