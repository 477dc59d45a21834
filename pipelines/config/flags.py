"""Command-line flags that set options of :class:`braggflux.pipelines.config.run.RunConfig`.

A flag is a name and a dotted key; its help, type and default come from the option itself.
Precedence: defaults, then ``--config FILE``, then flags.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

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
    "--processes": "extraction.processes",
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

#: Heading in the help under which a flag stands; what none of these names is one of the model.
GROUPS = {
    "files": ("--model", "--out", "--reference", "--prior-model", "--reference-intensities"),
    "crystal and data": (
        *("--d-min", "--space-group", "--unit-cell", "--anomalous", "--stills", "--laue"),
        *("--parents", "--resolve-ambiguity"),
    ),
    "computing": ("--epochs", "--batch-size", "--device", "--seed", "--nproc", "--processes"),
}
OF_DIALS = "more parameters for steps of DIALS"
OTHERS = "model"
#: Placeholder in the help for a value of this type.
METAVARS = {"a path": "FILE", "a whole number": "N", "a number": "X", "text": "TEXT"}


def add_config_arguments(
    parser: argparse.ArgumentParser,
    flags: Mapping[str, str],
    cls: type = RunConfig,
    example: str = "training.checkpoint_every=2",
) -> None:
    """Add ``flags`` (name -> dotted key of ``cls``), ``--config``, ``--set`` and nothing else."""
    defaults = schema.flatten(schema.to_mapping(cls()))
    groups = {
        title: parser.add_argument_group(title)
        for title in (*GROUPS, OTHERS, OF_DIALS)
        if any(_group(flag) == title for flag in flags)
    }
    for flag, key in flags.items():
        hint, text = schema.find_option(cls, key)
        group = groups[_group(flag)]
        if hint is bool:
            # a flag only ever switches on
            text = re.sub(r"; false .*", "", text).removesuffix(".")
            group.add_argument(
                flag, dest=_destination(key), action="store_const", const="true", help=text
            )
            continue
        group.add_argument(
            flag,
            dest=_destination(key),
            # parts of a command line add up
            action="append" if schema.CommandLine in get_args(hint) else "store",
            metavar=_metavar(flag, hint),
            help=_help_text(text, defaults[key]).replace("%", "%%"),
        )
    rest = parser.add_argument_group("all other options")
    rest.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML or JSON file of options; flags win"
    )
    rest.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"any option by its key in the file, e.g. {example}; repeatable; "
        "`braggflux config COMMAND` lists all with their meaning",
    )


def _group(flag: str) -> str:
    """Heading under which ``flag`` stands in the help."""
    if flag.endswith("-args"):
        return OF_DIALS
    return next((title for title, flags in GROUPS.items() if flag in flags), OTHERS)


def _metavar(flag: str, hint: Any) -> str:
    """Name what stands for the value of ``flag`` in the help: its choices, or its kind."""
    kind = schema.type_name(hint).removesuffix(", or null")
    if kind.startswith("one of "):
        return "{" + kind.removeprefix("one of ").replace(", ", ",") + "}"
    return "DIR" if flag == "--out" else METAVARS.get(kind, "VALUES")


def _help_text(text: str, default: object) -> str:
    """Help of an option for people who give flags: null is the word of a file."""
    text = re.sub(r"\bwhen null\b", "unless given", text.removesuffix("."))
    return text if default in (None, (), []) else f"{text} [{default}]"


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
