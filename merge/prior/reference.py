r"""Prior of an amplitude from a model's |F_calc|, and how far the model is to be believed.

    E = sigma_A E_calc + rest of variance 1 - sigma_A^2    (complex)

(Srinivasan & Parthasarathy 1976, Some Statistical Applications in X-ray Crystallography), so that
F = |E| sqrt(epsilon Sigma), with its phase unknown, follows Rice's law (acentric) or the folded
normal (centric) about D F_calc = sigma_A E_calc sqrt(epsilon Sigma) with
S = epsilon Sigma (1 - sigma_A^2) (Read 1990, Acta Cryst. A46, 900). E_calc is F_calc over its own
mean, so that scale, B and anisotropy of the model do not matter.

sigma_A^2(d) is no parameter of the ELBO, see :mod:`braggflux.merge.fit.sigma_a`. At sigma_A = 0
this is Wilson's prior, so that a wrong model does nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.prior.wilson import WilsonPrior, hat_design

#: Nodes for the mean of the slowly varying factor of the density.
N_NODES = 2
N_ROUNDS = 20


class ReferencePrior(nn.Module):
    """Rice or folded normal about the model's amplitude; unused until :meth:`set_model`.

    Parameters
    ----------
    inv_d2 : Tensor, (R,)
        [1/A^2]
    is_centric : Tensor, (R,) bool
    n_shells : int
        Resolution shells of sigma_A^2, which is linear in 1/d^2 between their centres.
    """

    def __init__(self, inv_d2: Tensor, is_centric: Tensor, n_shells: int) -> None:
        super().__init__()
        share = (torch.arange(n_shells, dtype=torch.float64) + 0.5) / n_shells
        edges = torch.arange(1, n_shells, dtype=torch.float64) / n_shells
        self.register_buffer("design", hat_design(inv_d2, torch.quantile(inv_d2, share)))
        shell = torch.bucketize(inv_d2, torch.quantile(inv_d2, edges))
        self.register_buffer("shell", shell)
        self.register_buffer("is_centric", is_centric)
        self.register_buffer("e_calc", torch.full_like(inv_d2, torch.nan))
        self.register_buffer("sigma_a2", torch.zeros(n_shells, dtype=torch.float64))

    @property
    def rows(self) -> Tensor:
        """Rows that have an F_calc, (M,)."""
        return torch.nonzero(~self.e_calc.isnan())[:, 0]

    @torch.no_grad()
    def set_model(self, f_calc: Tensor, wilson: WilsonPrior) -> None:
        """Take |F_calc| of each row, (R,) on any scale; NaN where there is none."""
        f_calc = f_calc.to(self.e_calc)
        known = torch.isfinite(f_calc) & (f_calc >= 0)
        shape = torch.where(self.is_centric, 0.5, 1.0).double()
        mean = mean_intensity(wilson.full_design, f_calc**2 / wilson.epsilon, shape, known)
        e_calc = f_calc / (wilson.epsilon * mean).sqrt()
        self.e_calc.copy_(torch.where(known, e_calc, torch.nan))

    def conditional(self, rows: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """D F_calc and S of the given ``rows`` with epsilon Sigma = ``spread``, (M,) each."""
        share = self.design[rows] @ self.sigma_a2
        # not sqrt(share * spread), whose gradient at share = 0 is no number
        return share.sqrt() * spread.sqrt() * self.e_calc[rows], (1 - share) * spread

    def kl(self, q: Nakagami, spread: Tensor, rows: Tensor) -> Tensor:
        """Divergence of the given rows, (M,); ``spread`` is epsilon Sigma of all, (R,)."""
        q = Nakagami(q.concentration[rows], q.spread[rows], validate_args=False)
        centre, variance = self.conditional(rows, spread[rows])
        # <(F - D F_calc)^2> written without cancellation
        square = (q.mean - centre) ** 2 + q.variance
        nodes, weights = q.intensity_nodes(N_NODES)
        x = 2 * nodes.sqrt() * centre / variance
        rice = (
            torch.log(2 / variance)
            + 0.5 * q.log_intensity_mean
            - square / variance
            + weights @ torch.special.i0e(x).log()
        )
        folded = -0.5 * (math.log(2 * math.pi) + variance.log() + square / variance)
        folded = folded + weights @ torch.log1p(torch.exp(-x))
        return -q.entropy() - torch.where(self.is_centric[rows], folded, rice)

    def precision(self, spread: Tensor) -> Tensor:
        """Least precision of F that the model gives, 0 where there is none, (R,)."""
        rows = self.rows
        stiffness = torch.where(self.is_centric[rows], 1.0, 2.0)
        variance = self.conditional(rows, spread[rows])[1]
        return torch.zeros_like(spread).index_copy(0, rows, stiffness / variance)


@torch.no_grad()
def mean_intensity(design: Tensor, intensity: Tensor, shape: Tensor, known: Tensor) -> Tensor:
    """Mean of Gamma-distributed intensities whose logarithm is linear in ``design``, (R,).

    Maximum likelihood by Fisher scoring.

    Parameters
    ----------
    design : Tensor, (R, m)
    intensity, shape : Tensor, (R,)
        ``shape`` is 1 for acentric and 1/2 for centric reflections.
    known : Tensor, (R,) bool
    """
    x, y, k = design[known], intensity[known], shape[known]
    ridge = 1e-6 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    information = (x * k[:, None]).T @ x + ridge
    floor = 1e-6 * y.mean()
    coefficients = torch.linalg.solve(information, x.T @ (k * (y.clamp_min(floor).log() + 0.577)))
    for _ in range(N_ROUNDS):
        score = x.T @ (k * (y * torch.exp(-x @ coefficients) - 1))
        step = torch.linalg.solve(information, score)
        coefficients = coefficients + step.clamp(-1.0, 1.0)
    return torch.exp(design @ coefficients)
