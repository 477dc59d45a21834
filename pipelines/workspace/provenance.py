"""Provenance of an output: program, machine, arguments and digests of the input files."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "scipy", "gemmi", "h5py", "hdf5plugin", "dxtbx")
#: Larger files are named with their size but not read through.
DIGEST_LIMIT_BYTES = 2**30


def session_record() -> dict[str, Any]:
    """Program, arguments and machine of this process, with the time of the call."""
    return {
        "started": now(),
        "ended": None,
        "braggflux": package_version(),
        "git": git_state(),
        "argv": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "gpu": _gpu_name(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def package_version() -> str:
    """Version of the installed distribution, or ``unknown`` in a bare source tree."""
    return _version("braggflux") or "unknown"


def git_state() -> dict[str, Any] | None:
    """Commit of the source tree and whether it has uncommitted changes; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=30,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "has_uncommitted_changes": bool(status)}


def input_records(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Path, size and sha256 of each input file."""
    return {name: file_record(path) for name, path in files.items()}


def file_record(path: Path) -> dict[str, Any]:
    """Path, size [bytes] and sha256 of one file; a large file has a reason instead of a digest."""
    size = path.stat().st_size
    record: dict[str, Any] = {"path": str(path), "size": size, "sha256": None}
    if size > DIGEST_LIMIT_BYTES:
        return record | {"reason": f"larger than {DIGEST_LIMIT_BYTES} bytes"}
    with path.open("rb") as stream:
        return record | {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def now() -> str:
    """Return the current time, UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu_name() -> str | None:
    # Only a process that already uses torch can be using its GPU; importing it here costs seconds.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()
