"""Newton steps for q(F): each row has its own curvature, which is known.

The precision of log <F^2> spans five decades over a data set; one learning rate for all leaves
strong reflections jittering or weak ones behind. The expected information of the Normal (weighted
by Student's t) is diagonal but for the tree of parents, so a damped Newton step costs nothing: the
gradients are there, the information is one sum over the observations. Every batch moves the rows
by its part of the gradient over the information of the whole pass before it: the steps of a pass
add up to one damped Newton step, and no row chases the few observations of one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from braggflux.merge.model.merger import Merger

MAX_STEP = 0.7  # in the log: far from the optimum the information is not to be trusted


class AmplitudeNewton:
    """Steps for the parameters of q(F).

    Parameters
    ----------
    merger : Merger
    """

    def __init__(self, merger: Merger) -> None:
        self.merger = merger
        self.information = torch.zeros_like(merger.log_concentration)
        self.weight = torch.zeros_like(self.information)
        self._whole: tuple[Tensor, Tensor] | None = None

    def step(self, information: Tensor, weight: Tensor, damping: float) -> None:
        """Use the gradients of a batch, its information and its weight of the prior, (R,) each."""
        self.information += information
        self.weight += weight
        if self._whole is not None:
            self._move(*self._whole, damping)
            self._forget()

    def end_pass(self, damping: float) -> None:
        """Take the first pass's step, and the sums of this pass as the information of the next."""
        if self._whole is None:
            self._move(self.information, self.weight, damping)
            self._forget()
        self._whole = self.information, self.weight
        self.merger.information = self.information
        self.information = torch.zeros_like(self.information)
        self.weight = torch.zeros_like(self.weight)

    def move(self, information: Tensor, weight: Tensor, damping: float) -> None:
        """Take one step along the gradients that are there, and clear them."""
        self._move(information, weight, damping)
        self._forget()

    def _forget(self) -> None:
        self.merger.log_spread_step.grad = None
        self.merger.log_concentration.grad = None

    @torch.no_grad()
    def _move(self, information: Tensor, weight: Tensor, damping: float) -> None:
        merger = self.merger
        own = information + weight
        below = own.clone()
        for rows, parent in reversed(merger.prior.levels):  # a parent's step moves its whole tree
            below.index_add_(0, parent, below[rows])
        below = below + weight * merger.prior.stiffness(merger.log_spread.exp())
        change = -_gradient(merger.log_spread_step) / below.clamp_min(1e-12)
        merger.log_spread_step.add_(damping * change.clamp(-MAX_STEP, MAX_STEP))
        k = merger.log_concentration.exp()
        curvature = 0.5 * torch.maximum(own / k, weight) + 0.5 * weight
        change = -_gradient(merger.log_concentration) / curvature.clamp_min(1e-12)
        merger.log_concentration.add_(damping * change.clamp(-MAX_STEP, MAX_STEP))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
