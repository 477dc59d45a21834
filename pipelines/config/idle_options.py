"""Options that were changed from their defaults and do nothing, because others switch them off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from braggflux.pipelines.config import schema

logger = logging.getLogger(__name__)

#: Dotted keys of options, when they are idle, and why.
Rule = tuple[tuple[str, ...], Callable[[Any], bool], str]


def say_idle(state: Any, rules: Sequence[Rule], config: Any, standard: Any) -> None:
    """Warn of each option that differs from its default and is idle.

    Parameters
    ----------
    state
        What the rules ask.
    rules : sequence of Rule
    config, standard : dataclass
        Options as given, and their defaults.
    """
    changed = schema.difference(config, standard)
    for keys, is_idle, reason in rules:
        named = [f"{key}={changed[key]}" for key in keys if key in changed]
        if named and is_idle(state):
            logger.warning("without effect: %s (%s)", ", ".join(named), reason)
