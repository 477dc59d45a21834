r"""Resolution limit of the data without stray indices, which must not set that of all others.

Rows fill reciprocal space, whose volume to resolution d goes as v = 1 / d^3. Behind the real end
there may be a few rows with wrong indices, far from all others: one of them at 0.6 A among data to
2 A would make thirty times as many unique reflections, nearly all without an observation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

#: Rows beyond the end are strays if they are at most so many, or this share of all,
MAX_STRAYS, MAX_SHARE = 5, 2e-3
#: behind a gap of this share of the volume within,
GAP = 0.1
#: in which so many rows are missing for each of them, if rows were as dense there as the last ones
#: within. Data that fade out, as those cut at 3 sigma do, have no such gap.
MISSING, N_LAST = 100, 30


def largest_inv_d2(values: Iterable[Array], n_rows: int) -> Array:
    """Return the largest ``1 / d^2``, falling, of as many as strays may be and the last within.

    Parameters
    ----------
    values : iterable of (n,)
        [1/A^2], piece by piece.
    n_rows : int
        Of all pieces.
    """
    wanted = _most_strays(n_rows) + N_LAST + 1
    largest = np.empty(0)
    for piece in values:
        largest = np.concatenate([largest, piece])
        if len(largest) > wanted:
            largest = np.partition(largest, -wanted)[-wanted:]
    return np.sort(largest)[::-1]


def n_strays(largest: Array, n_rows: int) -> int:
    """Count the rows that lie alone beyond the end of the data.

    Parameters
    ----------
    largest : (k,)
        Of :func:`largest_inv_d2`.
    n_rows : int
    """
    volume = largest**1.5
    most = min(_most_strays(n_rows), len(volume) - N_LAST - 1)
    if most < 1:
        return 0
    beyond = np.arange(1, most + 1)
    last = volume[beyond]
    gap = volume[beyond - 1] - last
    # equivalents of one reflection lie at one place
    spacing = np.maximum((last - volume[beyond + N_LAST]) / N_LAST, last / n_rows)
    is_end = (gap >= GAP * last) & (gap >= MISSING * beyond * spacing) & (last > 0)
    return int(beyond[is_end].max(initial=0))


def end_of_data(values: Iterable[Array], n_rows: int, d_min: float | None, name: str) -> float:
    """Resolution limit of a dataset [A]: ``d_min`` where given, else that of its data.

    Parameters
    ----------
    values : iterable of (n,)
        ``1 / d^2`` of all rows [1/A^2], piece by piece.
    n_rows : int
    d_min : float, optional
        That the user gives; then nothing is taken for a stray.
    name : str
        Of the dataset, for the message.
    """
    largest = largest_inv_d2(values, n_rows)
    n = 0 if d_min is not None else n_strays(largest, n_rows)
    if n:
        d = largest**-0.5
        logger.warning(
            "%s: %d of %d observations lie alone beyond %.2f A (to %.2f A), where the data end; "
            "they are left out (--d-min %.3g keeps them)",
            *(name, n, n_rows, d[n], d[0], 0.99 * d[0]),
        )
    # a hair beyond: the reflection that sets the limit is inside
    return max(float(largest[n]) ** -0.5 * (1 - 1e-6), d_min or 0.0)


def _most_strays(n_rows: int) -> int:
    return max(MAX_STRAYS, int(MAX_SHARE * n_rows))
