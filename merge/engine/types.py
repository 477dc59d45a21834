"""Records of the merge: observations bound to unique reflections, and the terms of the ELBO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.records import TensorRecord


@dataclass(frozen=True)
class MergeBatch(TensorRecord):
    """Observations as the merge sees them.

    Parameters
    ----------
    refl_id : Tensor, (B,) int64
        Row of the reciprocal asymmetric unit, >= 0.
    effective_counts, effective_background, exposure : Tensor, (B,)
        Photon-count likelihood, see ``braggflux.integrator.distributions.shifted_poisson``.
    scale_index : Tensor, (B,) int64
        Row of the scale model's table of precomputed features.
    """

    refl_id: Tensor
    effective_counts: Tensor
    effective_background: Tensor
    exposure: Tensor
    scale_index: Tensor

    @property
    def likelihood(self) -> ShiftedPoisson:
        """The photon-count likelihood as one object."""
        return ShiftedPoisson(self.effective_counts, self.effective_background, self.exposure)


@dataclass(frozen=True)
class MergeLoss:
    """Terms of the ELBO [nats].

    Parameters
    ----------
    log_likelihood : Tensor, (B,)
        Expected log-likelihood of each observation under q(F), relative to the maximum of its
        photon-count likelihood.
    kl_structure_factor : Tensor, (P,)
        Divergence of each group of Bijvoet mates, counted once however many observations.
    scale_penalty : Tensor, ()
        Minus the log-prior of the scale parameters.
    """

    log_likelihood: Tensor
    kl_structure_factor: Tensor
    scale_penalty: Tensor
