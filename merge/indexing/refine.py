r"""Indexing ambiguity of stills, resolved during training.

The first choice comes from intensities alone (:mod:`braggflux.merge.indexing.seed`). Then
scales and amplitudes are trained with it, each image is asked again under which operator the model
predicts it best, and so on until nothing changes. An image's own observations have shaped the
amplitudes that it was assigned to; they are taken out again: for an observation with the share
h = v / D of the information on its amplitude (v: variance of K F^2 under q, D: error model),
leaving it out makes the residual r / (1 - h) and the variance D / (1 - h).
"""

from __future__ import annotations

import logging
from dataclasses import replace

import gemmi
import torch
from torch import Tensor

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.fit.held_out import Split
from braggflux.merge.fit.training import fit
from braggflux.merge.indexing.seed import (
    Mixture,
    StandardIntensities,
    means,
    seed_operators,
    standardise,
)
from braggflux.merge.model.merger import Merger
from braggflux.merge.problem import MergeProblem

logger = logging.getLogger(__name__)

MAX_ROUNDS = 4
ROUND_SHARE = 0.15  # of the epochs, for each round of training
SETTLED = 1e-3  # share of the images that may still change
MAX_LEVERAGE = 0.8


def seeded(
    problem: MergeProblem,
    masks: Split,
    config: MergeConfig,
    reference: Tensor | None = None,
) -> MergeProblem:
    """Choose operators from intensities alone.

    Of several choices that differ by an operator for all images, the one is taken that agrees with
    the reference, or else leaves most images as they are.

    Parameters
    ----------
    problem : MergeProblem
        With an ambiguity.
    masks : Split
        Held-out observations have no say.
    config : MergeConfig
    reference : Tensor, (R0,), optional
        Known F^2 of each row of the first dataset's asymmetric unit, NaN where there is none.
    """
    data = standard_intensities(problem, masks)
    known = None if reference is None else _standard_reference(problem, reference)
    generator = torch.Generator().manual_seed(config.seed)
    mixture = seed_operators(data, generator, known)
    confidence, choice = mixture.responsibility.max(1)
    problem = problem.with_choice(choice, confidence)
    if known is None:
        shift = _inverse(problem, problem.indexing.identity)
    else:
        shift = _like_reference(problem, data, mixture, known)
    after = torch.as_tensor(problem.indexing.operators.after(shift, _space_group(problem)))
    return problem.with_choice(after[choice], confidence)


def standard_intensities(problem: MergeProblem, masks: Split) -> StandardIntensities:
    """Bring the observations of a problem into the form in which images are compared."""
    table = problem.table
    o, terms = table.observations, table.terms
    level = terms.base_log_scale.exp()
    value, variance = standardise(
        o.intensity / level, o.sigma / level, terms.inv_d2, terms.ewald_offset
    )
    common = _common_rows(problem)
    return StandardIntensities(
        value,
        variance,
        masks.is_used & masks.is_seen,
        masks.is_seen,
        common[problem.indexing.rows],
        o.image,
        len(problem.indexing.choice),
    )


def _space_group(problem: MergeProblem) -> gemmi.SpaceGroup:
    return problem.unique.asus[0].space_group


def _common_rows(problem: MergeProblem) -> Tensor:
    """Row of the first dataset that each unique row is like, Friedel mates together, (R,)."""
    first = problem.unique.asus[0]
    found = [torch.as_tensor(first.refl_id(asu.asu_index)) for asu in problem.unique.asus]
    return torch.cat(found)


def _standard_reference(problem: MergeProblem, intensity: Tensor) -> Tensor:
    """Standardise known intensities, (R0,)."""
    asu = problem.unique.asus[0]
    known = ~intensity.isnan()
    value = torch.full_like(intensity, torch.nan)
    inv_d2 = torch.as_tensor(asu.d)[known] ** -2
    nothing = torch.zeros_like(inv_d2)
    epsilon = torch.as_tensor(asu.epsilon)[known]
    value[known] = standardise(intensity[known] / epsilon, nothing, inv_d2, nothing)[0]
    return value


def _inverse(problem: MergeProblem, number: int) -> int:
    """Operator after which ``number`` is the identity."""
    operators = problem.indexing.operators
    for b in range(len(operators)):
        if operators.is_symmetric[b] and operators.after(b, _space_group(problem))[number] == 0:
            return b
    return 0


