"""Packages that only a part of the Python interface needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from braggflux.integrator.errors import UserError


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Name the package that is missing, and what for; hide what it says while it is imported.

    Parameters
    ----------
    what : str
        What it is needed for.

    Raises
    ------
    UserError
    """
    try:
        with warnings.catch_warnings():
            # Debian's pandas complains of its own optional packages
            warnings.simplefilter("ignore", UserWarning)
            yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} need the package {error.name}, which is not installed: "
            "pip install 'braggflux[notebook]'"
        ) from error
