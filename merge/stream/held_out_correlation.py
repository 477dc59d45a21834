"""r of the double-Wilson prior for streamed data: chosen by held-out data, from sums of rows.

As :mod:`braggflux.merge.fit.held_out_correlation` for data in memory; here each r costs a fit over
the rows and a prediction of the holdout batches, not another pass.
"""

from __future__ import annotations

import torch

from braggflux.merge.fit.held_out import observed_and_expected
from braggflux.merge.fit.held_out_correlation import GRID, set_best
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.sums import ObservationSums
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.stream.batches import ObservationStream
from braggflux.merge.stream.solve import solve_amplitudes
from braggflux.merge.stream.training import held_out_batches


def choose_from_sums(
    merger: Merger, stream: ObservationStream, sums: ObservationSums
) -> list[dict[str, float]]:
    """Set r of every shell; returns the score of every r in every shell [nats].

    Parameters
    ----------
    merger : Merger
        With a coupled double-Wilson prior.
    stream : ObservationStream
    sums : ObservationSums
        Without the held-out observations.
    """
    prior, density = merger.prior.part(DoubleWilson), []
    for r in GRID:
        prior.one_minus_r2.fill_(1 - r**2)
        solve_amplitudes(merger, sums)
        parts, shell = [], []
        for _, batch in held_out_batches(stream, merger):
            chosen = batch.observations.is_used
            values = torch.as_tensor(observed_and_expected(merger, batch)[2])
            parts.append(values.to(merger.device)[chosen])
            shell.append(prior.shell[batch.terms.row[chosen]])
        density.append(torch.cat(parts))
    return set_best(prior, torch.stack(density), torch.cat(shell))
