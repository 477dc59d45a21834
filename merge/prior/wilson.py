r"""Wilson's prior with a learned mean intensity, and double-Wilson coupling of Bijvoet mates.

Wilson (1949): F ~ Nakagami(1, epsilon Sigma(d)), acentric, or Nakagami(1/2, epsilon Sigma(d)),
centric. Sigma(d) is a spline in 1/d^2, learned in the logarithm: over a data set it spans decades.
Where asked for, a tensor makes it Sigma(h), see :mod:`braggflux.merge.prior.anisotropy`.

Double-Wilson (Read 1990, Acta Cryst. A46, 900, for the conditional; Hekstra et al. 2025 for its
use in merging): given F(+), an acentric F(-) follows Rice's law,

    p(F- | F+) = 2 F- / S exp(-(F-^2 + r^2 F+^2) / S) I_0(2 r F+ F- / S),
    S = epsilon Sigma (1 - r^2).

r(d) comes from the data by the correlation of half-set Bijvoet differences (empirical Bayes, see
``braggflux.merge.prior.mate_correlation``): r must not be learned by gradient with F, its
likelihood there runs to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.prior.anisotropy import B_SD

#: Variance of the logarithm of an exponentially distributed intensity, pi^2 / 6.
LOG_VARIANCE = 1.645


class WilsonPrior(nn.Module):
    """Mean intensity against resolution, and the prior of every unique reflection.

    Parameters
    ----------
    inv_d2 : Tensor, (R,)
        1/d^2 of the unique reflections [1/A^2].
    epsilon : Tensor, (R,)
        Statistical weight, without centring.
    is_centric : Tensor, (R,) bool
    n_knots : int
    anisotropic_design : Tensor, (R, m), optional
        Of :func:`braggflux.merge.prior.anisotropy.anisotropic_design` [1/A^2]; Sigma depends on d
        alone without it, or with m = 0.
    """

    def __init__(
        self,
        inv_d2: Tensor,
        epsilon: Tensor,
        is_centric: Tensor,
        n_knots: int,
        anisotropic_design: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("epsilon", epsilon.double())
        self.register_buffer("is_centric", is_centric)
        # knots at equal numbers of reflections: each is determined alike
        knots = torch.quantile(inv_d2.double(), torch.linspace(0, 1, n_knots, dtype=torch.float64))
        self.register_buffer("knots", knots, persistent=False)
        self.register_buffer("design", hat_design(inv_d2.double(), knots))
        self.log_sigma = nn.Parameter(torch.zeros(n_knots, dtype=torch.float64))
        self.anisotropy, self.b_unit = None, 1.0
        if anisotropic_design is not None and anisotropic_design.shape[1]:
            # a unit is a quarter in the log at the resolution limit: all reflections together
            # determine it, so that its steps must be smaller than those of the knots
            self.b_unit = 0.5 / float(inv_d2.max())
            self.register_buffer("tensor_design", self.b_unit * anisotropic_design.double())
            zeros = torch.zeros(anisotropic_design.shape[1], dtype=torch.float64)
            self.anisotropy = nn.Parameter(zeros)

    @property
    def full_design(self) -> Tensor:
        """What log Sigma is linear in: knots, then tensors, (R, n_knots + m)."""
        if self.anisotropy is None:
            return self.design
        return torch.cat([self.design, self.tensor_design], -1)

    def wilson_sigma(self) -> Tensor:
        """<F^2 / epsilon> of each unique reflection, (R,)."""
        log_sigma = self.design @ self.log_sigma
        if self.anisotropy is not None:
            log_sigma = log_sigma + self.tensor_design @ self.anisotropy
        return torch.exp(log_sigma)

    def anisotropic_b(self) -> Tensor:
        """Coefficients of the tensors, (m,) [A^2]."""
        if self.anisotropy is None:
            return self.log_sigma.detach().new_zeros(0)
        return self.b_unit * self.anisotropy.detach()

    def penalty(self) -> Tensor:
        """Minus the log-prior of the tensor, up to a constant, () [nats]."""
        if self.anisotropy is None:
            return self.log_sigma.new_zeros(())
        return 0.5 * ((self.b_unit / B_SD * self.anisotropy) ** 2).sum()

    def p_structure_factor(self) -> Nakagami:
        """Wilson's distribution of each unique reflection, (R,)."""
        k = torch.where(self.is_centric, 0.5, 1.0).to(self.epsilon.dtype)
        return Nakagami(k, self.epsilon * self.wilson_sigma(), validate_args=False)

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


