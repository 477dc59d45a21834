"""Single precision is enough for the whole objective, at the extremes too."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from simulated_joint import EXTREMES, JointProblem, in_float64

#: Relative difference of the objective, and of its whole gradient, between the precisions. Seen
#: 2026-11-30: at most 5e-6 (where it is near zero) and 7e-7.
VALUE, GRADIENT = 1e-4, 1e-5


def value_and_gradient(problem: JointProblem) -> tuple[float, torch.Tensor]:
    """Joint ELBO without sampling, and its gradient by all parameters, in double."""
    named = [p for p in problem.model.parameters() if p.requires_grad]
    elbo = problem.model.joint_terms(problem.batch, sample=False)[0].elbo
    gradients = torch.autograd.grad(elbo, named, allow_unused=True)
    parts = [
        torch.zeros_like(p).flatten() if g is None else g.flatten()
        for p, g in zip(named, gradients, strict=True)
    ]
    return elbo.item(), torch.cat([g.double() for g in parts])


@pytest.mark.parametrize("problem", EXTREMES, ids=lambda f: f.__name__)
def test_single_precision_gives_the_objective_and_its_gradient(problem):
    single = problem()
    value, gradient = value_and_gradient(single)
    exact, slope = value_and_gradient(in_float64(deepcopy(single)))
    assert torch.isfinite(gradient).all()
    assert value == pytest.approx(exact, rel=VALUE)
    assert float((gradient - slope).norm() / slope.norm()) < GRADIENT
