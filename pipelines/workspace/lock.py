"""One writer at a time of a folder of results, or of a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from braggflux.integrator.atomic import remove_leftovers, writing
from braggflux.integrator.errors import UserError
from braggflux.pipelines.workspace.provenance import now

LOCK = ".lock"
#: What a file system answers that knows no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
#: Folders that this process holds: `process` calls `run` in its own.
_held: set[Path] = set()


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; it is made when missing, removed when left empty.

    The operating system gives the lock back when its holder dies, however it dies: what a killed
    run leaves is no obstacle. Where a file system has no locks, the record of host and process in
    the file decides.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    UserError
        Another process is writing there.
    """
    folder = folder.absolute()
    if folder in _held:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out must name a folder")
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / LOCK, folder):
            _held.add(folder)
            try:
                yield
            finally:
                _held.discard(folder)
    finally:
        for made in missing:
            with contextlib.suppress(OSError):  # it holds results
                made.rmdir()


@contextmanager
def one_writer_of_file(path: Path) -> Iterator[None]:
    """Hold the name of a file that a command writes, and remove what a killed one has left.

    Parameters
    ----------
    path : Path
        Its folder is there.

    Raises
    ------
    UserError
        Another process is writing it.
    """
    with _locked(path.with_name(f".{path.name}{LOCK}"), path):
        remove_leftovers(path.parent, path.name)
        yield


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock file of a folder or a file."""
    handle = _acquire(path, target)
    try:
        yield
    finally:
        # unlinked while held: who has opened it meanwhile sees in _acquire that it is gone
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, target: Path) -> int:
    """Open and lock; the descriptor."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            record = _holder(handle)
            if error.errno not in _NO_LOCKS or _is_alive(record):
                os.close(handle)
                raise UserError(_refusal(path, target, record)) from error
        if _is_still(handle, path):
            break
        os.close(handle)
    record = {"host": socket.gethostname(), "pid": os.getpid(), "since": now()}
    try:
        with writing(path):
            os.ftruncate(handle, 0)
            text = json.dumps(record).encode()
            while text:  # a full disk takes a part, and refuses the rest
                text = text[os.write(handle, text) :]
    except UserError:
        path.unlink(missing_ok=True)
        os.close(handle)
        raise
    return handle


def _is_still(handle: int, path: Path) -> bool:
    """Whether the locked file has kept its name."""
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _holder(handle: int) -> dict[str, object]:
    try:
        record = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_alive(record: dict[str, object]) -> bool:
    """Whether the holder may be at work; one on another machine may."""
    pid = record.get("pid")
    if record.get("host") != socket.gethostname():
        return bool(record)
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()


def _refusal(path: Path, target: Path, record: dict[str, object]) -> str:
    who = "another process"
    if record:
        who = f"process {record.get('pid')} on {record.get('host')}, since {record.get('since')},"
    return (
        f"{who} is writing {target}; wait until it ends, choose another --out, or "
        f"(where that process is gone) remove {path}"
    )
