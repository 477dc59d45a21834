"""Width of coupled amplitudes: own and in common with the root of their tree.

q is a product, whose width is that of F with its relatives known exactly. The precision matrix of
a tree is the data's (q's precision less the prior's) plus the prior's links; its inverse along a
tree is one pass from the children up and one back. Each row takes up the uncertainty of its
parent,

    F = <F> + own + slope (F_parent - <F_parent>),    slope = r (2 / S) / precision,

so that relatives are uncertain together: their difference is better known than each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from integrator.distributions.nakagami import Nakagami
from merge.intensities.merger import IntensityMerger


@dataclass(frozen=True)
class TreeWidth:
    """Widths of every row, (R,).

    Parameters
    ----------
    own_variance : Tensor
        Of what a row does not share with its root; 0 for the root itself.
    shared : Tensor
        Standard deviation of the root, times the slopes on the way from it.
    """

    own_variance: Tensor
    shared: Tensor

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of each amplitude for itself."""
        return (self.own_variance + self.shared**2).sqrt()


@torch.no_grad()
def tree_width(merger: IntensityMerger, q: Nakagami) -> TreeWidth:
    """Widths of q(F) with the uncertainty of the relatives."""
    variance = q.variance.clone()
    if not merger.prior.is_coupled:
        return TreeWidth(torch.zeros_like(variance), variance.sqrt())
    prior = merger.prior
    r, spread = prior.conditional()
    child, parent = prior.child, prior.parent
    stiffness = torch.where(prior.wilson.is_centric[child], 1.0, 2.0) / spread
    slope = torch.zeros_like(variance)
    slope[child] = (r * stiffness * variance[child]).clamp_max(1.0)
    # a parent knows of its child only what the child's own data say
    own = (1 / variance[child] - stiffness).clamp_min(0.0)
    link = stiffness * own / (stiffness + own)
    precision = 1 / variance
    precision.index_add_(0, parent, r**2 * (link - stiffness))
    expected = prior.spread()
    least = torch.maximum(1 / expected, prior.reference.precision(expected))
    has_parent = torch.zeros_like(variance, dtype=torch.bool)
    has_parent[child] = True
    shared = torch.where(has_parent, 0.0, torch.maximum(precision, least) ** -0.5)
    own_variance = torch.where(has_parent, variance, 0.0)
    for rows, above in merger.levels:
        shared = shared.index_copy(0, rows, slope[rows] * shared[above])
        total = variance[rows] + slope[rows] ** 2 * own_variance[above]
        own_variance = own_variance.index_copy(0, rows, total)
    return TreeWidth(own_variance, shared)
