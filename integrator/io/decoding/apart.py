"""HDF5 files of others, read in a process whose crash is harmless.

The HDF5 library and some decoders crash, or never end, on some damage. So a file is read once as
far as opening it goes (structure, mask, places of the frames) by a process of its own, before
this one opens it, with the mask that the other has decoded; and frames whose packing cannot be
checked first are decoded there, each time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError

LENGTH_BYTES = 8
"""Of a request's length, which stands before it."""
CPU_SECONDS = 60
"""That opening a file, or reading one frame, may take; it takes a few at most."""


class Apart:
    """A process that reads HDF5 files; what it does is in ``server.py``.

    It ends with this object, or with this process. One thread may ask at a time.
    """

    def __init__(self) -> None:
        # -P: no module of the current folder is imported
        command = [sys.executable, "-P", "-m", "braggflux.integrator.io.decoding.server"]
        # it forks, which is safe without threads, and multiplies nothing
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._close = weakref.finalize(self, _end, self._process)

    def ask(self, request: Any, array: NDArray[Any] | None = None) -> dict[str, Any]:
        """Send a request, and wait for what becomes of it.

        Parameters
        ----------
        request : any
            Becomes JSON.
        array : ndarray, optional
            Filled with the bytes of the answer.

        Returns
        -------
        dict
            Empty where all is well, but for ``content``: the bytes of the answer where no array
            was given for them. ``end`` says how the process that worked on the request has
            crashed, ``error`` what was wrong.
        """
        try:
            return self._ask(request, array)
        except BaseException:  # half an answer may be left
            self._close()
            raise

    def _ask(self, request: Any, array: NDArray[Any] | None) -> dict[str, Any]:
        to, source = self._process.stdin, self._process.stdout
        assert to is not None
        assert source is not None
        text = json.dumps(request).encode()
        to.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        to.flush()
        line = source.readline()
        if not line:
            code = self._process.wait()
            raise OSError(f"the process that reads HDF5 files has ended (exit code {code})")
        answer: dict[str, Any] = json.loads(line)
        size = answer.pop("bytes", None)
        if size is not None:
            if array is None:
                array = answer["content"] = np.empty(size, np.uint8)
            if size != array.nbytes:
                raise OSError(f"it has {size} bytes, not {array.nbytes}")
            content = array.reshape(-1).view(np.uint8).data
            n_read = 0
            while n_read < size:
                part = source.read(size - n_read)
                if not part:
                    raise OSError(f"it ends after {n_read} of {size} bytes")
                content[n_read : n_read + len(part)] = part
                n_read += len(part)
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.kill()
    process.wait()


def opened_apart(
    path: str | Path,
    panel_names: Sequence[str],
    panel_shapes: Sequence[tuple[int, int]],
    needed: Sequence[int],
) -> NDArray[np.bool_] | None:
    """Let another process open the frames of a master file first.

    Parameters
    ----------
    path, panel_names, panel_shapes, needed
        As of :class:`braggflux.integrator.io.hdf5.nxmx.NxmxFrames`.

    Returns
    -------
    ndarray, (pixels,) bool, or None
        Good pixels of a frame, for that class; None where they are not those of every frame, or
        something is wrong that this process will find itself.

    Raises
    ------
    UserError
        That has crashed, or did not end.
    """
    request = {
        "open": str(path),
        "names": list(panel_names),
        "shapes": list(panel_shapes),
        "needed": list(needed),
    }
    answer = asked_apart(request, f"{path} or a file that it names")
    good: NDArray[np.uint8] | None = answer.get("content")
    return None if good is None else good.view(np.bool_)


def asked_apart(request: dict[str, Any], source: object) -> dict[str, Any]:
    """Ask another process something about a file.

    Parameters
    ----------
    request : dict
        A row of the table in ``server.py``.
    source : object
        The file, in words.

    Returns
    -------
    dict
        The answer.

    Raises
    ------
    UserError
        That has crashed, or did not end.
    """
    apart = _taken()
    answer = apart.ask(request | {"seconds": CPU_SECONDS})
    _give_back(apart)
    if "end" in answer:
        raise UserError(f"{source} is damaged: reading it {answer['end']}; copy it again")
    return answer


class FramesApart:
    """Raw frames of a master file, decoded by another process; several threads may ask.

    Parameters
    ----------
    path, needed
        As of :class:`braggflux.integrator.io.hdf5.frames.FrameStack`.
    """

    def __init__(self, path: str | Path, needed: Sequence[int] | None) -> None:
        self._request = {
            "stack": str(path),
            "needed": None if needed is None else list(needed),
            "seconds": CPU_SECONDS,
        }
        self._apart: Apart | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the files."""
        if self._apart is not None:
            with suppress(OSError, ValueError):  # it has ended
                self._apart.ask(None)
                _give_back(self._apart)
            self._apart = None

    def read(self, number: int, array: NDArray[Any]) -> None:
        """Fill an array with a frame.

        Raises
        ------
        OSError, UserError
            The frame cannot be decoded.
        """
        with self._lock:
            apart, self._apart = self._apart, None
            answer = {}
            if apart is None:
                apart = _taken()
                answer = apart.ask(self._request)
            if not answer:
                answer = apart.ask(number, array)
                if "end" not in answer:
                    self._apart = apart
            if self._apart is None:  # who has opened the files is no more
                _give_back(apart)
        if "error" in answer:
            raise UserError(answer["error"])
        if answer:
            raise OSError(f"reading it {answer['end']}")


_idle: dict[int, list[Apart]] = {}


def _taken() -> Apart:
    """Take a process that has nothing to do; a forked program has none of its parent's."""
    waiting = _idle.setdefault(os.getpid(), [])
    return waiting.pop() if waiting else Apart()


def _give_back(apart: Apart) -> None:
    _idle.setdefault(os.getpid(), []).append(apart)
