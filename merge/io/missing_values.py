"""Rows and columns without a number (NaN, or what a file declares as missing).

One NaN among the metadata would make a scale, and with it every amplitude, NaN.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from braggflux.merge.io.sweep_columns import ROCKING, SWEEP_COLUMNS

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: Spot positions, the usual ones first.
POSITIONS = (("X", "Y"), ("XDET", "YDET"), ("xobs", "yobs"))
PAIRS = (*POSITIONS, ("xyzobs_x", "xyzobs_y"))
#: Columns that say where an observation lies: the scale needs them.
PLACES = (*(n for pair in PAIRS for n in pair), "ROT", "ewald_offset", *SWEEP_COLUMNS, ROCKING)
#: A column is left out when more of the rows lack it, and else these rows are.
MOST = 0.1


def without_missing(
    columns: Mapping[str, Array], usable: NDArray[np.bool_], source: str
) -> tuple[dict[str, Array], NDArray[np.bool_]]:
    """Leave out rows without their place, and columns that too many rows lack.

    A row whose place is unknown cannot be scaled as the others are; to guess its place would put
    it on the scale of another. Columns that do not say the place keep their gaps: nothing reads
    them unless it is asked to.

    Parameters
    ----------
    columns : mapping of str to (N,)
    usable : (N,) bool
        Rows with an intensity.
    source : str
        The input, for messages.

    Returns
    -------
    dict of str to (N,)
        The columns that remain.
    ndarray, (N,) bool
        The rows that remain.
    """
    kept = dict(columns)
    gaps = {name: usable & ~np.isfinite(kept[name]) for name in PLACES if name in kept}
    gaps = {name: gap for name, gap in gaps.items() if gap.any()}
    n = max(int(usable.sum()), 1)
    whole = [p for p in POSITIONS if all(x in kept and x not in gaps for x in p)]
    for name, gap in gaps.items():
        share = gap.sum() / n
        is_spare = any(name in pair for pair in PAIRS) and whole
        if name in kept and (share > MOST or is_spare):
            log.warning(
                "%s: %s is missing in %.1f %% of the observations and is not used",
                source,
                name,
                100 * share,
            )
            for other in next((p for p in PAIRS if name in p), (name,)):
                kept.pop(other, None)  # half a position is none
    lost = np.zeros_like(usable)
    for name in gaps.keys() & kept.keys():
        lost |= gaps[name]
    if lost.any():
        log.warning(
            "%s: %d of %d observations are left out, which lack %s",
            source,
            lost.sum(),
            n,
            ", ".join(sorted(gaps.keys() & kept.keys())),
        )
    return kept, usable & ~lost
