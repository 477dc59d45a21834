"""Observations at sudden steps of the beam: a shutter's fault, an attenuator that was moved.

How much of a reflection lies on either side of a step is known no better than its rocking curve.
What lies on one side only has the level of its images, whatever that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.training import start
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.model.merger import Merger
from braggflux.merge.problem import MergeProblem

#: Share of the observations at steps beyond which these are how the beam is, and stay.
MOST = 0.1


@dataclass(frozen=True)
class Steps:
    """Images that no drift or flicker explains, and what crosses into them or out of them.

    Parameters
    ----------
    levels : dict of int to float
        Scale over the drift of the sweep, by the image's number in the table.
    rows : (n,)
        Observations that cross, as rows of the files counted through all; none where they are
        too many to be left out.
    """

    levels: dict[int, float]
    rows: NDArray[np.int64]


@torch.no_grad()
def find_steps(problem: MergeProblem, config: MergeConfig) -> Steps:
    """Compare the first scales of all frames with the drift of their sweeps.

    Parameters
    ----------
    problem : MergeProblem
        Of all observations.
    config : MergeConfig
    """
    nothing = Steps({}, np.zeros(0, dtype=np.int64))
    if problem.table.sweeps is None:
        return nothing
    with torch.random.fork_rng(devices=[]):
        merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    frames = merger.scale.frames
    if frames is None or not bool(frames.is_odd.any()):
        return nothing
    frame, image = frames.centre_frame().numpy(), problem.table.observations.image.numpy()
    is_odd = frames.is_odd.numpy()[frame]
    level = (frames.log_frame_scale - frames.slow_drift()).exp().numpy()[frame]
    levels = {
        int(k): float(np.median(level[own]))
        for k in np.unique(image[is_odd])
        if is_odd[own := image == k].mean() > 0.5
    }
    crosses = frames.crosses_steps().numpy()
    rows = problem.source[crosses] if crosses.mean() < MOST else nothing.rows
    return Steps(levels, rows)


def without_rows(data: Sequence[UnmergedData], rows: NDArray[np.int64]) -> list[UnmergedData]:
    """Leave out rows of the files, counted through all."""
    keep = np.ones(sum(len(d) for d in data), dtype=bool)
    keep[rows] = False
    ends = np.cumsum([len(d) for d in data])[:-1]
    return [d.select(own) for d, own in zip(data, np.split(keep, ends), strict=True)]