class DoubleWilsonPrior(nn.Module):
    """Wilson for F(+) and centrics, Rice given F(+) for F(-).

    Parameters
    ----------
    wilson : WilsonPrior
    plus_row, minus_row : Tensor, (P,) int64
        Rows of each group of Bijvoet mates; equal where the group has one row.
    shell : Tensor, (P,) int64
        Resolution shell of each group.
    n_shells : int
    """

    def __init__(
        self,
        wilson: WilsonPrior,
        plus_row: Tensor,
        minus_row: Tensor,
        shell: Tensor,
        n_shells: int,
        coupled: bool,
    ) -> None:
        super().__init__()
        self.wilson = wilson
        self.coupled = coupled
        self.register_buffer("plus_row", plus_row)
        self.register_buffer("minus_row", minus_row)
        self.register_buffer("has_mate", plus_row != minus_row)
        self.register_buffer("shell", shell)
        # 1 - r^2; 0.02: Bijvoet differences of a tenth, more than all but a few crystals have
        self.register_buffer("one_minus_r2", torch.full((n_shells,), 0.02, dtype=torch.float64))

    def conditional_variance(self) -> Tensor:
        """S = epsilon Sigma (1 - r^2) of each group, (P,)."""
        sigma = (self.wilson.epsilon * self.wilson.wilson_sigma())[self.plus_row]
        return sigma * self.one_minus_r2[self.shell]

    def kl(self, q: Nakagami) -> Tensor:
        """KL[q(F+) q(F-) || p(F+) p(F- | F+)] of each group, (P,)."""
        alone = kl_divergence(q, self.wilson.p_structure_factor())
        first = alone[self.plus_row]
        if self.coupled:
            second = self._conditional_kl(q)
        else:
            second = alone[self.minus_row]
        return first + torch.where(self.has_mate, second, 0.0)

    def _conditional_kl(self, q: Nakagami) -> Tensor:
        """<KL[q(F-) || Rice(r F+, S)]> over q(F+); I_0's slow factor at the mean amplitudes."""
        plus, minus = self.plus_row, self.minus_row
        variance = self.conditional_variance()
        r = (1 - self.one_minus_r2[self.shell]).sqrt()
        mean_plus, mean_minus = q.mean[plus], q.mean[minus]
        product = mean_plus * mean_minus
        # <(F- - r F+)^2> written without cancellation
        square = (mean_minus - r * mean_plus) ** 2 + q.variance[minus] + r**2 * q.variance[plus]
        log_rice = (
            torch.log(2 / variance)
            + 0.5 * q.log_intensity_mean[minus]
            - square / variance
            + torch.log(torch.special.i0e(2 * r * product / variance))
        )
        return -q.entropy()[minus] - log_rice


def hat_design(x: Tensor, knots: Tensor) -> Tensor:
    """Linear interpolation on ``knots`` as a matrix, (N, n_knots); constant beyond the ends."""
    if len(knots) == 1:
        return torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    x = x.clamp(knots[0], knots[-1])
    right = torch.searchsorted(knots, x).clamp(1, len(knots) - 1)
    width = (knots[right] - knots[right - 1]).clamp_min(1e-12)
    share = (x - knots[right - 1]) / width
    design = torch.zeros(len(x), len(knots), dtype=x.dtype, device=x.device)
    design.scatter_(1, right[:, None] - 1, (1 - share)[:, None])
    design.scatter_add_(1, right[:, None], share[:, None])
    return design
