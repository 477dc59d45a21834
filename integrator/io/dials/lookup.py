"""Masks and maps that an image set names besides its images (DIALS' ``external_lookup``).

``dials.generate_mask`` and others write them as Python pickles of flex arrays, one per panel.
Unpickling would run what the file says. Here the few steps that make such an array are followed,
with the few names that it needs, which stand for records of this module: nothing is imported,
nothing else can be called, and DIALS is not needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickletools import genops
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Experiment, ExternalLookup
from braggflux.integrator.errors import UserError

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class LookupMaps:
    """What is known of the pixels besides the images; one array per panel, (slow, fast).

    Parameters
    ----------
    mask : list of ndarray of bool, optional
        True = usable.
    gain : list of ndarray, optional
        ADU per photon, instead of the panels'.
    pedestal : list of ndarray, optional
        [ADU], instead of the panels'.
    """

    mask: list[NDArray[np.bool_]] | None = None
    gain: list[NDArray[np.float64]] | None = None
    pedestal: list[NDArray[np.float64]] | None = None


def read_lookup(lookup: ExternalLookup, shapes: Shapes) -> LookupMaps:
    """Read mask, gain and pedestal of an image set.

    Parameters
    ----------
    lookup : ExternalLookup
    shapes : sequence of (int, int)
        (slow, fast) of each panel.

    Raises
    ------
    UserError
        When a file is missing, is no pickle of flex arrays, or belongs to another detector.
    """
    return LookupMaps(
        mask=_read(lookup.mask, "mask", bool, shapes),
        gain=_read(lookup.gain, "gain map", float, shapes),
        pedestal=_read(lookup.pedestal, "pedestal map", float, shapes),
    )


def read_offsets(experiment: Experiment) -> list[NDArray[np.float64]] | None:
    """Read the distortion maps of an experiment's images.

    Parameters
    ----------
    experiment : Experiment

    Returns
    -------
    list of ndarray, (2, slow, fast), or None
        Per panel what is added to the (fast, slow) position [pixels] of the ideal detector.

    Raises
    ------
    UserError
        See :func:`read_lookup`; when one map is missing, or both are where positions need them.
    """
    lookup = experiment.images.lookup if experiment.images else ExternalLookup()
    if lookup.dx is None and lookup.dy is None:
        if any(panel.is_distorted for panel in experiment.panels):
            raise UserError(
                "the .expt was refined with distortion maps, but its image set names none (dx, "
                "dy); import again with lookup.dx=dx.pickle lookup.dy=dy.pickle"
            )
        return None
    if lookup.dx is None or lookup.dy is None:
        raise UserError(
            f"of the distortion maps the .expt names only {lookup.dx or lookup.dy}; import again "
            "with both, lookup.dx=dx.pickle lookup.dy=dy.pickle"
        )
    shapes = tuple(panel.shape for panel in experiment.panels)
    return list(_offsets(lookup.dx, lookup.dy, shapes))


@lru_cache(maxsize=4)  # positions are predicted several times
def _offsets(dx: str, dy: str, shapes: Shapes) -> tuple[NDArray[np.float64], ...]:
    fast = _read(dx, "distortion map", float, shapes)
    slow = _read(dy, "distortion map", float, shapes)
    return tuple(np.stack(both) for both in zip(fast or (), slow or (), strict=True))


def _read(path: str | None, what: str, kind: type, shapes: Shapes) -> list[NDArray[Any]] | None:
    """Read one file, None where there is none, and check that it fits the panels."""
    if path is None:
        return None
    arrays = read_flex(path, what)
    found = [array.shape for array in arrays]
    if any(array.dtype != kind for array in arrays) or found != list(shapes):
        types = sorted({str(array.dtype) for array in arrays})
        raise UserError(
            f"{path}, the {what} of the images, holds {' and '.join(types)} arrays of {found} "
            f"pixels; the panels of the .expt need {np.dtype(kind)} of {list(shapes)}: give the "
            "file made for this detector"
        )
    return arrays


def read_flex(path: str | Path, what: str = "map") -> list[NDArray[Any]]:
    """Read a pickled flex array, or a tuple of them, without running what the file says.

    Parameters
    ----------
    path : str or Path
    what : str
        What the file should be, for messages.

    Returns
    -------
    list of ndarray
        Of bool (``flex.bool``) or float64 (``flex.double``).

    Raises
    ------
    UserError
        When the file is missing, or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            content = _follow(file)
        members = content if isinstance(content, tuple) else (content,)
        return [member.array() for member in members]
    except OSError as error:
        raise UserError(
            f"cannot read {path}, the {what} of the images ({error.strerror}); copy it there, or "
            "correct the path in the .expt"
        ) from error
    except Exception as error:
        raise UserError(
            f"{path}, the {what} of the images, is no pickle of DIALS' flex arrays ({error}); "
            "give one as dials.generate_mask writes it"
        ) from error


