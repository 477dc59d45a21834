"""The prior that a configuration names. A new one is a file with its class and a line here."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.prior.base import AmplitudePrior
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.reference import Reference
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.rows import UniqueRows

Maker = Callable[[AmplitudePrior, UniqueRows, MergeConfig], AmplitudePrior]

#: Value of the setting ``prior`` -> what stands on Wilson's prior, or on that of a model.
PRIORS: dict[str, Maker] = {
    "wilson": lambda below, rows, config: below,
    "double-wilson": lambda below, rows, config: DoubleWilson(
        below, rows, config.n_correlation_shells
    ),
}


def check_prior(name: str) -> None:
    """Check that there is a prior of this name.

    Raises
    ------
    UserError
    """
    if name not in {"auto", *PRIORS}:
        raise UserError(f"prior must be one of auto, {', '.join(PRIORS)}, got {name!r}")


def prior_name(rows: UniqueRows, config: MergeConfig) -> str:
    """Key of :data:`PRIORS`; under "auto", rows that have parents resemble them."""
    if config.prior != "auto":
        return config.prior
    return "double-wilson" if (rows.parent >= 0).any() else "wilson"


def build_prior(
    rows: UniqueRows, config: MergeConfig, f_calc: Tensor | None = None
) -> AmplitudePrior:
    """Make the prior of all rows.

    Parameters
    ----------
    rows : UniqueRows
    config : MergeConfig
    f_calc : Tensor, (R,), optional
        Amplitudes of a model on any scale, NaN where there is none.

    Raises
    ------
    UserError
        There is no prior of the configured name.
    """
    check_prior(config.prior)
    prior: AmplitudePrior = Wilson.of_rows(rows, config.n_wilson_knots, config.anisotropic)
    if f_calc is not None:
        prior = Reference(prior, f_calc, config.n_reference_shells)
    return PRIORS[prior_name(rows, config)](prior, rows, config)
