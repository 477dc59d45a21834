r"""Likelihood of measured intensities with an error model, in closed form under q(F).

    I_i ~ Student-t(m_i, D_i, dof) or Normal(m_i, D_i),    m_i = sum over harmonics of K F^2
    D_i = sdfac^2 (sigma_i^2 + sdB m_i + (sdadd m_i)^2)        (Evans 2006, Acta Cryst. D62, 72)

plus, for observations of one reflection on one image in several datasets (a *cluster*), an error
``s_i m_i`` that they have in common: absorption, shadows, beam and position on the crystal are the
same, so that most of it cancels in their difference. Then D becomes diag(D) + (s m)(s m)^T, whose
inverse and determinant are rank-one updates. s may depend on the place.

Student's t is a Normal with a random precision. With its optimal Gamma posterior the expected
log-likelihood needs only the mean and the variance ``v_i`` of K F^2 under q,

    E log p >= log c - 1/2 log|D| - (dof + n) / 2 log(1 + E[z^2] / dof),

a lower bound of the ELBO, exact for the Normal: no sampling and no quadrature.

Where the scale model gives log-odds that a spot is *blank* (in a shadow, on a dead module:
predicted and integrated, but without a photon of its own), the density is a mixture with
Normal(0, sigma_i^2), and with intensities that are usual at that resolution and scale, for *stray*
spots: harmonics outside the range, overlaps, wrong indices. The spots of a cluster are at one
place, and blank or stray together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MIN_VARIANCE = 0.05  # least share of sigma^2 that a negative sdB may leave
STRAY_NORM = math.log(math.pi * math.sqrt(3.0) / 2)  # of Student's t, 3 degrees of freedom
STRAY_LOG_ODDS = -6.0  # before anything is learned


@dataclass(frozen=True)
class NotTheSpot:
    """What else may have been measured, (N,) each.

    Parameters
    ----------
    blank : Tensor
        Log-density of the intensity, were there no spot.
    blank_log_odds : Tensor
        Of being blank, before the intensity is known.
    stray : Tensor
        Log-density of the intensity, were it another reflection's.
    """

    blank: Tensor
    blank_log_odds: Tensor
    stray: Tensor

    @classmethod
    def of(
        cls, intensity: Tensor, sigma: Tensor, log_odds: Tensor | None, usual: Tensor
    ) -> NotTheSpot | None:
        """Give densities of blanks and of spots as strong as is ``usual`` there, (N,) each.

        None without odds.
        """
        if log_odds is None:
            return None
        blank = -0.5 * (intensity / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
        width = (sigma**2 + usual**2).sqrt()
        # Student's t of 3 degrees of freedom: an intensity has a long tail
        stray = -2 * torch.log1p((intensity / width) ** 2 / 3) - width.log() - STRAY_NORM
        return cls(blank, log_odds, stray)

    def by_cluster(self, cluster: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the log-densities and average the log-odds of each cluster, (C,)."""
        if cluster is None:
            return self.blank, self.blank_log_odds, self.stray
        n = int(cluster[-1]) + 1
        blank, odds, stray, count = (
            torch.zeros(n, dtype=v.dtype, device=v.device).index_add(0, cluster, v)
            for v in (self.blank, self.blank_log_odds, self.stray, torch.ones_like(self.stray))
        )
        return blank, odds / count, stray


