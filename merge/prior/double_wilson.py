r"""Wilson's prior for rows without a parent, double-Wilson for those with one.

    p(F) = Wilson(epsilon Sigma(h)), or about that of a model
    p(F | F_parent) = Rice (acentric) or folded normal (centric) about r F_parent with
                      S = epsilon Sigma (1 - r^2)

The formulas and the reasons are those of :mod:`braggflux.merge.prior.wilson`, those of the model's
prior in :mod:`braggflux.merge.prior.reference`; here the parents form trees over any number of
datasets (Hekstra et al. 2025), and r is a constant per resolution shell that
:mod:`braggflux.merge.fit.held_out_correlation` chooses by held-out data.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.prior.anisotropy import anisotropic_design, invariant_tensors
from braggflux.merge.prior.reference import ReferencePrior
from braggflux.merge.prior.wilson import WilsonPrior
from braggflux.merge.rows import UniqueRows


class TreePrior(nn.Module):
    """Prior of all rows.

    Parameters
    ----------
    unique : UniqueRows
    n_knots : int
        Of Sigma(d), which all datasets share: they are merged on one scale.
    n_shells : int
        Resolution shells of r, equally many rows each.
    is_anisotropic : bool
        Sigma depends on the direction too, alike for all datasets.
    n_reference_shells : int
        Resolution shells of sigma_A.
    """

    def __init__(
        self,
        unique: UniqueRows,
        n_knots: int,
        n_shells: int,
        is_anisotropic: bool = False,
        n_reference_shells: int = 10,
    ) -> None:
        super().__init__()
        tensors = [invariant_tensors(a.cell, a.space_group) for a in unique.asus]
        self.register_buffer("tensors", torch.as_tensor(tensors[0]), persistent=False)
        designs = [anisotropic_design(a, t) for a, t in zip(unique.asus, tensors, strict=True)]
        self.wilson = WilsonPrior(
            torch.as_tensor(unique.d) ** -2.0,
            torch.as_tensor(unique.epsilon),
            torch.as_tensor(unique.is_centric),
            n_knots,
            torch.as_tensor(np.concatenate(designs)) if is_anisotropic else None,
        )
        self.reference = ReferencePrior(
            torch.as_tensor(unique.d) ** -2.0, self.wilson.is_centric, n_reference_shells
        )
        self.register_buffer("child", torch.as_tensor(np.flatnonzero(unique.parent >= 0)))
        self.register_buffer("parent", torch.as_tensor(unique.parent[unique.parent >= 0]))
        order = np.argsort(np.argsort(-unique.d, kind="stable"), kind="stable")
        shell = torch.as_tensor(order * n_shells // len(order))
        self.register_buffer("shell", shell)  # (R,)
        total, n = (np.bincount(shell, w, n_shells) for w in (unique.d**-2.0, None))
        mean = torch.as_tensor(np.where(n > 0, total / np.maximum(n, 1), np.mean(unique.d**-2.0)))
        self.register_buffer("shell_inv_d2", mean, persistent=False)  # (n_shells,) [1/A^2]
        self.register_buffer("one_minus_r2", torch.full((n_shells,), 0.01, dtype=torch.float64))
        self.is_coupled = False

    @property
    def correlation(self) -> Tensor:
        """R of every shell."""
        return (1 - self.one_minus_r2).sqrt()

    def anisotropic_b(self) -> Tensor | None:
        """Traceless tensor B of the intensities, (3, 3) Cartesian [A^2]; None where isotropic."""
        coefficients = self.wilson.anisotropic_b()
        if not len(coefficients):
            return None
        return torch.einsum("m,mij->ij", coefficients, self.tensors)

    def spread(self) -> Tensor:
        """Mean of F^2 under Wilson's prior, epsilon Sigma, (R,)."""
        return self.wilson.epsilon * self.wilson.wilson_sigma()

    def stiffness(self, mean_square: Tensor) -> Tensor:
        """Curvature in log F^2 of the prior about a parent or a model, (R,); 0 for Wilson's."""
        stiffness = 0.25 * mean_square * self.reference.precision(self.spread())
        if self.is_coupled:
            stiffness[self.child] = 0.5 * mean_square[self.child] / self.conditional()[1]
        return stiffness

    def conditional(self) -> tuple[Tensor, Tensor]:
        """R and S of each child, (C,)."""
        share = self.one_minus_r2[self.shell[self.child]]
        sigma = self.spread()[self.child]
        return (1 - share).sqrt(), sigma * share

    def kl(self, q: Nakagami) -> Tensor:
        """Divergence of each row, (R,); that of a child is averaged over q of its parent."""
        alone = kl_divergence(q, self.wilson.p_structure_factor())
        rows = self.reference.rows
        if len(rows):
            alone = alone.index_copy(0, rows, self.reference.kl(q, self.spread(), rows))
        if not self.is_coupled:
            return alone
        return alone.index_copy(0, self.child, self._conditional_kl(q))

    def _conditional_kl(self, q: Nakagami) -> Tensor:
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
        log_p = torch.where(self.wilson.is_centric[child], folded, rice)
        return -q.entropy()[child] - log_p
