"""The process that reads HDF5 files of others, and may crash: ``python -m ...server``.

It takes requests as JSON, each after its length. Each is worked on by a process that it forks,
which answers with a line of JSON, empty where all is well; when that process crashes, this one
says how.

==============================================  ================================================
``{"kind": PATH}``                               name the kind of the file
``{"open": PATH, "names", "shapes", "needed"}``  open frames, send which pixels are good
``{"stack": PATH, "needed"}``                    open frames; then, for each number, answer, and
                                                 send the bytes of that frame; the end at ``null``
==============================================  ================================================
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.io.decoding.apart import LENGTH_BYTES
from braggflux.integrator.io.hdf5.frames import FrameStack
from braggflux.integrator.io.hdf5.nxmx import NxmxFrames


def main() -> None:
    """Serve until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks decides when it is the end
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody asks any more
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for request in _requests():
        child = os.fork()
        if child == 0:
            try:
                _work(request)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGXCPU:
            _answer({"end": f"took more than {request['seconds']} s"})
        elif code:
            _answer({"end": f"crashed the HDF5 library (exit code {code})"})


def _requests() -> Iterator[Any]:
    """Read requests, no byte ahead: that would be lost to the forked process."""
    while length := _read(LENGTH_BYTES):
        yield json.loads(_read(int.from_bytes(length, "little")))


def _read(size: int) -> bytes:
    """Read so many bytes; fewer where nobody asks any more."""
    content = bytearray()
    while len(content) < size and (part := os.read(0, size - len(content))):
        content += part
    return bytes(content)


def _answer(answer: dict[str, str | None], content: NDArray[np.uint8] | None = None) -> None:
    if content is None:
        parts = [memoryview(json.dumps(answer).encode() + b"\n")]
    else:
        parts = [memoryview(json.dumps({"bytes": content.nbytes}).encode() + b"\n"), content.data]
    for part in parts:
        while part:
            part = part[os.write(1, part) :]


def _work(request: dict[str, Any]) -> None:
    """Do what is asked for."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # last words of a crash
    _allow(request["seconds"])
    if "kind" in request:
        # what it imports, the start of every command that opens frames would pay for
        from braggflux.integrator.io.file_kinds import hdf5_kind

        _answer({"kind": hdf5_kind(request["kind"])})
        return
    needed = request["needed"]
    if "open" in request:
        shapes = [(slow, fast) for slow, fast in request["shapes"]]
        try:
            with NxmxFrames(
                request["open"], request["names"], shapes, needed, may_crash=True
            ) as frames:
                good = frames.good_pixels()
        except Exception:  # noqa: BLE001 - whoever asks will meet the same, and say it
            good = None
        _answer({}, None if good is None else good.reshape(-1).view(np.uint8))
        return
    try:
        stack = FrameStack(request["stack"], needed, may_crash=True)
    except Exception as error:  # noqa: BLE001
        _answer({"error": str(error)})
        return
    _answer({})
    for number in _requests():
        if number is None:
            _answer({})
            return
        _allow(request["seconds"])
        try:
            frame = np.ascontiguousarray(stack.read(number)).reshape(-1).view(np.uint8)
        except Exception as error:  # noqa: BLE001
            _answer({"error": str(error)})
        else:
            _answer({}, frame)


def _allow(seconds: int) -> None:
    """Let the next step take so much CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    if most != resource.RLIM_INFINITY:
        limit = min(limit, most)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, most))


if __name__ == "__main__":
    main()
