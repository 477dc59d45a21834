"""Whether frames have scales of their own: where few observations are on one, held-out data say.

A frame's scale takes one of the degrees of freedom of its observations. With many it pays for any
flicker worth the name; with few it can follow their noise, and Bijvoet differences with it.
"""

from __future__ import annotations

import logging

import torch

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.fit.held_out import log_likelihoods
from braggflux.merge.fit.training import fit
from braggflux.merge.model.merger import Merger

logger = logging.getLogger(__name__)

#: Observations of the median frame from which its scale costs next to nothing.
MANY = 100


def is_in_doubt(merger: Merger, table: ObservationTable, config: MergeConfig) -> bool:
    """Whether held-out data must decide: frames with few observations, and no setting."""
    if merger.scale.frames is None or config.flicker != "auto":
        return False
    count = torch.bincount(table.observations.image)
    return float(count[count > 0].double().median()) < MANY


def choose_flicker(
    merger: Merger,
    table: ObservationTable,
    held_out: torch.Tensor,
    config: MergeConfig,
    epochs: int,
) -> list[dict[str, float | str]]:
    """Do without scales of single frames, unless they predict better by more than their error.

    Parameters
    ----------
    merger : Merger
        Trained with ``table``, frames flickering; goes on as chosen.
    table : ObservationTable
        With the training mask set.
    held_out : Tensor, (N,) bool
        Single observations on frames that are known.
    config : MergeConfig
    epochs : int
        Of the fit without.

    Returns
    -------
    list of dict
        Log-likelihood of a held-out observation, with and without [nats].
    """
    state = {k: v.clone() for k, v in merger.state_dict().items()}
    ratio = merger.log_ratio.clone()
    scores = [log_likelihoods(merger, table, held_out)]
    if merger.scale.frames is not None:
        merger.scale.frames.stop_flicker()
    fit(merger, table, config, epochs=epochs)
    scores.append(log_likelihoods(merger, table, held_out))
    on, off = (s[~s.isnan()] for s in scores)
    gain = (on - off).clamp(-1.0, 1.0)  # outliers say more than all the others
    error = float(gain.std()) / max(len(gain), 1) ** 0.5 if len(gain) > 1 else 0.0
    is_kept = len(gain) > 1 and float(gain.mean()) > error
    if is_kept:
        merger.load_state_dict(state)
        merger.log_ratio.copy_(ratio)
        merger.count(table)
    logger.info(
        "scales of single frames: %s; held-out observations gain %.4f +- %.4f",
        "kept" if is_kept else "left out",
        float(gain.mean()) if len(gain) else 0.0,
        error,
    )
    return [
        {"frames": name, "log_likelihood": float(s.mean()), "chosen": int(kept)}
        for name, s, kept in (("flicker", on, is_kept), ("smooth", off, not is_kept))
    ]
