r"""Posterior of the difference of two Bijvoet mates, by quadrature over both amplitudes.

    p(F+, F- | data) ~ p(F+) p(F- | F+) N(I+; F+^2, sigma+^2) N(I-; F-^2, sigma-^2)

with Wilson's prior of F+, or that about a model's amplitude, and Rice's law of F- about r F+
(:mod:`braggflux.merge.prior.double_wilson`). The nodes are a square grid in the coordinates in
which a Normal of the two is round, at first that of strong data. The density on the nodes is the
exact one; its moments place the nodes of the next pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.merge.output.french_wilson import over_wilson

N_NODES = 32  # of each coordinate
REACH = 5.5  # of the grid, in standard deviations
N_PASSES = 4
#: Intensity of an amplitude that is not seen, in sigmas, to place the first nodes.
START = 0.3
PAIRS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Pairs:
    """Acentric Bijvoet pairs; F+ is first where there are both mates, (2, P).

    Parameters
    ----------
    intensity, sigma : Tensor, (2, P)
        Mean intensities and their standard deviations.
    expected : Tensor, (P,)
        epsilon Sigma of Wilson's prior.
    spread : Tensor, (P,)
        epsilon Sigma (1 - r^2), the variance S of Rice's law.
    model_centre, model_variance : Tensor, (P,)
        D F_calc and variance of a model's prior of F+; NaN for Wilson's.
    """

    intensity: Tensor
    sigma: Tensor
    expected: Tensor
    spread: Tensor
    model_centre: Tensor
    model_variance: Tensor

    def part(self, rows: slice) -> Pairs:
        """Return some of the pairs."""
        return Pairs(**{name: x[..., rows] for name, x in vars(self).items()})

    def log_density(self, plus: Tensor, minus: Tensor) -> Tensor:
        """Log of the posterior at amplitudes (Q, P), up to a constant of each pair."""
        i, sigma = self.intensity, self.sigma
        data = ((plus**2 - i[0]) / sigma[0]) ** 2 + ((minus**2 - i[1]) / sigma[1]) ** 2
        r = (1 - self.spread / self.expected).sqrt()
        x = 2 * r * plus * minus / self.spread
        prior = (plus * minus).log() - plus**2 / self.expected
        prior = prior - (minus - r * plus) ** 2 / self.spread + torch.special.i0e(x).log()
        if bool(torch.isfinite(self.model_centre).any()):
            is_centric = torch.zeros_like(self.expected, dtype=torch.bool)
            model = is_centric, self.model_centre, self.model_variance
            prior = prior + over_wilson(plus.T, self.expected, *model).T
        return prior - 0.5 * data


def posterior_difference(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of F+ - F-, (P,) each."""
    found = torch.empty_like(pairs.intensity)
    for first in range(0, found.shape[1], PAIRS_AT_A_TIME):
        rows = slice(first, first + PAIRS_AT_A_TIME)
        found[0, rows], found[1, rows] = _posterior_difference(pairs.part(rows))
    return found[0], found[1]


def _strong(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, (2, P), variances, (2, P), and covariance, (P,), as if intensities were strong."""
    least = START * torch.minimum(pairs.expected, pairs.sigma)
    f = torch.maximum(pairs.intensity, least).sqrt()
    data, link = 4 * f**2 / pairs.sigma**2, 2 / pairs.spread
    own = data + link
    own[0] = own[0] + 1 / pairs.expected  # a little of Wilson's prior: the sum is not unknown
    determinant = own.prod(0) - link**2
    centre = (own.flip(0) * data * f + link * (data * f).flip(0)) / determinant
    return centre, own.flip(0) / determinant, link / determinant


def _posterior_difference(pairs: Pairs) -> tuple[Tensor, Tensor]:
    line = torch.linspace(-REACH, REACH, N_NODES, dtype=pairs.spread.dtype).to(pairs.spread.device)
    z = torch.cartesian_prod(line, line).T[:, :, None]  # (2, Q, 1)
    least, gap = 1e-6 * pairs.expected.sqrt(), float(line[1] - line[0])
    centre, variance, covariance = _strong(pairs)
    for _ in range(N_PASSES):
        # Cholesky's factor: F- follows F+, and has the rest of its own
        slope = covariance / variance[0]
        rest = (variance[1] - slope * covariance).clamp_min(1e-12 * variance[1])
        plus = centre[0] + variance[0].sqrt() * z[0]
        minus = centre[1] + slope * (plus - centre[0]) + rest.sqrt() * z[1]
        inside = (plus > 0) & (minus > 0)
        log_p = pairs.log_density(torch.maximum(plus, least), torch.maximum(minus, least))
        p = torch.softmax(torch.where(inside, log_p, -torch.inf), 0)
        mean = (p * (plus - minus)).sum(0)
        centre = torch.stack([(p * plus).sum(0), (p * minus).sum(0)])
        plus, minus = plus - centre[0], minus - centre[1]
        # no narrower than half the gaps between the nodes, which see nothing within
        floor = (0.5 * gap) ** 2
        variance = floor * variance + torch.stack([(p * plus**2).sum(0), (p * minus**2).sum(0)])
        covariance = floor * covariance + (p * plus * minus).sum(0)
    return mean, (p * (plus - minus) ** 2).sum(0).sqrt()
