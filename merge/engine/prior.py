"""Double-Wilson prior of Bijvoet mates, for one crystal whose rows are F(+) and F(-)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.prior.wilson import Wilson


class DoubleWilsonPrior(nn.Module):
    """Wilson for F(+) and centrics, Rice given F(+) for F(-).

    Parameters
    ----------
    wilson : Wilson
    plus_row, minus_row : Tensor, (P,) int64
        Rows of each group of Bijvoet mates; equal where the group has one row.
    shell : Tensor, (P,) int64
        Resolution shell of each group.
    n_shells : int
    """

    def __init__(
        self,
        wilson: Wilson,
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
