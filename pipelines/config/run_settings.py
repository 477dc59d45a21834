"""Options of `run` and `process` that the other options switch off."""

from __future__ import annotations

from dataclasses import fields

from braggflux.pipelines.config.idle_options import Rule, say_idle
from braggflux.pipelines.config.run import DialsConfig, RunConfig

#: Settings of the merge that a run of one crystal's sweeps has no use for.
OF_MERGES_ALONE = (
    *("stills", "laue", "laue_lp", "flicker", "metadata", "overloads", "alternatives", "pairing"),
    *("resolve_ambiguity", "ambiguity_tolerance", "reference_intensities"),
    *("n_spectrum_knots", "network_width", "network_depth"),
    *("embedding_size", "image_parameters", "falloff", "wilson_b", "held_out"),
    *("stream_above", "stream_training", "network_learning_rate", "half_set_repeats"),
)


def _is_coupled(c: RunConfig) -> bool:
    """Whether a prior ties amplitudes to each other."""
    return c.merge.prior != "wilson" and (c.merge.anomalous or c.parents is not None)


_MERGE_RULES: tuple[Rule, ...] = (
    (
        ("extraction.n_sigma",),
        lambda c: c.extraction.box is not None or c.trained_integrator is not None,
        "the size of the boxes is given",
    ),
    (
        ("integrator.profile_em_rounds",),
        lambda c: c.trained_integrator is not None,
        "the profile is that of the trained integrator",
    ),
    (
        ("integrator.learning_rate", "integrator.profile_learning_rate"),
        lambda c: c.training.epochs == 0,
        "nothing is trained in 0 epochs",
    ),
    (
        tuple(
            f"merge.{name}"
            for name in (
                *("absorption_order", "b_factor_spacing_deg", "drift_spacing_deg"),
                "detector_network_width",
            )
        ),
        lambda c: not c.merge.physical_scale,
        "merge.physical_scale is false",
    ),
    (
        ("merge.n_correlation_shells",),
        lambda c: not _is_coupled(c) or c.merge.correlation,
        "r of relatives is not estimated",
    ),
    (
        ("merge.n_reference_shells",),
        lambda c: c.prior_model is None,
        "there is no --prior-model",
    ),
    (
        ("merge.prior",),
        lambda c: c.merge.prior == "double-wilson" and not _is_coupled(c),
        "Bijvoet mates are merged together (merge.anomalous is false), and there are no --parents",
    ),
    (
        ("merge.correlation",),
        lambda c: not _is_coupled(c),
        "no amplitudes are coupled",
    ),
    (
        ("merge.sigma",),
        lambda c: c.parents is None,
        "no data set has parents, and F(+), F(-) are each from its own observations",
    ),
    (
        ("merge.dof",),
        lambda c: c.merge.likelihood == "normal",
        "a Normal has no degrees of freedom",
    ),
    (
        tuple(f"merge.{name}" for name in ("epochs", "batch_size", "seed", "device", "d_min")),
        lambda c: True,
        "a run has training.epochs, .merge_steps, .seed, .device and extraction.d_min",
    ),
    (
        tuple(f"merge.{name}" for name in OF_MERGES_ALONE),
        lambda c: True,
        "it is for `braggflux merge`",
    ),
)
_RUN_RULES: tuple[Rule, ...] = (
    (
        tuple(f"dials.{f.name}" for f in fields(DialsConfig)),
        lambda c: True,
        "DIALS is run by `braggflux process` only",
    ),
)
_PROCESS_RULES: tuple[Rule, ...] = (
    (
        ("expt", "refl", "reference", "more_data", "parents"),
        lambda c: True,
        "`braggflux process` makes its own; `braggflux run` takes given ones",
    ),
    (
        ("dials.integrate_args", "dials.scale_args", "dials.merge_args"),
        lambda c: not c.dials.has_reference,
        "DIALS does the geometry only",
    ),
)


def say_idle_of_run(config: RunConfig, *, is_process: bool = False) -> None:
    """Warn of changed options without effect."""
    rules = _MERGE_RULES + (_PROCESS_RULES if is_process else _RUN_RULES)
    say_idle(config, rules, config, RunConfig())
