r"""1 - r^2 of relatives against resolution: a smooth curve through the estimates of shells.

Bijvoet mates. Their difference is the anomalous scattering of a few atoms, f'' at any angle but
for their displacements: its mean square V falls smoothly, while Wilson's Sigma has the bumps of
the whole structure. Over atoms whose B vary,

    V = 1/2 epsilon Sigma (1 - r^2),    log V = c - B s^2 / 2 + D s^4 / 8,    s = 1 / d,

D: the variance of B among the atoms, weighted by f''^2, about that of atoms in general, 10 A^2
squared. B is like that of the crystal, the fall of Sigma, within :data:`B_SD`.

Parents in other datasets. What moves the atoms is unknown: log(1 - r^2) is a random walk from
shell to shell with steps of :data:`STEP`.

Both are log(1 - r^2) = offset + design @ c with a Normal prior of c, found with the estimates
m_s +- e_s of the shells' means by

    sum_s (m_s - <1 - r^2>_s)^2 / (2 e_s^2) + 1/2 (c - centre)' P (c - centre)  ->  min.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.merge.prior.wilson import Wilson

#: B of the anomalous scatterers less that of the crystal, standard deviation [A^2].
B_SD = 15.0
#: Variance of B among them, and how far that may be off [A^4].
D_MEAN, D_SD = 100.0, 100.0
#: Change of log(1 - r^2) of parents from shell to shell, standard deviation.
STEP = 0.3
N_ERRORS = 2.0
N_ROUNDS = 50
SMALLEST, GREATEST = 1e-5, 0.5


@dataclass(frozen=True)
class Share:
    """Estimate of 1 - r^2 of one shell and its standard error; infinite where nothing is known."""

    value: float
    error: float
    n_pairs: int


@dataclass(frozen=True)
class Curve:
    """What log(1 - r^2) of the children may be: ``offset + design @ c``.

    Parameters
    ----------
    design : Tensor, (C, m)
    offset : Tensor, (C,)
    level : Tensor, (m,)
        Change of c that changes log(1 - r^2) of all by 1.
    centre, precision : Tensor, (m,), (m, m)
        Of the prior of c.
    """

    design: Tensor
    offset: Tensor
    level: Tensor
    centre: Tensor
    precision: Tensor

    def through(
        self, shells: Sequence[Share], shell: Tensor, pair_weight: Tensor
    ) -> Tensor | None:
        """1 - r^2 of all children, (C,), by Gauss-Newton steps; None where no shell is known.

        Parameters
        ----------
        shells : sequence of Share
        shell : Tensor, (C,) int64
            Number of each child's shell.
        pair_weight : Tensor, (C,)
            Of each child in its shell's mean; 0 for none.
        """
        value = self.offset.new_tensor([s.value for s in shells])
        weight = self.offset.new_tensor([s.error**-2 for s in shells])
        if not (weight > 0).any():
            return None
        member = torch.nn.functional.one_hot(shell, len(shells)).T * pair_weight
        member = member / member.sum(1, keepdim=True).clamp_min(1e-300)  # means over shells
        pooled = float((weight * value).sum() / weight.sum())
        target = math.log(max(pooled, float(weight.sum() ** -0.5)))
        c = (
            self.centre
            + (target - float(self._log(self.centre)[pair_weight > 0].mean())) * self.level
        )
        for _ in range(N_ROUNDS):
            slopes = member @ (self._log(c).exp()[:, None] * self.design)  # of the means
            residual = value - member @ self._log(c).exp()
            score = slopes.T @ (weight * residual) - self.precision @ (c - self.centre)
            step = torch.linalg.solve(self._information(slopes, weight), score)
            c = c + step / (self.design @ step).abs().amax().clamp_min(1.0)
            c = c + (math.log(SMALLEST) - self._log(c).amax()).clamp_min(0.0) * self.level
        share = self._log(c).exp()
        slopes = member @ (share[:, None] * self.design)
        covariance = torch.linalg.inv(self._information(slopes, weight))
        error = share * torch.einsum("ci,ij,cj->c", self.design, covariance, self.design).sqrt()
        return torch.hypot(share, N_ERRORS * error).clamp(SMALLEST, GREATEST)

    def _log(self, c: Tensor) -> Tensor:
        return self.offset + self.design @ c

    def _information(self, slopes: Tensor, weight: Tensor) -> Tensor:
        return slopes.T @ (weight[:, None] * slopes) + self.precision


def mates_curve(wilson: Wilson, child: Tensor) -> Curve:
    """Curve of Bijvoet mates: log V is a parabola in s^2; ``child`` has the rows, (C,)."""
    x = 0.5 * wilson.inv_d2[child]
    log_sigma = (wilson.design @ wilson.log_sigma.detach())[child]
    line = torch.stack([torch.ones_like(x), -x], 1)
    fall = torch.linalg.lstsq(line, log_sigma[:, None]).solution[1, 0]
    zero = torch.zeros_like(fall)
    return Curve(
        torch.stack([torch.ones_like(x), -x, 0.5 * x**2], 1),
        -log_sigma,
        x.new_tensor([1.0, 0.0, 0.0]),
        torch.stack([zero, fall, zero + D_MEAN]),
        x.new_tensor([0.0, B_SD**-2, D_SD**-2]).diag(),
    )


def parents_curve(shell: Tensor, n_shells: int) -> Curve:
    """Random walk from shell to shell; ``shell`` is of the children, (C,)."""
    design = torch.nn.functional.one_hot(shell, n_shells).double()
    difference = torch.eye(n_shells, dtype=torch.float64, device=shell.device).diff(dim=0)
    ones = design.new_ones(n_shells)
    return Curve(
        design, torch.zeros_like(design[:, 0]), ones, 0 * ones, difference.T @ difference / STEP**2
    )
