"""Scale of observations, and what depends on their place: the answer of a scale model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """Scale of each term of a batch, and what depends on the place of each observation.

    Parameters
    ----------
    log_k : Tensor, (T,)
        Of K in I = K F^2.
    relative_error : Tensor, (N,), or None
        In units of the expected intensity.
    blank_log_odds : Tensor, (N,), or None
        Of a place where no spot was recorded.
    log_common : Tensor, (N,), or None
        Log of the error that a cluster has in common, relative to its mean over all.
    """

    log_k: Tensor
    relative_error: Tensor | None = None
    blank_log_odds: Tensor | None = None
    log_common: Tensor | None = None
