"""Images that do not fit: far brighter or fainter than their neighbours, or other reflections.

The scale takes up what an image lacks in brightness, and Student's t forgives rows that fit
nowhere, so that neither shows in the result. A user wants to know: a shutter that opened late, ice
that came, a few images indexed otherwise than the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.merge.data.table import ObservationTable
from braggflux.merge.model.merger import Merger

Array = NDArray[np.float64]

#: Neighbours on each side that say what is usual.
N_NEIGHBOURS = 3
#: Log-scale against the neighbours that is odd: at least this, and so many robust deviations.
LEAST_STEP, N_DEVIATIONS = float(np.log(1.6)), 6.0
#: Median of squared residual over variance, over that of a Normal, that is odd: at least this, and
#: so many times what the images usually have.
LEAST_MISFIT, N_TIMES = 6.0, 6.0
MEDIAN_CHI2 = 0.4549
MIN_OBSERVATIONS = 10


@dataclass(frozen=True)
class OddImages:
    """Images that do not fit, by their number in the table.

    Parameters
    ----------
    faint : dict of int to float
        Scale over that of the neighbours.
    alien : dict of int to float
        Squared residuals over what the error model expects.
    """

    faint: dict[int, float]
    alien: dict[int, float]


@torch.no_grad()
def odd_images(merger: Merger, table: ObservationTable, is_still: bool) -> OddImages:
    """Compare the images of a fitted merge.

    Parameters
    ----------
    merger : Merger
    table : ObservationTable
    is_still : bool
        Images are not neighbours of each other: their scales say nothing.
    """
    batch = table.everything()
    e = merger.generative(batch, merger.inference())
    o = batch.observations
    image = o.image.numpy()
    order = np.argsort(image, kind="stable")
    starts = np.flatnonzero(np.diff(image[order], prepend=-1))
    known = batch.of_first_terms(batch.terms.base_log_scale)
    log_scale = (e.scale.log() - known).numpy()
    chi2 = ((o.intensity - e.mean) ** 2 / e.alone.variance).numpy() / MEDIAN_CHI2
    enough = np.diff(np.append(starts, len(order))) >= MIN_OBSERVATIONS
    misfit = np.array([np.median(part) for part in np.split(chi2[order], starts[1:])])
    usual = max(LEAST_MISFIT, N_TIMES * float(np.median(misfit)))
    alien = {int(k): float(misfit[k]) for k in np.flatnonzero(enough & (misfit > usual))}
    faint: dict[int, float] = {}
    if not is_still:
        level = np.array([np.median(part) for part in np.split(log_scale[order], starts[1:])])
        part = np.repeat(np.arange(len(table.images_of_dataset)), table.images_of_dataset)
        step = against_neighbours(level, part)
        spread = 1.4826 * float(np.median(np.abs(step)))
        odd = enough & (np.abs(step) > max(LEAST_STEP, N_DEVIATIONS * spread))
        faint = {int(k): float(np.exp(step[k])) for k in np.flatnonzero(odd)}
    return OddImages(faint, alien)


def against_neighbours(level: Array, part: NDArray[np.int64]) -> Array:
    """Difference of each image from the median of its neighbours, (G,).

    Parameters
    ----------
    level, part : (G,)
        In the order of the images; those of another part are no neighbours.
    """
    step = np.zeros(len(level))
    for k in range(len(level)):
        near = np.arange(max(0, k - N_NEIGHBOURS), min(len(level), k + N_NEIGHBOURS + 1))
        near = near[(near != k) & (part[near] == part[k])]
        if len(near) >= 3:
            step[k] = level[k] - np.median(level[near])
    return step
