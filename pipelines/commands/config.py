"""Print every option of a command with its meaning, kind of value and default.

The output is a YAML file for --config: keep the lines that you change. A single option is also
set by --set KEY=VALUE.

Examples
--------
braggflux config run
braggflux config merge > merge.yaml
"""

from __future__ import annotations

import argparse
import sys

from braggflux.merge.config import MergeConfig
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.config.schema import annotated_yaml

CONFIGS = {"run": RunConfig, "process": RunConfig, "merge": MergeConfig}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command whose options are wanted."""
    parser.add_argument("of_command", choices=tuple(CONFIGS), help="command with options")


def run(args: argparse.Namespace) -> None:
    """Print the defaults as annotated YAML."""
    sys.stdout.write(annotated_yaml(CONFIGS[args.of_command]()))
