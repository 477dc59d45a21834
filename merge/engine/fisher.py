r"""Fisher scoring for the parameters whose information is nearly diagonal: q(F) and frame scales.

The precision of log <F^2> spans five decades over a data set, and an error of one frame's scale
hides in the amplitudes of all its reflections: with one learning rate for all, hundreds of steps
end below what thirty of these reach. The expected information is known in closed form. With the
weight of an observation in the logarithm

    w_i = mu_i^2 / V_i [P(good) + P(outlier) (nu + 1) / (nu + z_i^2) / 6^2],   mu_i = K_i <F_h^2>,

    w_i = mu_i^2 / V_i [P(good) + P(outlier) (nu + 1) / (nu + z_i^2) / 36],   mu_i = K_i <F_h^2>,
the weight of iterated least squares, without which an amplitude far from all its observations
jumps to and fro over them),

a row has the information ``sum_i w_i`` plus that of its prior, ``k0 <F^2> / (epsilon Sigma)``, and
Bijvoet mates are bound by ``c (log <F+^2> - log <F-^2>)^2 / 2`` with ``c = <F^2> / (2 S)``: two by
two for each pair. A frame has ``sum_i w_i p_if`` with the share p of the frame in the scale of the
observation, a bound of its row of the information matrix, so that steps of all frames
at once converge (Jacobi's method on a diagonally dominant matrix).

Amplitudes and scales move at the same time; an error that both could heal would be healed twice,
hence the damping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braggflux.merge.engine.merger import Merger
from braggflux.merge.engine.types import MergeBatch

DAMPING = 0.6
MAX_STEP = 0.7  # in the log: far from the optimum the information is not to be trusted


def fisher_parameters(merger: Merger) -> list[torch.nn.Parameter]:
    """Parameters that :func:`fisher_step` moves; every other one is left to a gradient method."""
    own = [merger.log_spread, merger.log_concentration]
    return [*own, merger.scale.log_frame_scale] if _has_frames(merger) else own


def _has_frames(merger: Merger) -> bool:
    """Whether there are frame scales, and they are not held fixed."""
    return merger.scale.physical and merger.scale.log_frame_scale.requires_grad


@torch.no_grad()
def fisher_step(merger: Merger, batch: MergeBatch) -> None:
    """Move q(F) and the frame scales by their gradients over their information.

    Parameters
    ----------
    merger : Merger
        Holds the gradients of minus the ELBO, summed over all observations [nats].
    batch : MergeBatch
        All observations.
    """
    scale = merger.scale(batch.scale_index).exp()
    expected = scale * merger.log_spread.exp()[batch.refl_id]
    likelihood = batch.likelihood
    weight = expected**2 * merger.likelihood.precision(likelihood, expected)
    _step_rows(merger, torch.zeros_like(merger.log_spread).index_add_(0, batch.refl_id, weight))
    if _has_frames(merger):
        _step_frames(merger, batch, weight)


def _step_rows(merger: Merger, information: Tensor) -> None:
    prior, spread = merger.prior, merger.log_spread.exp()
    wilson = prior.wilson.p_structure_factor()
    own = information + wilson.concentration * spread / wilson.spread
    plus, minus = prior.plus_row, prior.minus_row
    bond = torch.zeros_like(own[plus])
    if prior.coupled:
        mean = 0.5 * (spread[plus] + spread[minus])
        bond = torch.where(prior.has_mate, 0.5 * mean / prior.conditional_variance(), 0.0)
    gradient = merger.log_spread.grad
    a, b = own[plus], own[minus]
    determinant = a * b + bond * (a + b)
    change = torch.zeros_like(own)
    change[plus] = ((b + bond) * gradient[plus] + bond * gradient[minus]) / determinant
    with_mate = minus[prior.has_mate]
    of_minus = ((a + bond) * gradient[minus] + bond * gradient[plus]) / determinant
    change[with_mate] = of_minus[prior.has_mate]
    merger.log_spread -= DAMPING * change.clamp(-MAX_STEP, MAX_STEP)

    # q is exact when its precision in the log equals the information: -k / 2 + H / 2 in log k
    precision = own.clone()
    precision[plus] += bond
    precision[with_mate] += bond[prior.has_mate]
    curvature = 0.5 * (precision / merger.log_concentration.exp()).clamp_min(1.0)
    change = merger.log_concentration.grad / curvature
    merger.log_concentration -= DAMPING * change.clamp(-MAX_STEP, MAX_STEP)


def _step_frames(merger: Merger, batch: MergeBatch, weight: Tensor) -> None:
    scale = merger.scale
    frame = scale.frame[batch.scale_index]
    share = scale.frame_weight[batch.scale_index] * scale.log_frame_scale.exp()[frame]
    share = share / share.sum(-1, keepdim=True)
    information = torch.zeros_like(scale.log_frame_scale)
    information.index_add_(0, frame.flatten(), (weight[:, None] * share).flatten())
    information = information + scale.frame_prior_bound()
    change = scale.log_frame_scale.grad / information
    scale.log_frame_scale -= DAMPING * change.clamp(-MAX_STEP, MAX_STEP)
