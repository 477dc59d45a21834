"""Loops over pixels, compiled by Numba: for what NumPy needs many passes over a frame for.

Machine code is kept beside the module (or in the user's cache folder), so that only the first run
after an installation compiles. A function that is called from another one must be in the same
module, or else a change of it goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function at its first call, for the types it is called with; it holds no lock."""
    try:
        made = numba.njit(function, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # no folder is writable: compiled in every run
        made = numba.njit(function, nogil=True, error_model="numpy")
    return cast(Function, made)
