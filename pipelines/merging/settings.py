"""Settings of a merge made definite; warnings of those without effect."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.io.observations import PHOTON_VARIANCE, UnmergedData
from braggflux.merge.likelihood.registry import likelihood_class
from braggflux.merge.prior.registry import check_prior
from braggflux.merge.problem import MergeProblem
from braggflux.pipelines.config.idle_options import Rule, say_idle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """Options, and whether parents, a model's amplitudes and saved scales go with them."""

    config: MergeConfig
    has_parents: bool
    has_model: bool
    has_scales: bool


def _is_scan(a: _Asked) -> bool:
    return not (a.config.stills or a.config.laue)


def _keeps_falloff(a: _Asked) -> bool:
    return a.config.falloff == "scale" or (a.config.falloff == "auto" and a.config.laue)


#: Options that the other options switch off.
RULES: tuple[Rule, ...] = (
    (("laue_lp", "n_spectrum_knots"), lambda a: not a.config.laue, "they are for --laue"),
    (
        (
            *("absorption_order", "flicker"),
            *("b_factor_spacing_deg", "drift_spacing_deg", "detector_network_width"),
        ),
        lambda a: not (_is_scan(a) and a.config.physical_scale),
        "only rotation data with a physical scale have frame scales, B, absorption and response",
    ),
    (("dof",), lambda a: a.config.likelihood == "normal", "a Normal has no degrees of freedom"),
    (
        ("n_correlation_shells",),
        lambda a: a.config.prior == "wilson",
        "no amplitudes are coupled; give --parents or --anomalous",
    ),
    (
        ("sigma",),
        lambda a: not a.has_parents,
        "no dataset has parents, and F(+), F(-) are each from its own observations",
    ),
    (("n_correlation_shells",), lambda a: a.config.correlation is not None, "r is given"),
    (("n_reference_shells",), lambda a: not a.has_model, "there is no --prior-model"),
    (
        ("reference_intensities", "ambiguity_tolerance"),
        lambda a: a.config.stills and a.config.resolve_ambiguity == "none",
        "each image keeps its indices (--resolve-ambiguity none)",
    ),
    (
        ("metadata", "network_depth", "embedding_size"),
        lambda a: a.config.network_width == 0,
        "there is no scale network (network_width=0)",
    ),
    (
        ("alternatives",),
        lambda a: a.config.network_width == 0 and a.config.alternatives == "on",
        "they need the scale network (network_width=0)",
    ),
    (
        ("wilson_b",),
        lambda a: not _keeps_falloff(a),
        "the amplitudes keep the falloff; give falloff=scale too",
    ),
    (
        ("falloff",),
        lambda a: a.config.falloff == "sphere" and not a.config.stills,
        "only stills know their distance from the Ewald sphere",
    ),
    (
        ("stream_above", "stream_training", "image_parameters"),
        lambda a: not a.config.stills,
        "they are for --stills",
    ),
    (
        ("learning_rate", "network_learning_rate"),
        lambda a: a.has_scales,
        "scales and error model are those of --freeze-scales",
    ),
)


def settled(
    config: MergeConfig,
    parents: Sequence[int | None] | None,
    *,
    has_model: bool = False,
    has_scales: bool = False,
) -> MergeConfig:
    """Return ``config`` with what "auto" means, and warn of options without effect.

    To name parents, or r, is to ask for the double-Wilson prior; to name parents is to ask for
    the sigma of the difference as well. Whether there are Bijvoet mates the data say: with
    ``anomalous`` the prior stays "auto".

    Parameters
    ----------
    config : MergeConfig
    parents : sequence of int or None, optional
        Of each dataset.
    has_model : bool
        Amplitudes of a model are the prior.
    has_scales : bool
        Scales come from an earlier merge.

    Raises
    ------
    UserError
        Parents or r are given together with Wilson's prior, or an unknown likelihood or prior.
    """
    likelihood_class(config.likelihood)
    check_prior(config.prior)
    has_parents = any(parent is not None for parent in parents or ())
    asked = ["--parents"] * has_parents + ["--correlation"] * (config.correlation is not None)
    if config.prior == "wilson" and asked:
        raise UserError(
            f"{' and '.join(asked)} cannot act under --prior wilson, where every amplitude is for "
            "itself; leave --prior out, or give --prior double-wilson"
        )
    prior = config.prior
    if prior == "auto" and asked:
        prior = "double-wilson"
    elif prior == "auto" and not config.anomalous:
        prior = "wilson"
    sigma = config.sigma
    if sigma == "auto":
        sigma = "difference" if has_parents else "amplitude"
    if has_parents and "auto" in (config.prior, config.sigma):
        logger.info("parents are named: prior %s, sigma of the %s", prior, sigma)
    config = replace(config, prior=prior, sigma=sigma)
    standard = replace(MergeConfig(), prior=prior, sigma="amplitude")
    say_idle(_Asked(config, has_parents, has_model, has_scales), RULES, config, standard)
    return config


def say_what_data_leave_idle(
    config: MergeConfig, problem: MergeProblem, data: Sequence[UnmergedData]
) -> None:
    """Warn of options for which the files lack what they act on."""
    is_scan, sweeps = not (config.stills or config.laue), problem.table.sweeps
    has_network = sweeps is None or config.metadata is not None
    has_offset = bool((problem.table.terms.ewald_offset != 0).any())
    rules: tuple[Rule, ...] = (
        (
            ("network_width", "network_depth", "embedding_size"),
            lambda _: is_scan and not has_network and config.network_width > 0,
            "a physical scale does without the network; give --metadata to have both",
        ),
        (
            ("alternatives",),
            lambda _: is_scan and not has_network and config.alternatives == "on",
            "they need the network, which a physical scale does without; give --metadata",
        ),
        (
            ("absorption_order",),
            lambda _: sweeps is not None and not (sweeps.has_beams or sweeps.has_positions),
            "the files do not say where observations lie on their sweeps",
        ),
        (
            ("detector_network_width",),
            lambda _: sweeps is not None and not sweeps.has_positions,
            "the files do not say where on the detector observations lie",
        ),
        (
            ("photon_counts",),
            lambda _: not any(PHOTON_VARIANCE in d.metadata for d in data),
            "the files hold no photon counts",
        ),
        (
            ("falloff",),
            lambda _: config.falloff == "sphere" and config.stills and not has_offset,
            "the files do not say how far reflections are from the Ewald sphere",
        ),
    )
    say_idle(None, rules, config, MergeConfig())
