"""Starting values and optimisation of the merge."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import Batch, ObservationTable
from braggflux.merge.fit.adam import Adam
from braggflux.merge.fit.mates import confirmed_log_ratio
from braggflux.merge.fit.newton import AmplitudeNewton
from braggflux.merge.fit.together import add_gradients
from braggflux.merge.likelihood.expectation import Expectation
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.objective import elbo

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.95)
N_START_ROUNDS = 3
START_ERROR, START_DOF = 0.2, 4.0  # relative error and tail of the first means
DAMPING = 0.5  # of the amplitudes' Newton steps
AGAIN = 0.25  # of the epochs, once differences of mates are known
PARTED_EPOCHS = 60  # of the amplitudes of mates, once the scales are known
ERROR_RATE = 3.0  # of the error model, in steps of the scale: a handful of well-known numbers

#: Called after each epoch with its number and the ELBO.
Observer = Callable[[int, float], None]


@torch.no_grad()
def start(merger: Merger, table: ObservationTable) -> None:
    """Start scales from image and spectrum means, amplitudes from weighted means.

    Images are first compared with the mean intensity at their resolutions, then with the merged
    intensities.
    """
    merger.count(table)
    with merger.tied(table) as tied:
        _start(merger, tied)


def _start(merger: Merger, table: ObservationTable) -> None:
    """Take the steps of :func:`start`, mates tied."""
    everything = table.everything()
    o, terms = everything.observations, everything.terms
    first = _first(everything)
    row, inv_d2, used = terms.row[first], terms.inv_d2[first], o.is_used.double()
    shell = _shells(inv_d2)
    by_shell = _mean(o.intensity, used, shell, int(shell.max()) + 1)
    expected = by_shell.clamp_min(1e-6 * by_shell.max())[shell]
    for _ in range(N_START_ROUNDS):
        merger.scale.start(everything, used * o.intensity, used * expected)
        expected = _merge_once(merger, table, row, first, expected)[row]


@torch.no_grad()
def start_amplitudes(merger: Merger, table: ObservationTable) -> None:
    """Start amplitudes and Wilson's Sigma alone: scales come from an earlier fit."""
    everything = table.everything()
    o, first = everything.observations, _first(everything)
    shell = _shells(everything.terms.inv_d2[first])
    value = o.intensity / merger.scale(everything).log_k[first].exp()
    by_shell = _mean(value, o.is_used.double(), shell, int(shell.max()) + 1)
    expected = by_shell.clamp_min(1e-6 * by_shell.max())[shell]
    row = everything.first_rows
    for _ in range(N_START_ROUNDS):
        expected = _merge_once(merger, table, row, first, expected)[row]


def _first(batch: Batch) -> Tensor:
    """Mask of the first term of each observation, (T,) bool."""
    first = torch.ones_like(batch.terms.observation, dtype=torch.bool)
    first[1:] = batch.terms.observation.diff() > 0
    return first


@torch.no_grad()
def _merge_once(
    merger: Merger, table: ObservationTable, row: Tensor, first: Tensor, expected: Tensor
) -> Tensor:
    """Set q(F) from robust means with the present scales; return <F^2>, (R,).

    The relative error is one of what is ``expected``, (N,): in units of its own value a spot that
    is missing would be the most precise of all.
    """
    o = table.observations
    k = merger.scale(table.everything()).log_k[first].exp()
    value = o.intensity / k
    variance = (o.measured.background_sigma / k) ** 2 + (START_ERROR * expected) ** 2
    variance = variance + (0.1 * START_ERROR * value.abs().median()) ** 2
    weight = o.is_used / (variance + (value - expected) ** 2 / START_DOF)
    n_rows = len(merger.group)
    total = k.new_zeros(n_rows).index_add_(0, row, weight)
    mean = k.new_zeros(n_rows).index_add_(0, row, weight * value)
    mean = mean / total.clamp_min(1e-30)
    seen = total > 0
    merger.prior.start(mean, seen)
    sigma = merger.prior.spread()
    noise = total.clamp_min(1e-30) ** -0.5
    spread = torch.where(seen, torch.maximum(mean, 0.5 * torch.minimum(noise, sigma)), sigma)
    k_start = torch.where(seen, (spread / noise) ** 2, 1.0).clamp(0.6, 1e5)
    merger.set_log_spread(spread.log())
    merger.log_concentration.copy_(k_start.log())
    return spread


@torch.no_grad()
def pool_trees(merger: Merger) -> None:
    """Set every amplitude of a tree to the tree's mean.

    A coupled fit starts here: from separate values an outlier that is alone in its row would be
    believed by Student's t, and its relatives be taken for the outliers.
    """
    log_spread = merger.log_spread
    weight = (merger.n_obs > 0) * merger.log_concentration.exp()
    total = log_spread.new_zeros(merger.n_groups)
    mean = total.index_add(0, merger.group, weight * log_spread)
    total = total.index_add(0, merger.group, weight)
    mean = (mean / total.clamp_min(1e-30))[merger.group]
    merger.set_log_spread(torch.where(total[merger.group] > 0, mean, log_spread))


