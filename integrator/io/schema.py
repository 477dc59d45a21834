"""Plain values of files, JSON or MessagePack, made typed records by a schema.

The schema is a :class:`msgspec.Struct`; what a field may be is in its type
(``Annotated[float, Meta(gt=0)]``). Bounds are given on both sides, so that NaN and infinities are
outside.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

Record = TypeVar("Record")

Real = Annotated[float, Meta(ge=-1e300, le=1e300)]
"""Any number but NaN and the infinities."""
Wavelength = Annotated[float, Meta(ge=0.01, le=200.0)]
"""[A]: from electrons of 1 MeV to cold neutrons."""
ImageNumber = Annotated[int, Meta(ge=-(10**9), le=10**9)]
Vector = tuple[Real, Real, Real]
Length = Annotated[float, Meta(ge=1.0, le=1e5)]
Angle = Annotated[float, Meta(ge=1.0, le=179.0)]
CellParameters = tuple[Length, Length, Length, Angle, Angle, Angle]
"""[A, degrees]"""


def converted(document: Any, kind: type[Record]) -> Record:
    """Make a typed record of plain values.

    Parameters
    ----------
    document : object
        Nested mappings, lists, numbers and text.
    kind : type
        The schema.

    Raises
    ------
    ValueError
        ``beam[0].wavelength is -1.0, expected `float` >= 0.01``.
    """
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_in_words(document, str(error))) from error


def _in_words(document: Any, message: str) -> str:
    """Place, value and what is allowed, of a message of msgspec."""
    what, _, place = message.partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    what = what[:1].lower() + what[1:]
    if "..." in place:  # values of a mapping, whose key it does not tell
        return f"{place}: {what}"
    value = document
    for key in re.findall(r"[^.\[\]]+", place):
        try:
            value = value[int(key) if isinstance(value, (list, tuple)) else key]
        except (LookupError, TypeError, ValueError):
            return f"{place}: {what}"
    text = repr(value)
    text = text if len(text) < 60 else f"{text[:57]}..."
    return f"{place} is {text}, {what}" if place else f"the file is {text}, {what}"
