"""Sample shoeboxes for the page: counts, fitted rate, residual and posterior of single spots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from braggflux.integrator.errors import reading
from braggflux.pipelines.report.figures.panels import numbers

MAX_SHOEBOXES = 36
#: Kinds of examples by the array ``kind``, and what they are.
KINDS = {
    "sample": "From weak to strong",
    "mates": "Disagree most with their symmetry mates",
    "dials": "Disagree most with DIALS",
}


def examples(path: Path) -> dict[str, Any]:
    """Boxes of each kind; every further (n,) or (n, 3) array of the file is shown as words.

    Returns
    -------
    dict
        Heading of each kind to a list of boxes: ``images`` (name to (slow, fast) sums over the
        frames), ``words``, and ``row`` in intensities.h5 (None where unknown).
    """
    if not path.is_file():
        return {}
    with reading(path, "delete it to go without it"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file}
        return _boxes(arrays)


def _boxes(arrays: dict[str, Any]) -> dict[str, Any]:
    """Boxes of each kind of the arrays of a file."""
    counts, rate = arrays.pop("counts"), arrays.pop("rate", None)
    is_valid = arrays.pop("is_valid", np.ones(counts.shape, bool)).astype(bool)
    kinds = arrays.pop("kind", np.full(len(counts), "sample"))
    rows = arrays.pop("row", None)
    boxes: dict[str, Any] = {}
    for i in range(min(len(counts), MAX_SHOEBOXES)):
        expected = None if rate is None else rate[i]
        words = {name.replace("_", " "): entry(values[i]) for name, values in arrays.items()}
        box = {
            "images": images(counts[i], expected, is_valid[i]),
            "words": words,
            "row": None if rows is None else int(rows[i]),
        }
        boxes.setdefault(KINDS.get(str(kinds[i]), str(kinds[i])), []).append(box)
    return boxes


def images(counts: Any, rate: Any, is_valid: Any) -> dict[str, Any]:
    """Sum counts, model and residual in sigma of one box over its frames.

    Parameters
    ----------
    counts, rate : (D, H, W)
        Photons and expected photons; without ``rate`` there are the counts alone.
    is_valid : (D, H, W) bool
        A pixel that no frame has is None.
    """
    blank = ~is_valid.any(axis=0)
    observed = np.where(blank, np.nan, np.where(is_valid, counts, 0).sum(axis=0))
    if rate is None:
        return {"counts": numbers(observed, 4)}
    expected = np.where(blank, np.nan, np.where(is_valid, rate, 0.0).sum(axis=0))
    residual = (observed - expected) / np.sqrt(np.maximum(expected, 1e-3))
    return {
        "counts": numbers(observed, 4),
        "model": numbers(expected, 3),
        "residual": numbers(residual, 2),
    }


def entry(value: Any) -> str:
    """Write a number or vector with four digits."""
    return " ".join(_word(x) for x in np.atleast_1d(value))


def _word(x: Any) -> str:
    if x.dtype.kind != "f":
        return str(x)
    return f"{x:.4g}" if np.isfinite(x) else "–"
