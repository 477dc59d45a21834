"""Gradients of a batch whose images several processes share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from braggflux.merge.model.merger import Merger


def add_gradients(
    merger: Merger,
    loss: Tensor | None,
    parameters: Sequence[nn.Parameter],
    others: Sequence[Tensor],
) -> None:
    """Add the gradients of all processes to those that the parameters have.

    Parameters
    ----------
    merger : Merger
        Says who the processes are.
    loss : Tensor, (), or None
        This process's part, which all have a sum of; None where none of the images is its own.
    parameters : sequence of Parameter
    others : sequence of Tensor
        Summed over the processes too, in place.
    """
    if merger.processes.is_alone:
        if loss is not None:
            loss.backward(inputs=list(parameters))
        return
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    if loss is not None:
        loss.backward(inputs=list(parameters))
    n_given = torch.tensor([float(p.grad is not None) for p in parameters], device=merger.device)
    merger.processes.add_up_gradients(parameters, [*others, n_given])
    for parameter, gradient, n in zip(parameters, before, n_given.tolist(), strict=True):
        if not n:  # an optimizer leaves alone what has no gradient, not what has one of zero
            parameter.grad = gradient
        elif gradient is not None and parameter.grad is not None:
            parameter.grad += gradient
