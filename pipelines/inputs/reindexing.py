"""Reindexing operators of the command line: which input, which operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from braggflux.integrator.errors import UserError

Dataset = TypeVar("Dataset")


def parse_reindex(texts: Sequence[str]) -> tuple[tuple[int | None, str], ...]:
    """Read ``0:k,h,-l`` (one dataset) and ``k,h,-l`` (all); ``none`` does nothing.

    Raises
    ------
    UserError
    """
    parsed = []
    for text in texts:
        number, colon, operator = text.rpartition(":")
        if colon and not number.strip().isdigit():
            raise UserError(
                f"--reindex {text}: {number!r} is not the number of a dataset, counted from 0; "
                "give N:OPERATOR, e.g. 1:k,h,-l"
            )
        if operator.strip().lower() != "none":
            parsed.append((int(number) if colon else None, operator.strip()))
    return tuple(parsed)


def apply_reindex(
    data: Sequence[Dataset],
    operators: Sequence[tuple[int | None, str]],
    reindex: Callable[[Dataset, str], Dataset],
) -> list[Dataset]:
    """Reindex the named datasets, in memory or on disk, one operator after the other.

    Raises
    ------
    UserError
        A dataset does not exist, or an operator is none for it.
    """
    data = list(data)
    for number, operator in operators:
        if number is not None and number >= len(data):
            raise UserError(
                f"--reindex {number}:{operator}: dataset {number} does not exist; allowed are 0 "
                f"to {len(data) - 1}"
            )
        for k in range(len(data)) if number is None else (number,):
            data[k] = reindex(data[k], operator)
    return data
