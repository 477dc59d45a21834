"""Reading the next batch of a store while the present one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")


def read_ahead(read: Callable[[Key], Item], keys: Iterable[Key]) -> Iterator[tuple[Key, Item]]:
    """Yield each key with its item, in order; a thread reads one item in advance.

    Reading and sorting hold the interpreter for a small part of their time only. An error of
    ``read`` is raised where its item is asked for.
    """
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for key in keys:
            following = key, pool.submit(read, key)
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1].result()
