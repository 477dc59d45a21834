"""Newton steps for q(F): each row has its own curvature, which is known.

The precision of log <F^2> spans five decades over a data set; one learning rate for all leaves
strong reflections jittering or weak ones behind. The expected information of the Normal (weighted
by Student's t) is diagonal but for the tree of parents, so a damped Newton step costs nothing: the
gradients are there, the information is one sum over the observations. Batches add up gradients and
information alike, hence a step may follow any number of batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge.intensities.merger import IntensityMerger

MAX_STEP = 0.7  # in the log: far from the optimum the information is not to be trusted


class RowNewton:
    """Steps for the parameters of q(F).

    Parameters
    ----------
    merger : IntensityMerger
    """

    def __init__(self, merger: IntensityMerger) -> None:
        self.merger = merger
        self._clear()

    def _clear(self) -> None:
        self.information = torch.zeros_like(self.merger.log_concentration)
        self.weight = torch.zeros_like(self.information)
        self.merger.log_spread_step.grad = None
        self.merger.log_concentration.grad = None

    def add(self, information: Tensor, weight: Tensor) -> None:
        """Add the data's information and the prior's weight of one batch, (R,) each."""
        self.information += information
        self.weight += weight

    @torch.no_grad()
    def step(self, damping: float) -> None:
        """Take a step from all that was added since the last one."""
        merger = self.merger
        own = self.information + self.weight
        below = own.clone()
        for rows, parent in reversed(merger.levels):  # a parent's step moves its whole tree
            below.index_add_(0, parent, below[rows])
        below = below + self.weight * self._stiffness()
        change = -merger.log_spread_step.grad / below.clamp_min(1e-12)
        merger.log_spread_step += damping * change.clamp(-MAX_STEP, MAX_STEP)
        k = merger.log_concentration.exp()
        curvature = 0.5 * torch.maximum(own / k, self.weight) + 0.5 * self.weight
        change = -merger.log_concentration.grad / curvature.clamp_min(1e-12)
        merger.log_concentration += damping * change.clamp(-MAX_STEP, MAX_STEP)
        self._clear()

    def _stiffness(self) -> Tensor:
        """Curvature of the prior of a child about its parent, (R,)."""
        prior = self.merger.prior
        stiffness = torch.zeros_like(self.weight)
        if prior.is_coupled:
            mean_square = self.merger.log_spread.exp()[prior.child]
            stiffness[prior.child] = 0.5 * mean_square / prior.conditional()[1]
        return stiffness