@torch.no_grad()
def start_held_out(
    merger: Merger,
    table: ObservationTable,
    training: ObservationTable,
    with_scales: bool = True,
) -> None:
    """Initialise images and reflections without a training observation before the fit to all data.

    So are amplitudes of which no observation is believed. The last fit is short: it would leave a
    held-out image with a scale from its neighbours, and a reflection seen there alone near the
    mean of its prior.
    """
    batch = table.everything()
    o, row = batch.observations, batch.first_rows
    e = merger.generative(batch, merger.inference())
    known = (merger.n_obs > 0)[row]
    if with_scales:
        precision = known / (e.variance + e.spread)
        observed, expected = precision * e.mean * o.intensity, precision * e.mean**2
        used = training.observations.is_used
        if merger.scale.start_unseen(batch, used, observed, expected):
            e = merger.generative(batch, merger.inference())
    n_rows = len(merger.group)
    unseen = (merger.n_obs == 0) & ~merger.prior.rows_with_relatives()
    doubted = _doubted(merger, batch, e)
    # an intensity that is not there says nothing of a doubted amplitude
    sigma = o.measured.background_sigma
    chosen = unseen[row] | (doubted[row] & (o.intensity > 3 * sigma))
    value = o.intensity / e.scale
    # a wide q(F) would be doubted again: it expects no intensity in particular
    weight = chosen / ((sigma / e.scale) ** 2 + (0.25 * START_ERROR * value) ** 2)
    total = value.new_zeros(n_rows).index_add_(0, row, weight)
    mean = torch.zeros_like(total).index_add_(0, row, weight * value) / total.clamp_min(1e-30)
    noise = total.clamp_min(1e-30) ** -0.5
    spread = torch.maximum(mean, 0.5 * torch.minimum(noise, merger.prior.spread()))
    merger.set_log_spread(torch.where(total > 0, spread.log(), merger.log_spread))
    k_start = (spread / noise).square().clamp(0.6, 1e5).log()
    merger.log_concentration.copy_(torch.where(total > 0, k_start, merger.log_concentration))


def _doubted(merger: Merger, batch: Batch, e: Expectation) -> Tensor:
    """Rows of which no observation is believed to be the spot, nor of a relative's, (R,) bool.

    A row that was far off early in the fit may have lost all its observations to the alternatives;
    there no gradient leads back.
    """
    share = merger.likelihood.share_of_spots(batch, e)
    own = torch.arange(len(merger.group), device=merger.device)
    group = merger.group if merger.prior.is_coupled else own
    believed = share.new_zeros(int(group.max()) + 1)
    believed.index_add_(0, group[batch.first_rows], (share > 0.5).to(share.dtype))
    return (believed == 0)[group]


def fit(
    merger: Merger,
    table: ObservationTable,
    config: MergeConfig,
    *,
    epochs: int | None = None,
    with_scales: bool = True,
    observer: Observer | None = None,
) -> float:
    """Maximise the ELBO: Newton steps for q(F), Adam with cosine decay for the rest.

    Bijvoet mates share one amplitude while scales are fitted: where a mate is seen once or twice,
    scales would make its observations agree with each other, whatever their mean, and what is left
    between the mates is noise that both halves of the data confirm. With the scales fixed, the
    error model is fitted again and each mate gets an amplitude of its own. Where these differ by
    more than noise, scales are fitted again with the differences that halves of the data confirm.

    Returns the ELBO of the last epoch [nats].

    Parameters
    ----------
    merger : Merger
    table : ObservationTable
    config : MergeConfig
    epochs : int, optional
        Instead of the configured number.
    with_scales : bool
        False leaves scales, error model and Wilson's Sigma as they are.
    observer : callable, optional
        Called in the longest part of the fit.
    """
    epochs = epochs or config.epochs
    if not with_scales:
        return _fit_amplitudes(merger, table, epochs, None, observer)
    if not merger.has_mates:
        return _fit_scales(merger, table, config, epochs, observer)
    was_known = bool(merger.log_ratio.any())
    elbo = _fit_tied(merger, table, config, epochs, observer)
    merger.log_ratio.copy_(confirmed_log_ratio(merger, table, config))
    if was_known or not merger.log_ratio.any():
        return elbo
    return _fit_tied(merger, table, config, max(1, round(AGAIN * epochs)), None)


def _fit_tied(
    merger: Merger,
    table: ObservationTable,
    config: MergeConfig,
    epochs: int,
    observer: Observer | None,
) -> float:
    """Move the scales with the mates tied, then errors and amplitudes with the mates apart."""
    with merger.tied(table) as tied:
        _fit_scales(merger, tied, config, epochs, observer)
    errors = [p for p in merger.likelihood.parameters() if p.requires_grad]
    optimizer = Adam([(errors, ERROR_RATE * config.learning_rate)], BETAS)
    return _fit_amplitudes(merger, table, PARTED_EPOCHS, optimizer)


