"""Settings of the process that numerical work wants, made before torch is imported."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEEP_BYTES = (1 << 31) - 1  # mallopt takes an int


def tune_process() -> None:
    """Keep freed memory, and let idle threads sleep.

    By default glibc maps every large temporary anew and hands it back at once; faulting its pages
    in costs several times the arithmetic on it (measured: docs/experiments.md). Threads that spin
    while they wait slow each other down on a machine with other work. Both are left alone where
    the user has set them, and off Linux. All threads share one pool of memory: that of a thread's
    own is handed back whenever it is empty, which for a reader of frames is after each.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_ARENA_MAX, 1)


@contextmanager
def importing() -> Iterator[None]:
    """Import large packages without the garbage collector.

    It would go through all that they have made again and again. What they made lasts, and is left
    out of every later collection too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
