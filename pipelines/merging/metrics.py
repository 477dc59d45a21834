"""metrics.json of a merge: predictions of what was held out, and what the fit has found."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braggflux.merge.indexing.operators import Ambiguity
from braggflux.merge.model.merger import Merger
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.reference import Reference
from braggflux.merge.prior.wilson import Wilson
from braggflux.pipelines.merging.indexing import summary
from braggflux.pipelines.workspace.rundir import write_text

logger = logging.getLogger(__name__)


def write_metrics(
    path: Path,
    merger: Merger,
    predictions: Mapping[str, Any],
    ambiguity: Ambiguity | None = None,
) -> None:
    """Write metrics.json and log a summary."""
    errors, prior = merger.likelihood.error_parameters, merger.prior
    tensor = prior.part(Wilson).anisotropic_b()
    share = prior.part(DoubleWilson).by_shell().tolist() if prior.is_coupled else None
    sigma_a = prior.part(Reference).sigma_a2.sqrt().tolist() if prior.has(Reference) else None
    row = {
        "held_out": predictions,
        "error_model": errors,
        "one_minus_r2": share,
        "sigma_a": sigma_a,
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
