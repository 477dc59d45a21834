"""The objective: every fit (in memory, streamed, of amplitudes alone) maximises this one sum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MergeTerms:
    """Terms of the ELBO of one batch [nats], summed with their weights.

    Parameters
    ----------
    log_likelihood, kl_structure_factor, scale_penalty : Tensor, ()
    information : Tensor, (R,)
        The data's expected information of log <F^2> of each row, without gradients.
    row_weight : Tensor, (R,)
        Weight of each row's divergence, without gradients.
    observation_information : Tensor, (N,)
        Of each observation on its log K, without gradients; 0 where it is not used.
    """

    log_likelihood: Tensor
    kl_structure_factor: Tensor
    scale_penalty: Tensor
    information: Tensor
    row_weight: Tensor
    observation_information: Tensor


def elbo(terms: MergeTerms) -> Tensor:
    """Evidence lower bound, () [nats]; higher is better."""
    return terms.log_likelihood - terms.kl_structure_factor - terms.scale_penalty
