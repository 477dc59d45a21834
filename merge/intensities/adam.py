"""Adam (Kingma & Ba, ICLR 2015) without torch's compiler.

The steps are those of :class:`torch.optim.Adam` to the bit, on the CPU. Making a torch optimizer
imports ``torch._dynamo`` and with it sympy: 67 MiB and a second for nothing that is used here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPSILON = 1e-8


class Adam:
    """Gradient steps in units of the gradients' own size.

    Parameters
    ----------
    groups : sequence of (parameters, rate)
    betas : (float, float)
        Memory of the mean and of the mean square of the gradients.

    Attributes
    ----------
    rate : float
        Factor on the rates of all groups.
    """

    def __init__(
        self, groups: Sequence[tuple[Sequence[nn.Parameter], float]], betas: tuple[float, float]
    ) -> None:
        self.betas, self.rate = betas, 1.0
        self._rate_of = [(p, rate) for parameters, rate in groups for p in parameters]
        self._moments: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._n_steps: dict[nn.Parameter, int] = {}

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for parameter, _ in self._rate_of:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        beta_1, beta_2 = self.betas
        for p, rate in self._rate_of:
            if p.grad is None:
                continue
            n = self._n_steps[p] = self._n_steps.get(p, 0) + 1
            if n == 1:
                self._moments[p] = torch.zeros_like(p), torch.zeros_like(p)
            mean, square = self._moments[p]
            mean.lerp_(p.grad, 1 - beta_1)
            square.mul_(beta_2).addcmul_(p.grad, p.grad, value=1 - beta_2)
            size = (square.sqrt() / (1 - beta_2**n) ** 0.5).add_(EPSILON)
            p.addcdiv_(mean, size, value=-rate * self.rate / (1 - beta_1**n))
