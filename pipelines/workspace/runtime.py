"""Settings of the process that numerical work wants, made before torch is imported."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEEP_BYTES = (1 << 31) - 1  # mallopt takes an int


def tune_process() -> None:
    """Keep freed memory, and let idle threads sleep.

    By default glibc maps every large temporary anew and hands it back at once; faulting its pages
    in costs several times the arithmetic on it (measured: docs/experiments.md). Threads that spin
    while they wait slow each other down on a machine with other work. Both are left alone where
    the user has set them, and off Linux.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_ARENA_MAX, 1)
