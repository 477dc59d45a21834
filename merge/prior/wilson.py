r"""Wilson's prior with a learned mean intensity.

Wilson (1949): F ~ Nakagami(1, epsilon Sigma(d)), acentric, or Nakagami(1/2, epsilon Sigma(d)),
centric. Sigma(d) is a spline in 1/d^2, learned in the logarithm: over a data set it spans decades.
Where asked for, a tensor makes it Sigma(h), see :mod:`braggflux.merge.prior.anisotropy`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.hat_functions import hat_design
from braggflux.merge.prior.anisotropy import B_SD, anisotropic_design, invariant_tensors
from braggflux.merge.prior.base import AmplitudePrior
from braggflux.merge.rows import UniqueRows

#: Variance of the logarithm of an exponentially distributed intensity, pi^2 / 6.
LOG_VARIANCE = 1.645


class Wilson(AmplitudePrior):
    """Mean intensity against resolution, and the prior of every unique reflection.

    Parameters
    ----------
    inv_d2 : Tensor, (R,)
        1/d^2 of the unique reflections [1/A^2].
    epsilon : Tensor, (R,)
        Statistical weight, without centring.
    is_centric : Tensor, (R,) bool
    n_knots : int
    tensor_design : Tensor, (R, m), optional
        Of :func:`braggflux.merge.prior.anisotropy.anisotropic_design` [1/A^2]; Sigma depends on d
        alone without it, or with m = 0.
    tensors : Tensor, (m, 3, 3), optional
        Unit tensors B that ``tensor_design`` is of, Cartesian.
    """

    epsilon: Tensor
    is_centric: Tensor
    inv_d2: Tensor
    knots: Tensor
    design: Tensor
    tensors: Tensor
    tensor_design: Tensor

    def __init__(
        self,
        inv_d2: Tensor,
        epsilon: Tensor,
        is_centric: Tensor,
        n_knots: int,
        tensor_design: Tensor | None = None,
        tensors: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("epsilon", epsilon.double())
        self.register_buffer("is_centric", is_centric)
        self.register_buffer("inv_d2", inv_d2.double(), persistent=False)
        # knots at equal numbers of reflections: each is determined alike
        knots = torch.quantile(inv_d2.double(), torch.linspace(0, 1, n_knots, dtype=torch.float64))
        self.register_buffer("knots", knots, persistent=False)
        self.register_buffer("design", hat_design(inv_d2.double(), knots))
        self.log_sigma = nn.Parameter(torch.zeros(n_knots, dtype=torch.float64))
        self.anisotropy, self.b_unit = None, 1.0
        self.register_buffer("tensors", tensors, persistent=False)
        if tensor_design is not None and tensor_design.shape[1]:
            # a unit is a quarter in the log at the resolution limit: all reflections together
            # determine it, so that its steps must be smaller than those of the knots
            self.b_unit = 0.5 / float(inv_d2.max())
            self.register_buffer("tensor_design", self.b_unit * tensor_design.double())
            zeros = torch.zeros(tensor_design.shape[1], dtype=torch.float64)
            self.anisotropy = nn.Parameter(zeros)

    @classmethod
    def of_rows(cls, rows: UniqueRows, n_knots: int, is_anisotropic: bool = False) -> Wilson:
        """Prior of all rows, with one Sigma: datasets are merged on one scale.

        Parameters
        ----------
        rows : UniqueRows
        n_knots : int
        is_anisotropic : bool
            Sigma depends on the direction too, alike for all datasets.
        """
        design = tensors = None
        if is_anisotropic:
            own = [invariant_tensors(a.cell, a.space_group) for a in rows.asus]
            parts = [anisotropic_design(a, t) for a, t in zip(rows.asus, own, strict=True)]
            design, tensors = torch.as_tensor(np.concatenate(parts)), torch.as_tensor(own[0])
        return cls(
            torch.as_tensor(rows.d) ** -2.0,
            torch.as_tensor(rows.epsilon),
            torch.as_tensor(rows.is_centric),
            n_knots,
            design,
            tensors,
        )

    @property
    def full_design(self) -> Tensor:
        """Design matrix of log Sigma: knots, then tensors, (R, n_knots + m)."""
        if self.anisotropy is None:
            return self.design
        return torch.cat([self.design, self.tensor_design], -1)

    def wilson_sigma(self) -> Tensor:
        """<F^2 / epsilon> of each unique reflection, (R,)."""
        log_sigma = self.design @ self.log_sigma
        if self.anisotropy is not None:
            log_sigma = log_sigma + self.tensor_design @ self.anisotropy
        return torch.exp(log_sigma)

    def spread(self) -> Tensor:
        """Mean of F^2, epsilon Sigma, (R,)."""
        return self.epsilon * self.wilson_sigma()

    def tensor_coefficients(self) -> Tensor:
        """B along each unit tensor, (m,) [A^2]."""
        if self.anisotropy is None:
            return self.log_sigma.detach().new_zeros(0)
        return self.b_unit * self.anisotropy.detach()

    def anisotropic_b(self) -> Tensor | None:
        """Traceless tensor B of the intensities, (3, 3) Cartesian [A^2]; None where isotropic."""
        if self.anisotropy is None:
            return None
        return torch.einsum("m,mij->ij", self.tensor_coefficients(), self.tensors)

    def penalty(self) -> Tensor:
        """Minus the log-prior of the tensor, up to a constant, () [nats]."""
        if self.anisotropy is None:
            return self.log_sigma.new_zeros(())
        return 0.5 * ((self.b_unit / B_SD * self.anisotropy) ** 2).sum()

    def p_structure_factor(self) -> Nakagami:
        """Wilson's distribution of each unique reflection, (R,)."""
        k = torch.where(self.is_centric, 0.5, 1.0).to(self.epsilon.dtype)
        return Nakagami(k, self.spread(), validate_args=False)

    def kl(self, q: Nakagami) -> Tensor:
        """Divergence of each row, (R,) [nats]."""
        return kl_divergence(q, self.p_structure_factor())

    def stiffness(self, mean_square: Tensor) -> Tensor:
        """Zero: curvatures are counted beside Wilson's, (R,)."""
        return torch.zeros_like(mean_square)

    def precision(self) -> Tensor:
        """Inverse of the variance of F, (R,)."""
        return 1 / self.p_structure_factor().variance

    @torch.no_grad()
    def start(self, intensity: Tensor, is_observed: Tensor) -> None:
        """Start from merged intensities (R,): ridge regression of log(I / epsilon) on the knots.

        ``+ 0.577``: <log I> of an exponential law lies Euler's constant below log <I>.
        """
        known = is_observed & (intensity > 0)
        design = self.full_design[known]
        target = (intensity[known] / self.epsilon[known]).log() + 0.577
        n_knots = len(self.log_sigma)
        ridge = design.new_full((design.shape[1],), 1e-6)
        ridge[n_knots:] = LOG_VARIANCE * self.b_unit**2 / B_SD**2
        normal = design.T @ design + ridge.diag()
        solution = torch.linalg.solve(normal, design.T @ target)
        self.log_sigma.copy_(solution[:n_knots])
        if self.anisotropy is not None:
            self.anisotropy.copy_(solution[n_knots:])