class _Grid:
    """``flex.grid``: the shape of an array."""

    def __init__(self, first: tuple[int, ...], last: tuple[int, ...], is_open: bool) -> None:
        self.shape = tuple(b - a + (not is_open) for a, b in zip(first, last, strict=True))

    def build(self, focus: tuple[int, ...]) -> None:
        """Take over the state."""
        if tuple(focus) != self.shape:
            raise ValueError("padded array")


class _Flex(ABC):
    """A flex array: what it needs to be one is in its state."""

    def build(self, state: tuple[_Grid, bytes | str]) -> None:
        """Take over the state."""
        self._grid, text = state
        self._text = text.encode("latin1") if isinstance(text, str) else text  # of Python 2

    def array(self) -> NDArray[Any]:
        """Decode the elements (``scitbx/serialization``, single-buffered)."""
        length = max(self._text[0], 1)
        size = int.from_bytes(self._text[1:length], "little")
        if size != math.prod(self._grid.shape):
            raise ValueError("size and shape differ")
        return self._elements(self._text[length:], size).reshape(self._grid.shape)

    @staticmethod
    @abstractmethod
    def _elements(text: bytes, size: int) -> NDArray[Any]:
        """Decode ``size`` elements."""


class _FlexBool(_Flex):
    @staticmethod
    def _elements(text: bytes, size: int) -> NDArray[np.bool_]:
        """One character each, 1 or 0."""
        return np.frombuffer(text, np.uint8, size) == ord("1")


class _FlexDouble(_Flex):
    @staticmethod
    def _elements(text: bytes, size: int) -> NDArray[np.float64]:
        """Mantissa and exponent to the base 2, in as many bytes each as they need.

        The first byte of either is its length, itself included, plus 128 when negative; zero is
        one byte alone.
        """
        first = np.empty(size, dtype=np.int64)
        at = 0
        for i in range(size):
            first[i] = at
            length = text[at] & 127
            at += length or 1
            if length:
                at += text[at] & 127 or 1
        data = np.frombuffer(text, np.uint8)
        exponent_at = np.minimum(first + (data[first] & 127), len(data) - 1)
        fraction = _digits(data, first, [256.0**-k for k in range(1, 9)])
        exponent = _digits(data, exponent_at, [256.0 ** (k - 1) for k in range(1, 9)])
        return np.ldexp(fraction, exponent.astype(int))


def _digits(
    data: NDArray[np.uint8], first: NDArray[np.int64], weights: Sequence[float]
) -> NDArray[np.float64]:
    """Sum of the digits of signed numbers that start at ``first``; exact, the smallest first."""
    length = data[first] & 127
    total = np.zeros(len(first))
    for k, weight in sorted(enumerate(weights, 1), key=lambda item: item[1]):
        has = length > k
        total[has] += data[first[has] + k].astype(float) * weight
    return np.where(data[first] > 128, -total, total)


_NAMES: dict[str, Callable[..., Any]] = {
    "scitbx_array_family_flex_ext bool": _FlexBool,
    "scitbx_array_family_flex_ext double": _FlexDouble,
    "scitbx_array_family_flex_ext grid": _Grid,
    "_codecs encode": str.encode,  # bytes in pickles of protocol 2
}
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LENGTHS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _follow(file: IO[bytes]) -> Any:
    """Return what a pickle of flex arrays holds."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    value: Any  # of the kind that each step has
    for step, value, _ in genops(file):
        name = step.name
        if name == "STOP":
            break
        if name in ("PROTO", "FRAME"):
            continue
        if name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name.endswith("PUT"):
            memo[int(value)] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[int(value)])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "TUPLE" or name in _LENGTHS:
            first = len(stack) - _LENGTHS[name] if name in _LENGTHS else marks.pop()
            stack[first:] = [tuple(stack[first:])]
        elif name == "GLOBAL":
            stack.append(_known(value))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_known(" ".join(stack[-2:]))]
        elif name == "REDUCE":
            call, arguments = stack[-2:]
            stack[-2:] = [call(*arguments)]
        elif name == "BUILD":
            stack[-2].build(stack.pop())
        elif step.arg is not None:  # numbers, bytes and text
            stack.append(value)
        else:
            raise ValueError(f"it has the step {name}")
    (content,) = stack
    return content


def _known(name: str) -> Callable[..., Any]:
    """Return what a name of a module, given as ``module name``, stands for."""
    if name not in _NAMES:
        raise ValueError(f"it names {name.replace(' ', '.')}")
    return _NAMES[name]