def _fit_scales(
    merger: Merger,
    table: ObservationTable,
    config: MergeConfig,
    epochs: int,
    observer: Observer | None,
) -> float:
    """Move everything, batch by batch."""
    merger.count(table)
    amplitudes = AmplitudeNewton(merger)
    optimizer = make_optimizer(merger, config)
    generator = torch.Generator().manual_seed(config.seed)
    batches = table.unit_batches(config.batch_size, generator)
    only = _part(merger, table) if len(batches) == 1 else None
    merger.processes.copy_from_first(merger)
    began, elbo = time.monotonic(), math.nan
    for epoch in range(1, epochs + 1):
        elbo = 0.0
        if only is None:
            batches = table.unit_batches(config.batch_size, generator)
        for k, units in enumerate(batches):
            batch = only or _part(merger, table, units)
            share = (epoch - 1 + k / len(batches)) / epochs
            with merger.training_mode():
                elbo += _step(merger, batch, optimizer, amplitudes, share)
        amplitudes.end_pass(DAMPING)
        if observer is not None:
            observer(epoch, elbo)
    n = int(table.observations.is_used.sum())
    seconds = time.monotonic() - began
    logger.debug("elbo %.4f/obs after %d epochs, %.1f s", elbo / n, epochs, seconds)
    return elbo


def _fit_amplitudes(
    merger: Merger,
    table: ObservationTable,
    epochs: int,
    optimizer: Adam | None,
    observer: Observer | None = None,
) -> float:
    """Newton steps of q(F), and those of ``optimizer``, on all observations at once.

    The scales are computed once.
    """
    merger.count(table)
    batch, amplitudes, elbo = _part(merger, table), AmplitudeNewton(merger), math.nan
    if batch is None:
        raise ValueError("a process without an image")
    with merger.with_fixed_scale(batch):
        for epoch in range(1, epochs + 1):
            elbo = _step(merger, batch, optimizer, amplitudes, (epoch - 1) / epochs)
            amplitudes.end_pass(DAMPING)
            if observer is not None:
                observer(epoch, elbo)
    return elbo


def _part(merger: Merger, table: ObservationTable, units: Tensor | None = None) -> Batch | None:
    """Batch of some exposure groups, or all, or what this process computes of them."""
    if merger.processes.is_alone:
        return table.everything() if units is None else table.batch(units)
    chosen = torch.arange(table.n_units) if units is None else units
    return table.part(chosen, merger.processes.share(len(chosen)))


def _step(
    merger: Merger,
    batch: Batch | None,
    optimizer: Adam | None,
    amplitudes: AmplitudeNewton,
    share: float,
) -> float:
    """Move scales and amplitudes by one batch; returns its part of the ELBO."""
    parameters = [merger.log_spread_step, merger.log_concentration]
    if optimizer is not None:
        set_rate(optimizer, share)
        optimizer.zero_grad()
        parameters += optimizer.parameters
    none = torch.zeros_like(merger.log_spread_step)
    loss, sums = None, [none.new_zeros(()), none.detach(), none.detach().clone()]
    if batch is not None:
        terms = merger.loss(batch, merger.inference())
        loss = -elbo(terms)
        sums = [-loss.detach().clone(), terms.information, terms.row_weight]
    add_gradients(merger, loss, parameters, sums)
    if optimizer is not None:
        optimizer.step()
    amplitudes.step(sums[1], sums[2], DAMPING)
    return float(sums[0])


def make_optimizer(
    merger: Merger, config: MergeConfig, others: Sequence[nn.Parameter] = ()
) -> Adam:
    """Adam for all but the amplitudes, with a rate of its own for each kind of parameter.

    Parameters
    ----------
    merger : Merger
    config : MergeConfig
    others : sequence of Parameter
        Further ones that another method moves.
    """
    network = merger.scale.network
    networks = [] if network is None else list(network.parameters())
    errors = [p for p in merger.likelihood.parameters() if p.requires_grad]
    amplitudes = [merger.log_spread_step, merger.log_concentration]
    known = {id(p) for p in (*networks, *errors, *amplitudes, *others)}
    rest = [p for p in merger.parameters() if id(p) not in known and p.requires_grad]
    groups = [
        (rest, config.learning_rate),
        (errors, ERROR_RATE * config.learning_rate),
        (networks, config.network_learning_rate),
    ]
    return Adam(groups, BETAS)


def set_rate(optimizer: Adam, share: float) -> None:
    """Rise over the first 5 %, then cosine to a hundredth."""
    rise = min(1.0, (share + 1e-3) / 0.05)
    decay = 0.505 + 0.495 * math.cos(math.pi * share)
    optimizer.rates = [rate * rise * decay for rate in optimizer.start_rates]


def _shells(inv_d2: Tensor, n: int = 20) -> Tensor:
    share = torch.linspace(0, 1, n + 1, dtype=inv_d2.dtype, device=inv_d2.device)
    edges = torch.quantile(inv_d2[:: max(1, len(inv_d2) // 100_000)], share)
    return torch.bucketize(inv_d2, edges[1:-1])


def _mean(value: Tensor, weight: Tensor, index: Tensor, n: int) -> Tensor:
    total = value.new_zeros(n).index_add_(0, index, value * weight)
    return total / torch.zeros_like(total).index_add_(0, index, weight).clamp_min(1e-30)
