"""Error that observations of one reflection on one image share across datasets: a *cluster*.

Absorption, shadows, beam and position on the crystal are the same for all of them, so that most of
this error cancels in their difference. Of relative size s, it makes the covariance of a cluster

    diag(D) + (s m)(s m)^T,

whose inverse and determinant are rank-one updates. s may depend on the place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from braggflux.merge.data.measurement import Comparison
from braggflux.merge.likelihood.error_model import error_parameter
from braggflux.merge.likelihood.expectation import Expectation


class CommonError(nn.Module):
    """Size of the error in common.

    Parameters
    ----------
    is_modelled : bool
        Otherwise there is none.
    """

    def __init__(self, is_modelled: bool) -> None:
        super().__init__()
        self.register_buffer("is_modelled", torch.tensor(is_modelled))
        self.log_common = error_parameter(math.log(0.03), is_modelled)
        self._is_modelled = is_modelled  # the same on the host: asked for in every step
        self.register_load_state_dict_post_hook(CommonError._read_flag)  # type: ignore[no-untyped-call]

    def _read_flag(self, _keys: object) -> None:
        self._is_modelled = bool(self.is_modelled)

    def forward(self, expected: Tensor, log_relative: Tensor | None) -> Tensor:
        """Error s m, (N,); 0 where none is modelled."""
        if not self._is_modelled:
            return torch.zeros_like(expected)
        log_error = self.log_common if log_relative is None else self.log_common + log_relative
        return log_error.clamp_max(1.0).exp() * expected

    @property
    def values(self) -> dict[str, float]:
        """Values for the log."""
        if not self.is_modelled:
            return {}
        return {"common_error": float(self.log_common.detach().exp())}


class Misfit(NamedTuple):
    """Mahalanobis distance E[z^2], log-determinant of the covariance, and size, (C,) each."""

    z2: Tensor
    log_det: Tensor
    n: Tensor


def correlated(
    comparison: Comparison, expected: Expectation, density_variance: Tensor, cluster: Tensor
) -> Misfit:
    """Misfit of each cluster, with Sherman and Morrison."""
    spread, variance, residual = expected.spread, expected.variance, comparison.residual
    common = torch.zeros_like(variance) if expected.common is None else expected.common
    terms = [
        comparison.square / variance,
        density_variance.log(),
        torch.ones_like(variance),
        common * residual / variance,
        common**2 / variance,
        common**2 * spread / variance**2,
    ]
    z2, log_det, n, slope, weight, noise = _by_cluster(terms, cluster)
    gain = 1 + weight
    misfit = Misfit(z2 - (slope**2 + noise) / gain, log_det + gain.log(), n)
    if expected.shared is None:
        return misfit
    return _correlated_twice(misfit, residual, common, expected.shared, variance, cluster)


def _correlated_twice(
    misfit: Misfit,
    residual: Tensor,
    common: Tensor,
    shared: Tensor,
    variance: Tensor,
    cluster: Tensor,
) -> Misfit:
    """Add shared shared^T to a covariance that holds common common^T: a second update."""
    terms = (common * residual, common**2, shared * residual, shared**2, common * shared)
    cr, cc, sr, ss, cs = _by_cluster([v / variance for v in terms], cluster)
    # products with the inverse of diag(D) + common common^T
    sr, ss = sr - cs * cr / (1 + cc), ss - cs**2 / (1 + cc)
    return Misfit(misfit.z2 - sr**2 / (1 + ss), misfit.log_det + ss.log1p(), misfit.n)


def _by_cluster(terms: list[Tensor], cluster: Tensor) -> list[Tensor]:
    n = int(cluster[-1]) + 1
    return [
        torch.zeros(n, dtype=t.dtype, device=t.device).index_add_(0, cluster, t) for t in terms
    ]
