"""Memory that the program may take, and how much there is."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

from braggflux.integrator.errors import UserError

#: That the program and its libraries take before any data [bytes].
OF_PROGRAM = 0.5e9
_PAGE = resource.getpagesize()


def limit_memory(gigabytes: float) -> None:
    """Make allocations fail that would take more than this in all.

    Raises
    ------
    UserError
        It is too little to begin with.
    """
    n_bytes = gigabytes * 1e9
    if not OF_PROGRAM < n_bytes < 1e15:
        raise UserError(
            f"--max-memory must be above {OF_PROGRAM / 1e9:g} GB, which the program itself takes, "
            f"got {gigabytes:g}"
        )
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    within = n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (int(within), hard))


def available_bytes() -> float:
    """Memory that is left [bytes]: of the machine, of its container, of the process' limits.

    Infinite where the system does not say.
    """
    left = [float("inf")]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable:"))
        left.append(float(free.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        most = float((group / "memory.max").read_text())
        left.append(most - float((group / "memory.current").read_text()))
    for limit, column in ((resource.RLIMIT_DATA, 5), (resource.RLIMIT_AS, 0)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            with suppress(OSError, ValueError, IndexError):
                pages = Path("/proc/self/statm").read_text().split()[column]
                left.append(soft - float(pages) * _PAGE)
    return max(min(left), 0.0)
