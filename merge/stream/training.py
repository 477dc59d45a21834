"""Training from a store: scales on a part of the data, amplitudes on all of them.

A scale model for stills has no parameters of single images, so that some ten million observations
tell it what more could: it is trained on batches until that many have been read, be that a part of
a pass or several. The amplitudes follow with
:class:`~braggflux.merge.stream.newton.StreamingNewton`, and at the end one look at all
observations, scales frozen, gives q(F), intensities and half sets.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch
from braggflux.merge.fit.held_out import Prediction, observed_and_expected
from braggflux.merge.fit.together import add_gradients
from braggflux.merge.fit.training import Observer, make_optimizer, set_rate
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.objective import elbo
from braggflux.merge.model.sums import ObservationSums
from braggflux.merge.stream.batches import ObservationStream
from braggflux.merge.stream.newton import StreamingNewton
from braggflux.merge.stream.prefetch import read_ahead

logger = logging.getLogger(__name__)

#: The amplitudes, and with them the prior, move once in so many batches: of tens of thousands of
#: rows a batch of that size sees a part, and the divergence is the second largest cost of a step.
ROWS_EVERY = 4


def fit_stream(
    merger: Merger,
    stream: ObservationStream,
    config: MergeConfig,
    observer: Observer | None = None,
) -> None:
    """Train scales, error model and Wilson's Sigma; q(F) goes with them.

    Reads ``config.stream_training`` observations, at most ``config.epochs`` passes.

    Parameters
    ----------
    merger : Merger
        Started from the stream's sample.
    stream : ObservationStream
    config : MergeConfig
    observer : callable, optional
        Called after each batch with its number and its log-likelihood.
    """
    merger.set_counts(torch.as_tensor(stream.n_obs))
    n_steps = n_training_batches(stream, config)
    optimizer, rows = make_optimizer(merger, config), StreamingNewton(merger)
    numbers = stream.numbers(torch.Generator().manual_seed(config.seed))
    pending = [torch.zeros_like(merger.log_concentration) for _ in range(2)]
    began, n_seen = time.monotonic(), 0
    together = merger.processes
    parameters = [merger.log_spread_step, merger.log_concentration, *optimizer.parameters]
    together.copy_from_first(merger)
    read = partial(stream.part, processes=together)
    batches = read_ahead(read, itertools.islice(numbers, n_steps))
    for step, (_, batch) in enumerate(batches):
        is_row_step = (step + 1) % ROWS_EVERY == 0 or step + 1 == n_steps
        optimizer.zero_grad()
        q = merger.inference()
        loss = q.spread.new_zeros(())
        sums = [torch.zeros_like(p) for p in (loss, loss, *pending)]
        if batch is not None:
            terms = merger.loss(batch.to(merger.device), q, with_prior=False)
            loss, sums[0] = -elbo(terms), terms.log_likelihood.detach().clone()
            sums[1] += len(batch.observations)
            sums[2:] = [terms.information, terms.row_weight]
        together.add_up(sums)
        pending = [p + t for p, t in zip(pending, sums[2:], strict=True)]
        if is_row_step:
            loss = loss + (pending[1] * merger.prior.kl(q)).sum() / together.size
        add_gradients(merger, loss if loss.requires_grad else None, parameters, [])
        set_rate(optimizer, step / n_steps)
        optimizer.step()
        if is_row_step:
            rows.step(pending[0], pending[1])
            pending = [torch.zeros_like(p) for p in pending]
        n_seen += int(sums[1])
        if observer is not None:
            observer(step + 1, float(sums[0]))
    seconds = time.monotonic() - began
    logger.info(
        "trained on %.3g observations (%.2f passes) in %.0f s, %.3g per second",
        *(n_seen, n_seen / max(len(stream), 1), seconds, n_seen / max(seconds, 1e-9)),
    )


def n_training_batches(stream: ObservationStream, config: MergeConfig) -> int:
    """Count the batches that :func:`fit_stream` reads."""
    n_filled = int(stream.filled.sum())
    mean_size = len(stream) / stream.n_batches
    return max(1, min(math.ceil(config.stream_training / mean_size), config.epochs * n_filled))


def all_batches(stream: ObservationStream, merger: Merger) -> Iterator[tuple[int, Batch]]:
    """Every batch of this process with its number, in the order of the file."""
    filled = np.flatnonzero(stream.filled)
    own = filled[merger.processes.share(len(filled))]
    for k, batch in read_ahead(stream.batch, own.tolist()):
        yield k, batch.to(merger.device)


def held_out_batches(stream: ObservationStream, merger: Merger) -> Iterator[tuple[int, Batch]]:
    """Carriers, with the held-out observations as the used ones."""
    for k in sorted(stream.holdout_batches):
        if stream.filled[k]:
            table, masks = stream.split_holdout(k)
            table = table.with_masks(~masks.is_used, masks.is_seen)
            yield k, stream.masked(table, None).to(merger.device)


def look_at_all(merger: Merger, stream: ObservationStream, config: MergeConfig) -> ObservationSums:
    """Gather the sums over all observations that are not held out."""
    began = time.monotonic()
    sums = ObservationSums(merger, config.seed).add(all_batches(stream, merger))
    merger.processes.add_up([sums.by_half])
    seconds = time.monotonic() - began
    n = float(sums["n"].sum())
    logger.info("looked at %.3g observations, %.3g per second", n, n / max(seconds, 1e-9))
    return sums


@torch.no_grad()
def predict_held_out(merger: Merger, stream: ObservationStream) -> dict[str, Prediction]:
    """Predict the held-out observations of the holdout batches, by kind."""
    found: dict[str, list[NDArray[np.float64]]] = {"image": [], "observation": []}
    for k in sorted(stream.holdout_batches):
        if not stream.filled[k]:
            continue
        table, masks = stream.split_holdout(k)
        batch = stream.masked(table, masks).to(merger.device)
        values = observed_and_expected(merger, batch)
        found["image"].append(values[:, masks.by_image.numpy()])
        found["observation"].append(values[:, masks.by_observation.numpy()])
    empty = [np.zeros((3, 0))]
    return {
        kind: Prediction.of(*np.concatenate(empty + parts, axis=1))
        for kind, parts in found.items()
    }
