"""r of the double-Wilson prior for streamed data: chosen by held-out data, from sums of rows.

As :mod:`merge.intensities.correlation` for data in memory; here each r costs a fit over the rows
and a prediction of the carriers, not another pass.
"""

from __future__ import annotations

import torch

from merge.intensities.correlation import GRID, set_best
from merge.intensities.held_out import observed_and_expected
from merge.intensities.merger import IntensityMerger
from merge.intensities.row_problem import solve_rows
from merge.intensities.row_sums import RowSums
from merge.intensities.stream import ObservationStream
from merge.intensities.stream_training import held_out_batches


def choose_from_sums(
    merger: IntensityMerger, stream: ObservationStream, sums: RowSums
) -> list[dict[str, float]]:
    """Set r of every shell; returns the score of every r in every shell [nats].

    Parameters
    ----------
    merger : IntensityMerger
        With a coupled prior.
    stream : ObservationStream
    sums : RowSums
        Without the held-out observations.
    """
    n_shells = len(merger.prior.one_minus_r2)
    scores = torch.zeros(len(GRID), n_shells, dtype=torch.float64, device=merger.device)
    for i, r in enumerate(GRID):
        merger.prior.one_minus_r2.fill_(1 - r**2)
        solve_rows(merger, sums)
        for _, batch in held_out_batches(stream, merger):
            density = torch.as_tensor(observed_and_expected(merger, batch)[2]).to(merger.device)
            chosen = batch.observations.is_used
            shell = merger.prior.shell[batch.terms.row[chosen]]
            scores[i].index_add_(0, shell, density[chosen])
    return set_best(merger, scores)
