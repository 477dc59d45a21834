"""Width of coupled amplitudes: own and in common with the root of their tree.

q is a product, whose width is that of F with its relatives known exactly. The precision matrix of
a tree is the data's plus the prior's links; its inverse along a tree is one pass from the children
up and one back. Each row takes up the uncertainty of its parent,

    F = <F> + own + slope (F_parent - <F_parent>),    slope = r (2 / S) / precision,

so that relatives are uncertain together: their difference is better known than each of them.

What the data say is their information of log F^2, 4 information / F^2 of F. (The precision of q
less the prior's is the same only on paper: where relatives are alike it is a small difference of
large numbers, one of which is known to some per cent.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.model.merger import IntensityMerger


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
    """Widths of q(F) with the uncertainty of the relatives.

    ``merger.information`` must be that of the last fit.
    """
    prior = merger.prior
    alone = q.variance.sqrt()
    if not prior.is_coupled:
        return TreeWidth(torch.zeros_like(alone), alone)
    child, parent = prior.child, prior.parent
    is_parent = torch.zeros_like(alone, dtype=torch.bool)
    is_parent[parent] = True
    r, spread = prior.conditional()
    ratio, link = torch.zeros_like(alone), torch.zeros_like(alone)
    ratio[child] = r
    link[child] = torch.where(prior.wilson.is_centric[child], 1.0, 2.0) / spread
    # of F from its own data and those of its descendants
    precision = 4 * merger.information / q.spread
    for rows, above in reversed(merger.levels):
        below = link[rows] * precision[rows] / (link[rows] + precision[rows])
        precision.index_add_(0, above, ratio[rows] ** 2 * below)
    wilson = 1 / prior.wilson.p_structure_factor().variance
    root = precision + torch.maximum(wilson, prior.reference.precision(prior.spread()))
    shared = torch.where(is_parent, root**-0.5, alone)
    own_variance = torch.zeros_like(alone)
    for rows, above in merger.levels:
        given_parent = 1 / (precision[rows] + link[rows])
        slope = ratio[rows] * link[rows] * given_parent
        shared = shared.index_copy(0, rows, slope * shared[above])
        total = given_parent + slope**2 * own_variance[above]
        own_variance = own_variance.index_copy(0, rows, total)
    return TreeWidth(own_variance, shared)
