"""Functions that are linear between knots: the basis of all smooth curves of the model."""

from __future__ import annotations

import torch
from torch import Tensor


def hat_design(x: Tensor, knots: Tensor) -> Tensor:
    """Linear interpolation on ``knots`` as a matrix, (N, n_knots); constant beyond the ends."""
    if len(knots) == 1:
        return torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    left, share = hat_places(x, knots)
    design = torch.zeros(len(x), len(knots), dtype=x.dtype, device=x.device)
    design.scatter_(1, left[:, None], (1 - share)[:, None])
    design.scatter_add_(1, left[:, None] + 1, share[:, None])
    return design


def hat_places(x: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
    """Knot at or left of each ``x``, (N,) int64, and the weight of the next one, (N,), in [0, 1].

    There are two knots at least; beyond the ends the interpolation is constant.
    """
    x = x.clamp(knots[0], knots[-1])
    right = torch.searchsorted(knots, x).clamp(1, len(knots) - 1)
    width = (knots[right] - knots[right - 1]).clamp_min(1e-12)
    return right - 1, (x - knots[right - 1]) / width
