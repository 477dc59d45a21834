r"""q(F) of every row from what its observations say, without going through them again.

About the value Omega_0 at which the observations were seen, the log-likelihood of a row's <F^2>
is a parabola of the slope and the expected curvature found there:

    log L(F^2) ~= -(F^2 - mean)^2 / (2 s^2),   s^2 = Omega_0^2 / information,
    mean = Omega_0 + s^2 slope / Omega_0

and its expectation under q(F) is that of a Normal. With any prior, the best q(F) then follows from
Newton steps over the rows alone. Where q was already close, which after training it is, this is
one Newton step of the whole ELBO in F^2, with the prior taken exactly.
"""

from __future__ import annotations

import torch

from braggflux.merge.fit.newton import AmplitudeNewton
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.objective import MergeTerms, elbo
from braggflux.merge.model.sums import ObservationSums

N_STEPS = 40
DAMPING = 0.7


def solve_amplitudes(merger: Merger, sums: ObservationSums) -> None:
    """Set q(F) to the optimum given ``sums`` and the merger's prior.

    Parameters
    ----------
    merger : Merger
        Scales, error model and prior stay as they are.
    sums : ObservationSums
        Of all observations that shall count, made with the same scales.
    """
    information = sums["information"]
    seen = information > 0
    precision = torch.where(seen, information / sums.spread**2, 0.0)
    step = torch.where(seen, sums["slope"] * sums.spread / information.clamp_min(1e-30), 0.0)
    target = sums.spread + step
    newton = AmplitudeNewton(merger)
    parameters = [merger.log_spread_step, merger.log_concentration]
    weight, none = torch.ones_like(information), information.new_zeros(0)  # no observation here
    for _ in range(N_STEPS):
        q = merger.inference()
        square = (q.spread - target) ** 2 + q.spread**2 / q.concentration
        log_likelihood, kl = -0.5 * (precision * square).sum(), merger.prior.kl(q).sum()
        terms = MergeTerms(log_likelihood, kl, torch.zeros_like(kl), information, weight, none)
        (-elbo(terms)).backward(inputs=parameters)
        newton.move(precision * q.spread.detach() ** 2, weight, DAMPING)
    merger.information = precision * merger.inference().spread.detach() ** 2
