r"""Gauge of the model: whether amplitudes or scale hold the mean decay with resolution.

K F^2 stays the same when F^2 is multiplied and K divided by any function of resolution, so no data
tell the two apart: it takes knowledge of K. What is known depends on the experiment.

* Rotation: K is Lorentz and polarization, which were divided out, and relative B; the falloff is
  that of the amplitudes.
* Stills: a reflection whose lattice point lies on the Ewald sphere is fully in reflection at any
  resolution. K there does not depend on resolution; away from the sphere it does, because the
  points grow with their distance from the origin (mosaic spread, divergence).
* Laue: spectrum, Lorentz factor and detector fall off with the crystal. Nothing is known, K keeps
  it all and F is in units of sqrt(Sigma(d)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.hat_functions import hat_design
from braggflux.merge.model.merger import Merger
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.scale.terms.falloff import Falloff


@torch.no_grad()
def fix_gauge(merger: Merger, table: ObservationTable, config: MergeConfig) -> None:
    """Move the mean decay with resolution to scale or amplitudes; K F^2 does not change.

    Parameters
    ----------
    merger : Merger
        After its fit.
    table : ObservationTable
    config : MergeConfig
    """
    kind = config.falloff
    if kind == "auto":
        kind = "scale" if config.laue else "sphere"
    if kind == "scale":
        wilson = merger.prior.part(Wilson)
        _move(merger, wilson.log_sigma + 0.5 * config.wilson_b * wilson.knots)
    elif kind == "sphere" and "partiality" in merger.scale.terms:
        _move(merger, -_scale_on_the_sphere(merger, table))


def _move(merger: Merger, excess: Tensor) -> None:
    """Divide Sigma and F^2 by ``exp(excess)``, (n_knots,) about its mean, multiply K by it."""
    wilson = merger.prior.part(Wilson)
    excess = excess - excess.mean()
    next(t for t in merger.scale if isinstance(t, Falloff)).add(wilson.knots, excess)
    merger.set_log_spread(merger.log_spread - wilson.design @ excess)
    wilson.log_sigma.sub_(excess)


def _scale_on_the_sphere(merger: Merger, table: ObservationTable) -> Tensor:
    """Mean of log K at no distance from the sphere, at each knot of Sigma, (n_knots,).

    Over the observations as they are otherwise, beside what is known of each image.
    """
    batch = table.everything()
    log_scale = merger.scale.on_the_sphere(batch) - batch.terms.base_log_scale
    design = hat_design(batch.terms.inv_d2, merger.prior.part(Wilson).knots)
    ridge = 1e-6 * len(design) * torch.eye(design.shape[1], dtype=design.dtype)
    mean = log_scale.mean()
    normal = design.T @ design + ridge.to(design.device)
    return mean + torch.linalg.solve(normal, design.T @ (log_scale - mean))
