"""Options of `run` and `process` that the other options switch off."""

from __future__ import annotations

from dataclasses import fields

from braggflux.pipelines.config.idle_options import Rule, say_idle
from braggflux.pipelines.config.run import DialsConfig, RunConfig

_MERGE_RULES: tuple[Rule, ...] = (
    (
        ("extraction.n_sigma",),
        lambda c: c.extraction.box is not None,
        "the size of the boxes is given",
    ),
    (
        tuple(
            f"merge.{name}"
            for name in ("absorption_order", "b_factor_spacing_deg", "drift_spacing_deg")
        ),
        lambda c: not c.merge.physical_scale,
        "merge.physical_scale is false",
    ),
    (
        ("merge.n_friedel_shells",),
        lambda c: not (c.merge.double_wilson and c.merge.anomalous),
        "Bijvoet mates are not coupled",
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
        ("expt", "refl", "reference"),
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
