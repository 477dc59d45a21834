"""Laws of the measurements by the names that users give them (``--likelihood``)."""

from __future__ import annotations

from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.likelihood.alternatives import WithAlternatives
from braggflux.merge.likelihood.base import IndependentLikelihood, ObservationLikelihood
from braggflux.merge.likelihood.student_t import Normal, StudentT

LIKELIHOODS: dict[str, type[IndependentLikelihood]] = {
    "studentt": StudentT,
    "normal": Normal,
}


def likelihood_class(name: str) -> type[IndependentLikelihood]:
    """Find a law by its name.

    Raises
    ------
    UserError
    """
    if name not in LIKELIHOODS:
        raise UserError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {name!r}")
    return LIKELIHOODS[name]


def build_likelihood(table: ObservationTable, config: MergeConfig) -> ObservationLikelihood:
    """Make the configured law for a table."""
    law = likelihood_class(config.likelihood).build(table, config)
    return WithAlternatives(law) if config.has_alternatives else law
