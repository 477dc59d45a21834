r"""Difference of Bijvoet mates that a prior ties: DANO, SIGDANO and their figure of merit.

Where mates are all that is tied, mean and standard deviation of |F+| - |F-| are those of the joint
posterior given the mean intensities of the two (:mod:`braggflux.merge.output.pair_posterior`).
Where datasets have parents, relatives of relatives matter too, and q(F) is what is known of all:

    DANO = <F(+)> - <F(-)>,    SIGDANO^2 = own(+) + own(-) + (shared(+) - shared(-))^2,

with the own variances and what both share with the root of their tree
(:class:`braggflux.merge.prior.base.CoupledWidth`). Either way a difference is better known than
each of the two.

Figure of merit, of mates alone: the share of the difference's variance that the data have told,

    m = 1 - SIGDANO^2 / V,    V = epsilon Sigma (1 - r^2) / 2,

V: mean square of the true differences. For strong data it is Wiener's V / (V + sigma^2), sigma the
error of F(+) - F(-), and DANO = m (F(+) - F(-)): as the centroid map of Blow & Crick (1959, Acta
Cryst. 12, 794) has m |F|. The mean of m over a shell is the square of the correlation to expect
between DANO and the true differences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.pair_posterior import Pairs, posterior_difference
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.reference import model_prior


@dataclass(frozen=True)
class CoupledDifference:
    """|F(+)| - |F(-)| at the rows of F(+), (R,) each, in units of the merger; NaN for none.

    Parameters
    ----------
    value, sigma : Tensor, (R,)
        Posterior mean and standard deviation.
    merit : Tensor, (R,)
        Figure of merit, at most 1; below 0 where data and prior contradict each other.
    """

    value: Tensor
    sigma: Tensor
    merit: Tensor

    @classmethod
    def nothing(cls, like: Tensor) -> CoupledDifference:
        """NaN for every row, (R,) as ``like``."""
        return cls(*(torch.full_like(like, torch.nan) for _ in range(3)))


def ties_mates_only(merger: Merger) -> bool:
    """Whether the prior couples Bijvoet mates and no datasets."""
    return merger.prior.is_coupled and not merger.unique.ties_datasets


@torch.no_grad()
def coupled_difference(merger: Merger, intensity: Tensor, sigma: Tensor) -> CoupledDifference:
    """Posterior of |F(+)| - |F(-)| where the prior ties the two.

    Parameters
    ----------
    merger : Merger
        Fitted.
    intensity, sigma : Tensor, (R,)
        Mean intensity of each row and its standard deviation, in units of the merger; NaN for
        none.
    """
    if ties_mates_only(merger):
        return difference_of_pairs(merger, intensity, sigma)
    if merger.prior.is_coupled:
        return difference_in_trees(merger, merger.inference())
    return CoupledDifference.nothing(intensity)


def difference_of_pairs(merger: Merger, intensity: Tensor, sigma: Tensor) -> CoupledDifference:
    """Posterior of pairs that nothing else is tied to; see :func:`coupled_difference`."""
    prior, found = merger.prior.part(DoubleWilson), CoupledDifference.nothing(intensity)
    seen = torch.isfinite(intensity)[torch.stack([prior.parent, prior.child])].all(0)
    plus, both = prior.parent[seen], torch.stack([prior.parent[seen], prior.child[seen]])
    rice = prior.conditional()[1][seen]
    model = model_prior(merger.prior) or (found.value, found.value)
    pairs = Pairs(
        intensity[both], sigma[both], prior.spread()[plus], rice, *(x[plus] for x in model)
    )
    found.value[plus], found.sigma[plus] = posterior_difference(pairs)
    found.merit[plus] = 1 - found.sigma[plus] ** 2 / (0.5 * rice)
    return found


def difference_in_trees(merger: Merger, q: Nakagami) -> CoupledDifference:
    """Difference of q's means, with the uncertainty of all relatives."""
    found = CoupledDifference.nothing(q.mean)
    minus = torch.nonzero(merger.joined != torch.arange(len(q.mean), device=q.mean.device))[:, 0]
    minus = minus[merger.group[minus] == merger.group[merger.joined[minus]]]
    plus, width = merger.joined[minus], merger.prior.width(q, merger.information)
    own = width.own_variance[plus] + width.own_variance[minus]
    found.value[plus] = q.mean[plus] - q.mean[minus]
    found.sigma[plus] = (own + (width.shared[plus] - width.shared[minus]) ** 2).sqrt()
    return found
