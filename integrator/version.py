"""Version of the program, for the files that it writes."""

from __future__ import annotations

from importlib import metadata


def software() -> str:
    """Name and version; the version is ``unknown`` in a source tree that is not installed."""
    try:
        return f"braggflux {metadata.version('braggflux')}"
    except metadata.PackageNotFoundError:
        return "braggflux unknown"