def _like_reference(
    problem: MergeProblem, data: StandardIntensities, mixture: Mixture, known: Tensor
) -> int:
    """Operator for all images after which their means agree best with the reference."""
    asu, operators = problem.unique.asus[0], problem.indexing.operators
    noise = torch.tensor(0.5, dtype=torch.float64)
    total, weight = means(data, mixture.responsibility, noise)
    merged, common = torch.full_like(known, torch.nan), _common_rows(problem)
    merged[: len(total)] = torch.where(weight > 0, total / weight, torch.nan)
    best, highest = 0, -2.0
    for b in range(len(operators)):
        if not operators.is_symmetric[b]:
            continue
        row = torch.as_tensor(asu.refl_id(asu.asu_index @ operators.matrices[b]))
        other = torch.where(row >= 0, known[common[row.clamp_min(0)]], torch.nan)
        both = ~(merged.isnan() | other.isnan())
        cc = -1.0
        if int(both.sum()) > 2:
            cc = float(torch.corrcoef(torch.stack([merged[both], other[both]]))[0, 1])
        logger.info(
            "correlation with the reference, %s: %.3f (%d reflections)",
            operators.names[b],
            cc,
            int(both.sum()),
        )
        if cc > highest:
            best, highest = b, cc
    if highest < 0.3:
        logger.warning("the reference agrees with no choice of the indexing (%.2f)", highest)
    return best


def refined(
    merger: Merger,
    problem: MergeProblem,
    masks: Split,
    config: MergeConfig,
    with_scales: bool = True,
) -> MergeProblem:
    """Alternate training (of amplitudes alone, if asked) and choosing until nothing changes."""
    epochs = max(1, round(ROUND_SHARE * config.epochs))
    for _ in range(MAX_ROUNDS):
        training = problem.table.with_masks(masks.is_used, masks.is_seen).to(merger.device)
        fit(merger, training, config, epochs=epochs, with_scales=with_scales)
        problem = reassigned(merger, problem, masks)
        if problem.indexing.changed[-1] <= SETTLED:
            break
    return problem


def reassigned(merger: Merger, problem: MergeProblem, masks: Split | None = None) -> MergeProblem:
    """Copy of the problem with the operator of each image under which it is predicted best.

    Held-out observations (``masks``) have no say.
    """
    table, before = problem.table, problem.indexing
    if masks is not None:
        table = table.with_masks(masks.is_used, masks.is_seen)
    score = image_log_likelihoods(merger, table, before.rows)
    probability = torch.softmax(score + (before.share + 1e-3).log(), 1)
    confidence, choice = probability.max(1)
    changed = float((choice != before.choice).double().mean())
    problem = problem.with_choice(choice, confidence)
    return replace(
        problem, ambiguity=replace(problem.indexing, changed=(*before.changed, changed))
    )


@torch.no_grad()
def image_log_likelihoods(merger: Merger, table: ObservationTable, rows: Tensor) -> Tensor:
    """Predictive log-likelihood of each image under each operator, the image left out, (G, A).

    On the CPU, as the table.

    Parameters
    ----------
    merger : Merger
    table : ObservationTable
        Under the operators that the merger was trained with.
    rows : Tensor, (N, A)
    """
    batch, q, rows = (
        table.everything().to(merger.device),
        merger.inference(),
        rows.to(merger.device),
    )
    o, current = batch.observations, batch.terms.row
    scored = o.is_seen.double()
    score = scored.new_zeros(batch.n_images, rows.shape[1])
    for a in range(rows.shape[1]):
        moved = replace(batch, terms=replace(batch.terms, row=rows[:, a]))
        e = merger.generative(moved, q)
        own = o.is_used & (rows[:, a] == current)
        left = 1 - own * (e.spread / e.variance).clamp_max(MAX_LEVERAGE)
        residual = (o.intensity - e.mean) / left
        e = replace(
            e,
            mean=o.intensity - residual,
            spread=torch.zeros_like(e.spread),
            variance=e.variance + e.spread / left,
        )
        density = merger.likelihood(moved, e)
        score[:, a].index_add_(0, batch.image, density * scored)
    return score.cpu()
