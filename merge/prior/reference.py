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
from torch import Tensor

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.hat_functions import hat_design
from braggflux.merge.prior.base import AmplitudePrior, PriorOver
from braggflux.merge.prior.wilson import Wilson

#: Nodes for the mean of the slowly varying factor of the density.
N_NODES = 2
N_ROUNDS = 20


class Reference(PriorOver):
    """Rice's law or the folded normal about a model's amplitude.

    A model is not believed, and the prior below it stands, until sigma_A is set.

    Parameters
    ----------
    below : AmplitudePrior
    f_calc : Tensor, (R,)
        Amplitudes of the model on any scale; NaN where there is none.
    n_shells : int
        Resolution shells of sigma_A^2, which is linear in 1/d^2 between their centres.
    """

    design: Tensor
    shell: Tensor
    is_centric: Tensor
    e_calc: Tensor
    rows: Tensor
    sigma_a2: Tensor

    def __init__(self, below: AmplitudePrior, f_calc: Tensor, n_shells: int) -> None:
        super().__init__(below)
        wilson = below.part(Wilson)
        inv_d2 = wilson.inv_d2
        share = (torch.arange(n_shells, dtype=torch.float64) + 0.5) / n_shells
        edges = torch.arange(1, n_shells, dtype=torch.float64) / n_shells
        self.register_buffer("design", hat_design(inv_d2, torch.quantile(inv_d2, share)))
        shell = torch.bucketize(inv_d2, torch.quantile(inv_d2, edges))
        self.register_buffer("shell", shell)
        self.register_buffer("is_centric", wilson.is_centric)
        self.register_buffer("e_calc", normalised(f_calc, wilson))
        self.register_buffer("rows", torch.nonzero(~self.e_calc.isnan())[:, 0])  # (M,)
        self.register_buffer("sigma_a2", torch.zeros(n_shells, dtype=torch.float64))

    @property
    def is_believed(self) -> bool:
        """Whether the model says anything: sigma_A is above 0 in some shell."""
        return bool(self.sigma_a2.any())

    def conditional(self) -> tuple[Tensor, Tensor]:
        """D F_calc and S of the rows that have an F_calc, (M,) each."""
        spread = self.spread()[self.rows]
        share = self.design[self.rows] @ self.sigma_a2
        # not sqrt(share * spread), whose gradient at share = 0 is no number
        return share.sqrt() * spread.sqrt() * self.e_calc[self.rows], (1 - share) * spread

    def kl(self, q: Nakagami) -> Tensor:
        """Divergence of each row, (R,) [nats]."""
        alone = self.below.kl(q)
        if not self.is_believed:
            return alone
        return alone.index_copy(0, self.rows, self._conditional_kl(q))

    def _conditional_kl(self, q: Nakagami) -> Tensor:
        """Divergence of the rows that have an F_calc, (M,)."""
        q = Nakagami(q.concentration[self.rows], q.spread[self.rows], validate_args=False)
        centre, variance = self.conditional()
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
        return -q.entropy() - torch.where(self.is_centric[self.rows], folded, rice)

    def stiffness(self, mean_square: Tensor) -> Tensor:
        """Curvature in log F^2 about the model beside that of the prior below, (R,)."""
        return self.below.stiffness(mean_square) + 0.25 * mean_square * self._own_precision()

    def precision(self) -> Tensor:
        """Least precision of F that model or prior below give, (R,)."""
        return torch.maximum(self.below.precision(), self._own_precision())

    def _own_precision(self) -> Tensor:
        """Precision of F about the model, 0 where there is none or it is not believed, (R,)."""
        nothing = torch.zeros_like(self.e_calc)
        if not self.is_believed:
            return nothing
        stiffness = torch.where(self.is_centric[self.rows], 1.0, 2.0)
        return nothing.index_copy(0, self.rows, stiffness / self.conditional()[1])


@torch.no_grad()
def normalised(f_calc: Tensor, wilson: Wilson) -> Tensor:
    """|F_calc| over its own mean at each reflection's resolution and direction, (R,) or NaN."""
    f_calc = f_calc.to(wilson.epsilon)
    known = torch.isfinite(f_calc) & (f_calc >= 0)
    shape = torch.where(wilson.is_centric, 0.5, 1.0).double()
    mean = mean_intensity(wilson.full_design, f_calc**2 / wilson.epsilon, shape, known)
    e_calc = f_calc / (wilson.epsilon * mean).sqrt()
    return torch.where(known, e_calc, torch.nan)


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


def model_prior(prior: AmplitudePrior) -> tuple[Tensor, Tensor] | None:
    """Centre and variance of every row about a model's amplitude, (R,) each.

    NaN where the model has none; None where no model is the prior.
    """
    if not prior.has(Reference):
        return None
    reference = prior.part(Reference)
    centre = torch.full_like(prior.spread(), torch.nan)
    variance = centre.clone()
    centre[reference.rows], variance[reference.rows] = reference.conditional()
    return centre, variance
