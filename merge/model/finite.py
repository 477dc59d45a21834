"""A fit that has left the numbers is stopped: its results would look like results."""

from __future__ import annotations

import math

import torch
from torch import nn

from braggflux.integrator.errors import UserError


def require_finite(model: nn.Module, elbo: float | None, when: str) -> None:
    """Refuse to go on with an objective or parameters that are not finite.

    Parameters
    ----------
    model : nn.Module
    elbo : float or None
        Objective of the last pass, None where there was none.
    when : str
        For the message: ``epoch 3``.

    Raises
    ------
    UserError
    """
    named = [*model.named_parameters()]
    bad = [name for name, p in named if not bool(torch.isfinite(p.detach()).all())]
    if elbo is not None and not math.isfinite(elbo):
        bad.insert(0, "the objective")
    if bad:
        raise UserError(
            f"{when}: {bad[0]} is not finite any more; nothing of it is written. Look for "
            "intensities or sigmas that cannot be, lower the learning rate, or (run) go on from "
            "the last epoch with --resume"
        )
