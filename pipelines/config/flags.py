"""Command-line flags that set options of :class:`braggflux.pipelines.config.run.RunConfig`.

A flag is a name and a dotted key; its help, type and default come from the option itself.
Precedence: defaults, then ``--config FILE``, then flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, get_args

from braggflux.integrator.errors import UserError
from braggflux.pipelines.config import schema
from braggflux.pipelines.config.run import RunConfig

Config = TypeVar("Config", bound=schema.Dataclass)

RUN_FLAGS = {
    "--model": "model",
    "--out": "out",
    "--reference": "reference",
    "--prior-model": "prior_model",
    "--free-r": "merge.free_r",
    "--integrator": "trained_integrator",
    "--coupling": "training.coupling",
    "--epochs": "training.epochs",
    "--batch-size": "training.batch_size",
    "--device": "training.device",
    "--seed": "training.seed",
    "--d-min": "extraction.d_min",
}

MERGE_FLAGS = {
    "--anomalous": "anomalous",
    "--stills": "stills",
    "--laue": "laue",
    "--d-min": "d_min",
    "--metadata": "metadata",
    "--likelihood": "likelihood",
    "--dof": "dof",
    "--resolve-ambiguity": "resolve_ambiguity",
    "--reference-intensities": "reference_intensities",
    "--free-r": "free_r",
    "--prior": "prior",
    "--correlation": "correlation",
    "--epochs": "epochs",
    "--batch-size": "batch_size",
    "--half-set-repeats": "half_set_repeats",
    "--device": "device",
    "--seed": "seed",
}


def add_config_arguments(
    parser: argparse.ArgumentParser,
    flags: Mapping[str, str],
    cls: type = RunConfig,
    example: str = "training.checkpoint_every=2",
) -> None:
    """Add ``flags`` (name -> dotted key of ``cls``), ``--config``, ``--set`` and nothing else."""
    defaults = schema.flatten(schema.to_mapping(cls()))
    for flag, key in flags.items():
        hint, text = schema.find_option(cls, key)
        if hint is bool:
            parser.add_argument(
                flag, dest=_destination(key), action="store_const", const="true", help=text
            )
            continue
        default = "" if defaults[key] is None else f"; default {defaults[key]}"
        parser.add_argument(
            flag,
            dest=_destination(key),
            # parts of a command line add up
            action="append" if schema.CommandLine in get_args(hint) else "store",
            metavar=flag.lstrip("-").replace("-", "_").upper(),
            help=f"{text} [{schema.type_name(hint)}{default}]".replace("%", "%%"),
        )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML or JSON file of options; flags win"
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"any option by its key in the file, e.g. {example}; repeatable; the config.yaml "
        "that is written explains all",
    )


def config_from_args(
    cls: type[Config],
    args: argparse.Namespace,
    flags: Mapping[str, str],
    fixed: Mapping[str, object] | None = None,
) -> Config:
    """Combine defaults, ``--config``, ``--set``, flags and ``fixed`` (dotted key -> value)."""
    given = schema.load_mapping(args.config) if args.config else {}
    config = schema.from_mapping(cls, given)
    overrides: dict[str, object] = {}
    for assignment in args.assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set must be KEY=VALUE, got {assignment!r}")
        overrides[key] = value
    for key in flags.values():
        value = getattr(args, _destination(key))
        if value is not None:
            overrides[key] = value
    return schema.updated(config, overrides | dict(fixed or {}))


def _destination(key: str) -> str:
    return key.replace(".", "__")
