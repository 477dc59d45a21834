"""Our Adam takes the steps of torch's."""

from __future__ import annotations

import torch

from braggflux.merge.fit.adam import Adam

BETAS = (0.9, 0.95)


def test_steps_are_those_of_torch():
    torch.manual_seed(0)
    start = [torch.randn(7, 3), torch.randn(5, dtype=torch.float64), torch.randn(2)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    adam = Adam([(ours[:1], 0.01), (ours[1:], 0.1)], BETAS)
    groups = [{"params": theirs[:1], "lr": 0.01}, {"params": theirs[1:], "lr": 0.1}]
    reference = torch.optim.Adam(groups, betas=BETAS)
    for step in range(30):
        adam.rates = [rate * 0.97**step for rate in adam.start_rates]
        for group, rate in zip(reference.param_groups, adam.rates, strict=True):
            group["lr"] = rate
        adam.zero_grad()
        reference.zero_grad()
        for k, (p, other) in enumerate(zip(ours, theirs, strict=True)):
            if k == 2 and step < 10:  # no gradient, no step: its count begins later
                assert p.grad is None
                continue
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        adam.step()
        reference.step()
        for p, other in zip(ours, theirs, strict=True):
            assert torch.equal(p, other)