class IntensityLikelihood(nn.Module):
    """Error model and its tail.

    Parameters
    ----------
    is_normal : bool
    dof : float or None
        Degrees of freedom; learned from 16 when None.
    has_error_model, has_common_error : bool
    sigma_unit : float
        Typical sigma, the unit of sdB.
    """

    def __init__(
        self,
        is_normal: bool,
        dof: float | None,
        has_error_model: bool,
        has_common_error: bool,
        sigma_unit: float,
    ) -> None:
        super().__init__()
        self.is_normal = is_normal
        self.sigma_unit = sigma_unit
        self.has_common_error = has_common_error

        def parameter(value: float, is_learned: bool) -> nn.Parameter:
            return nn.Parameter(torch.tensor(value, dtype=torch.float64), is_learned)

        self.log_sdfac = parameter(0.0, has_error_model)
        self.sdb = parameter(0.0, has_error_model)
        self.log_sdadd = parameter(math.log(0.03) if has_error_model else -20.0, has_error_model)
        self.log_common = parameter(math.log(0.03), has_common_error)
        self.stray_log_odds = parameter(STRAY_LOG_ODDS, True)
        self.log_dof = parameter(math.log(dof or 16.0), dof is None and not is_normal)

    @property
    def error_parameters(self) -> dict[str, float]:
        """Values for the log."""
        values = {
            "sdfac": float(self.log_sdfac.detach().exp()),
            "sdb": float(self.sdb.detach()) * self.sigma_unit,
            "sdadd": float(self.log_sdadd.detach().exp()),
        }
        if self.has_common_error:
            values["common_error"] = float(self.log_common.detach().exp())
        if not self.is_normal:
            values["dof"] = float(self.dof.detach())
        return values

    @property
    def dof(self) -> Tensor:
        """Degrees of freedom, above 2: the variance exists."""
        return self.log_dof.clamp(math.log(2.05), 8.0).exp()

    def variance(self, sigma: Tensor, expected: Tensor, relative: Tensor | None) -> Tensor:
        """D, (N,); ``relative`` (N,) is a further error in units of ``expected``."""
        floor = MIN_VARIANCE * sigma**2
        share = (2 * self.log_sdadd.clamp_max(2.0)).exp()
        if relative is not None:
            share = share + relative**2
        total = sigma**2 + self.sdb * self.sigma_unit * expected + share * expected**2
        return (2 * self.log_sdfac).exp() * torch.maximum(total, floor)

    def common(self, expected: Tensor, log_relative: Tensor | None) -> Tensor:
        """Error s m that the observations of a cluster share, (N,); 0 where none is modelled."""
        if not self.has_common_error:
            return torch.zeros_like(expected)
        log_error = self.log_common if log_relative is None else self.log_common + log_relative
        return log_error.clamp_max(1.0).exp() * expected

    def forward(
        self,
        residual: Tensor,
        common: Tensor,
        spread: Tensor,
        variance: Tensor,
        cluster: Tensor | None,
        other: NotTheSpot | None = None,
        shared: Tensor | None = None,
    ) -> Tensor:
        """Bound of the expected log-density of each cluster, (C,); of each observation without.

        Parameters
        ----------
        residual, common, spread, variance : Tensor, (N,)
            I - m, s m, v = Var[K F^2] under q, and D.
        cluster : Tensor, (N,) int64, or None
            0 .. C - 1, not decreasing.
        other : NotTheSpot, optional
        shared : Tensor, (N,), optional
            Deviation of a cluster's observations because the root of their amplitudes is
            uncertain: another error in common. Without clusters it belongs to ``variance``.
        """
        density = self._of_spots(residual, common, spread, variance, cluster, shared)
        if other is None:
            return density
        return torch.logaddexp(density, self._of_other(other, cluster)) - self._log_total(
            other, cluster
        )

    def _of_other(self, other: NotTheSpot, cluster: Tensor | None) -> Tensor:
        """Log-density of all that is no spot, relative to odds of 1 for the spot, (C,)."""
        blank, log_odds, stray = other.by_cluster(cluster)
        return torch.logaddexp(blank + log_odds, stray + self.stray_log_odds)

    def _log_total(self, other: NotTheSpot, cluster: Tensor | None) -> Tensor:
        """Log of the sum of the odds, (C,)."""
        log_odds = other.by_cluster(cluster)[1]
        return torch.log1p(log_odds.exp() + self.stray_log_odds.exp())

    def _of_spots(
        self,
        residual: Tensor,
        common: Tensor,
        spread: Tensor,
        variance: Tensor,
        cluster: Tensor | None,
        shared: Tensor | None = None,
    ) -> Tensor:
        if shared is not None and cluster is None:
            variance = variance + shared**2
        z2 = (residual**2 + spread) / variance
        log_det = variance.log()
        n = torch.ones_like(z2)
        if cluster is not None:
            z2, log_det, n = self._correlated(residual, common, spread, variance, cluster)
            if shared is not None:
                z2, log_det = self._correlated_twice(
                    z2, log_det, residual, common, shared, variance, cluster
                )
        if self.is_normal:
            return -0.5 * (z2 + log_det + n * math.log(2 * math.pi))
        dof = self.dof
        norm = torch.lgamma((dof + n) / 2) - torch.lgamma(dof / 2)
        norm = norm - 0.5 * n * torch.log(math.pi * dof)
        return norm - 0.5 * log_det - 0.5 * (dof + n) * torch.log1p(z2 / dof)

    def _correlated(
        self, residual: Tensor, common: Tensor, spread: Tensor, variance: Tensor, cluster: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum E[z^2], log-determinant and size by cluster, with Sherman and Morrison."""
        n_clusters = int(cluster[-1]) + 1
        terms = [
            (residual**2 + spread) / variance,
            variance.log(),
            torch.ones_like(variance),
            common * residual / variance,
            common**2 / variance,
            common**2 * spread / variance**2,
        ]
        z2, log_det, n, slope, weight, noise = (
            torch.zeros(n_clusters, dtype=t.dtype, device=t.device).index_add_(0, cluster, t)
            for t in terms
        )
        gain = 1 + weight
        return z2 - (slope**2 + noise) / gain, log_det + gain.log(), n

    def _correlated_twice(
        self,
        z2: Tensor,
        log_det: Tensor,
        residual: Tensor,
        common: Tensor,
        shared: Tensor,
        variance: Tensor,
        cluster: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Add shared shared^T to a covariance that holds common common^T: a second update."""
        n = len(z2)
        cr, cc, sr, ss, cs = (
            torch.zeros(n, dtype=v.dtype, device=v.device).index_add_(0, cluster, v / variance)
            for v in (common * residual, common**2, shared * residual, shared**2, common * shared)
        )
        # products with the inverse of diag(D) + common common^T
        sr, ss = sr - cs * cr / (1 + cc), ss - cs**2 / (1 + cc)
        return z2 - sr**2 / (1 + ss), log_det + ss.log1p()

    @torch.no_grad()
    def weight(self, residual: Tensor, variance: Tensor) -> Tensor:
        """Give the expected precision of each observation times D, (N,): small for outliers."""
        if self.is_normal:
            return torch.ones_like(residual)
        dof = self.dof
        return (dof + 1) / (dof + residual**2 / variance)

    @torch.no_grad()
    def share_of_spots(
        self,
        residual: Tensor,
        common: Tensor,
        spread: Tensor,
        variance: Tensor,
        cluster: Tensor | None,
        other: NotTheSpot | None,
    ) -> Tensor:
        """Probability of each observation to be its own spot, (N,)."""
        if other is None:
            return torch.ones_like(residual)
        density = self._of_spots(residual, common, spread, variance, cluster)
        share = torch.sigmoid(density - self._of_other(other, cluster))
        return share if cluster is None else share[cluster]
