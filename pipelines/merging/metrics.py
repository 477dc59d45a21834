"""metrics.json of a merge: predictions of what was held out, and what the fit has found."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braggflux.merge.indexing.operators import Ambiguity
from braggflux.merge.model.merger import IntensityMerger
from braggflux.pipelines.merging.indexing import summary
from braggflux.pipelines.workspace.rundir import write_text

logger = logging.getLogger(__name__)


def write_metrics(
    path: Path,
    merger: IntensityMerger,
    predictions: Mapping[str, Any],
    ambiguity: Ambiguity | None = None,
) -> None:
    """Write them, and log the lines that a user wants to see."""
    errors, prior = merger.likelihood.error_parameters, merger.prior
    tensor = prior.anisotropic_b()
    row = {
        "held_out": predictions,
        "error_model": errors,
        "one_minus_r2": prior.one_minus_r2.tolist() if prior.is_coupled else None,
        "sigma_a": prior.reference.sigma_a2.sqrt().tolist() if len(prior.reference.rows) else None,
        "anisotropic_b": None if tensor is None else tensor.tolist(),
    }
    if ambiguity is not None:
        row["indexing"] = summary(ambiguity)
    write_text(path, json.dumps(row, indent=2) + "\n")
    logger.info("error model: %s", " ".join(f"{k} {v:.4g}" for k, v in errors.items()))
    for name, p in predictions.items():
        if p["cc_pred"] is not None:
            logger.info(
                "held out by %s: %d, CCpred %.4f, log-likelihood %.4f",
                *(name, p["n_obs"], p["cc_pred"], p["log_likelihood"]),
            )
