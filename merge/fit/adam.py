"""Adam (Kingma & Ba, ICLR 2015) without torch's compiler.

The steps are those of :class:`torch.optim.Adam` to the bit, on the CPU. Making a torch optimizer
imports ``torch._dynamo`` and with it sympy: 67 MiB and a second for nothing that is used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-8


class Adam:
    """Gradient steps in units of the gradients' own size.

    Parameters
    ----------
    groups : sequence of (parameters, rate)
        The rate that each group starts from.
    betas : (float, float)
        Memory of the mean and of the mean square of the gradients.

    Attributes
    ----------
    start_rates : tuple of float
    rates : list of float
        Of the groups, for the next steps.
    """

    def __init__(
        self, groups: Sequence[tuple[Sequence[nn.Parameter], float]], betas: tuple[float, float]
    ) -> None:
        self.betas = betas
        self.start_rates = tuple(rate for _, rate in groups)
        self.rates = list(self.start_rates)
        self._parameters = [(p, k) for k, (own, _) in enumerate(groups) for p in own]
        self._moments: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._n_steps: dict[nn.Parameter, int] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that it moves."""
        return [parameter for parameter, _ in self._parameters]

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for parameter, _ in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        beta_1, beta_2 = self.betas
        for p, group in self._parameters:
            if p.grad is None:
                continue
            n = self._n_steps[p] = self._n_steps.get(p, 0) + 1
            if n == 1:
                self._moments[p] = torch.zeros_like(p), torch.zeros_like(p)
            mean, square = self._moments[p]
            mean.lerp_(p.grad, 1 - beta_1)
            square.mul_(beta_2).addcmul_(p.grad, p.grad, value=1 - beta_2)
            size = (square.sqrt() / (1 - beta_2**n) ** 0.5).add_(EPSILON)
            p.addcdiv_(mean, size, value=-(self.rates[group] / (1 - beta_1**n)))

    def state_dict(self) -> dict[str, Any]:
        """Moments and numbers of steps, in the order of the parameters."""
        own = [p for p, _ in self._parameters]
        return {
            "moments": [self._moments.get(p) for p in own],
            "n_steps": [self._n_steps.get(p, 0) for p in own],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken."""
        given = zip(self._parameters, state["moments"], state["n_steps"], strict=True)
        for (p, _), moments, n in given:
            if moments is not None:
                mean, square = (values.to(p.device) for values in moments)
                self._moments[p], self._n_steps[p] = (mean, square), n
