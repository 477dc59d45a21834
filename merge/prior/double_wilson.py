r"""Double-Wilson prior: an amplitude resembles that of its parent.

    p(F | F_parent) = Rice (acentric) or folded normal (centric) about r F_parent with
                      S = epsilon Sigma (1 - r^2)

For an acentric reflection (Read 1990, Acta Cryst. A46, 900),

    p(F | F_parent) = 2 F / S exp(-(F^2 + r^2 F_parent^2) / S) I_0(2 r F_parent F / S).

Parents form trees over any number of datasets (Hekstra et al. 2025), or F(-) has F(+); rows
without a parent have the prior below. r is a constant per resolution shell. It must not be learned
by gradient with F, its likelihood there runs to 1; see
:mod:`braggflux.merge.fit.half_set_correlation`.

Width. q(F) is a product, whose width is that of F with its relatives known exactly. The precision
matrix of a tree is the data's plus the prior's links; its inverse along a tree is one pass from
the children up and one back. Each row takes up the uncertainty of its parent,

    F = <F> + own + slope (F_parent - <F_parent>),    slope = r (2 / S) / precision,

so that relatives are uncertain together: their difference is better known than each of them. What
the data say is their information of log F^2, 4 information / F^2 of F. (The precision of q less
the prior's is the same only on paper: where relatives are alike it is a small difference of large
numbers, one of which is known to some per cent.)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.prior.base import AmplitudePrior, CoupledWidth, Level, PriorOver
from braggflux.merge.rows import UniqueRows


class DoubleWilson(PriorOver):
    """Rice's law or the folded normal about the parent's amplitude, once :meth:`couple` is called.

    Parameters
    ----------
    below : AmplitudePrior
        Of rows without a parent.
    rows : UniqueRows
    n_shells : int
        Resolution shells of estimates of r, equally many rows each.

    Attributes
    ----------
    child, parent : Tensor, (C,)
        Rows that have a parent, and the rows of their parents.
    one_minus_r2 : Tensor, (C,)
        1 - r^2 of each child.
    shell : Tensor, (R,)
        Resolution shell of each row.
    """

    is_centric: Tensor
    child: Tensor
    parent: Tensor
    shell: Tensor
    one_minus_r2: Tensor

    def __init__(self, below: AmplitudePrior, rows: UniqueRows, n_shells: int) -> None:
        super().__init__(below)
        self.register_buffer("is_centric", torch.as_tensor(rows.is_centric))
        self.register_buffer("child", torch.as_tensor(np.flatnonzero(rows.parent >= 0)))
        self.register_buffer("parent", torch.as_tensor(rows.parent[rows.parent >= 0]))
        self.n_levels = int(rows.depth.max())
        for level in range(1, self.n_levels + 1):
            at = np.flatnonzero(rows.depth == level)
            for name, values in (("rows", at), ("above", rows.parent[at])):
                buffer = torch.as_tensor(values)
                self.register_buffer(f"level_{level}_{name}", buffer, persistent=False)
        shell = rows.shells(n_shells)
        self.register_buffer("shell", torch.as_tensor(shell))  # (R,)
        self.n_shells = n_shells
        share = torch.full((len(self.child),), 0.01, dtype=torch.float64)
        self.register_buffer("one_minus_r2", share)
        self._is_coupled = False

    @property
    def is_coupled(self) -> bool:
        """Whether amplitudes are tied to those of their relatives now."""
        return self._is_coupled

    def couple(self) -> None:
        """Tie amplitudes to those of their parents from now on."""
        self._is_coupled = True

    def uncouple(self) -> None:
        """Let each amplitude be for itself again."""
        self._is_coupled = False

    @property
    def levels(self) -> list[Level]:
        """Rows at each step below the rows without parent, and their parents."""
        return [
            (getattr(self, f"level_{k}_rows"), getattr(self, f"level_{k}_above"))
            for k in range(1, self.n_levels + 1)
        ]

    def rows_with_relatives(self) -> Tensor:
        """Rows that have a parent or are one, (R,) bool; none before :meth:`couple`."""
        found = torch.zeros_like(self.shell, dtype=torch.bool)
        if self.is_coupled:
            found[self.child] = True
            found[self.parent] = True
        return found

    def by_shell(self) -> Tensor:
        """Mean of 1 - r^2 in each resolution shell, (n_shells,); of all where it has no child."""
        share, shell = self.one_minus_r2, self.shell[self.child]
        total = share.new_zeros(self.n_shells).index_add_(0, shell, share)
        count = torch.bincount(shell, minlength=self.n_shells)
        return torch.where(count > 0, total / count.clamp_min(1), share.sum() / max(len(share), 1))

    def conditional(self) -> tuple[Tensor, Tensor]:
        """Correlation r and variance S of each row that has a parent, (C,) each."""
        share = self.one_minus_r2
        return (1 - share).sqrt(), self.spread()[self.child] * share

    def kl(self, q: Nakagami) -> Tensor:
        """Divergence of each row, (R,); that of a child is averaged over q of its parent."""
        alone = self.below.kl(q)
        if not self.is_coupled:
            return alone
        return alone.index_copy(0, self.child, self._conditional_kl(q))

    def _conditional_kl(self, q: Nakagami) -> Tensor:
        """Divergence of each child, (C,); the slow factor I_0 at the mean amplitudes."""
        child, parent = self.child, self.parent
        r, variance = self.conditional()
        mean, variance_q = q.mean, q.variance
        product = r * mean[parent] * mean[child] / variance
        # <(F - r F_parent)^2> written without cancellation
        square = (mean[child] - r * mean[parent]) ** 2
        square = square + variance_q[child] + r**2 * variance_q[parent]
        rice = (
            torch.log(2 / variance)
            + 0.5 * q.log_intensity_mean[child]
            - square / variance
            + torch.log(torch.special.i0e(2 * product))
        )
        folded = -0.5 * (math.log(2 * math.pi) + variance.log() + square / variance) + torch.log1p(
            torch.exp(-2 * product)
        )
        log_p = torch.where(self.is_centric[child], folded, rice)
        return -q.entropy()[child] - log_p

    def stiffness(self, mean_square: Tensor) -> Tensor:
        """Curvature in log F^2 about the parent, or of the prior below, (R,)."""
        stiffness = self.below.stiffness(mean_square)
        if self.is_coupled:
            stiffness[self.child] = 0.5 * mean_square[self.child] / self.conditional()[1]
        return stiffness

    def precision(self) -> Tensor:
        """Least precision of F that the prior gives to a row without a parent, (R,)."""
        return self.below.precision()

    @torch.no_grad()
    def width(self, q: Nakagami, information: Tensor) -> CoupledWidth:
        """Widths of q(F) with the uncertainty of the relatives; see the base class."""
        if not self.is_coupled:
            return self.below.width(q, information)
        alone = q.variance.sqrt()
        is_parent = torch.zeros_like(alone, dtype=torch.bool)
        is_parent[self.parent] = True
        r, spread = self.conditional()
        ratio, link = torch.zeros_like(alone), torch.zeros_like(alone)
        ratio[self.child] = r
        link[self.child] = torch.where(self.is_centric[self.child], 1.0, 2.0) / spread
        # of F from its own data and those of its descendants
        precision = 4 * information / q.spread
        for rows, above in reversed(self.levels):
            below = link[rows] * precision[rows] / (link[rows] + precision[rows])
            precision.index_add_(0, above, ratio[rows] ** 2 * below)
        root = precision + self.below.precision()
        shared = torch.where(is_parent, root**-0.5, alone)
        own_variance = torch.zeros_like(alone)
        for rows, above in self.levels:
            given_parent = 1 / (precision[rows] + link[rows])
            slope = ratio[rows] * link[rows] * given_parent
            shared = shared.index_copy(0, rows, slope * shared[above])
            total = given_parent + slope**2 * own_variance[above]
            own_variance = own_variance.index_copy(0, rows, total)
        return CoupledWidth(own_variance, shared)
