"""Search, filters and order of the list of reflections."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.pipelines.view.columns import IntensityColumns

Array = NDArray[Any]

PAGE = 50
#: Orders that the list offers, and the column each is by.
ORDERS: dict[str, Callable[[IntensityColumns, Array | None], Array]] = {
    "row": lambda columns, z: np.arange(len(columns)),
    "index": lambda columns, z: columns.asu_key,
    "resolution": lambda columns, z: columns["d"],
    "image": lambda columns, z: columns.image,
    "J": lambda columns, z: columns.intensity,
    "sigma": lambda columns, z: columns.sigma,
    "signal": lambda columns, z: columns.intensity / columns.sigma,
    "background": lambda columns, z: columns["background"],
    "flags": lambda columns, z: columns["flags"],
    "z": lambda columns, z: _magnitude(columns, z),
}
#: Bits of the flags in words.
FLAGS = {
    1: "cut by an edge",
    2: "core masked",
    4: "overlapped",
    8: "not integrated",
    16: "defect",
}


@dataclass(frozen=True)
class Query:
    """What to list. An empty text leaves a filter out.

    Parameters
    ----------
    hkl : str
        Three indices, ``*`` for any.
    equivalents : str
        With any text, symmetry mates of ``hkl`` too, Bijvoet mates among them.
    d_from, d_to : str
        Resolution [A], either way round.
    z : str
        Least distance from what the merge expects [sigma].
    flag : str
        A bit that is set, ``none`` for no bit at all.
    image : str
        Number of an image that the box is on.
    sweep : str
        Number of the sweep, from 0.
    order, down, page : str
        One of :data:`ORDERS`; any text for descending; page from 1.
    """

    hkl: str = ""
    equivalents: str = ""
    d_from: str = ""
    d_to: str = ""
    z: str = ""
    flag: str = ""
    image: str = ""
    sweep: str = ""
    order: str = "row"
    down: str = ""
    page: str = "1"

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Query:
        """Make a query of the parameters of an address; unknown ones are ignored."""
        names = {f.name for f in fields(cls)}
        given = {k: v.strip()[:64] for k, v in parameters.items() if k in names and v.strip()}
        return cls(**given)

    @property
    def needs_z(self) -> bool:
        """Whether the deviations are asked for."""
        return bool(self.z) or self.order == "z"


class Search:
    """Lists of rows, with the order by each column kept.

    Parameters
    ----------
    columns : IntensityColumns
    """

    def __init__(self, columns: IntensityColumns) -> None:
        self.columns = columns
        self._order: dict[str, Array] = {}
        self._lock = threading.Lock()

    def rows(self, query: Query, z: Array | None = None) -> tuple[Array, int, int]:
        """Rows of a page, how many there are on all pages, and the number of the page.

        Parameters
        ----------
        query : Query
        z : ndarray, (N,), optional
            Deviation of each row [sigma], NaN for none; None before the model is loaded.

        Raises
        ------
        UserError
            A filter cannot be read.
        """
        keep = self._filter(query, z)
        order = self._sorted(query.order, z)
        found = order if keep is None else order[keep[order]]
        n_pages = max(-(-len(found) // PAGE), 1)
        page = int(min(max(number(query.page, "page", whole=True), 1), n_pages))
        first = (page - 1) * PAGE
        if query.down:
            found = found[::-1]
        return found[first : first + PAGE], len(found), page

    def _sorted(self, name: str, z: Array | None) -> Array:
        if name not in ORDERS:
            raise UserError(f"order must be one of {', '.join(ORDERS)}, got {name!r}")
        with self._lock:
            if name not in self._order:
                values = ORDERS[name](self.columns, z)
                self._order[name] = np.argsort(values, kind="stable").astype(np.int32)
            return self._order[name]

    def _filter(self, query: Query, z: Array | None) -> Array | None:
        """Whether to list each row, (N,); None for all."""
        parts = []
        if query.hkl:
            parts.append(self._of_index(query.hkl, with_mates=bool(query.equivalents)))
        if query.d_from or query.d_to:
            limits = [number(x, "resolution") for x in (query.d_from, query.d_to) if x]
            low = min(limits) if len(limits) == 2 or query.d_to else 0.0
            high = max(limits) if len(limits) == 2 or query.d_from else np.inf
            parts.append((self.columns["d"] >= low) & (self.columns["d"] <= high))
        if query.z:
            parts.append(_magnitude(self.columns, z) >= number(query.z, "z"))
        if query.flag == "none":
            parts.append(self.columns["flags"] == 0)
        elif query.flag:
            bit = number(query.flag, "flag", whole=True)
            parts.append(self.columns["flags"] & int(bit) != 0)
        if query.sweep:
            wanted = number(query.sweep, "sweep", whole=True)
            parts.append(self.columns["experiment"] == wanted)
        if query.image:
            parts.append(self._on_image(number(query.image, "image", whole=True)))
        if not parts:
            return None
        return np.logical_and.reduce(parts)

    def _of_index(self, text: str, *, with_mates: bool) -> Array:
        words = re.split(r"[\s,;]+", text.strip("() "))
        if len(words) != 3 or not all(re.fullmatch(r"\*|[+-]?\d{1,5}", w) for w in words):
            raise UserError(f"an index has three numbers, * for any, like 1 0 *; got {text!r}")
        columns = self.columns
        if with_mates and "*" not in words:
            from braggflux.integrator.crystal.symmetry import to_asu
            from braggflux.pipelines.view.columns import packed

            asu = to_asu(np.array([[int(w) for w in words]]), columns.space_group).miller_index
            return columns.asu_key == packed(asu)[0]
        keep = np.ones(len(columns), bool)
        for axis, word in enumerate(words):
            if word != "*":
                keep &= columns["miller_index"][:, axis] == int(word)
        return keep

    def _on_image(self, image: float) -> Array:
        first_image = np.array([s.get("image_range", (1,))[0] for s in self.columns.sweeps])
        frame = image - first_image[self.columns["experiment"]]
        first, end = self.columns.frames
        return (first <= frame) & (frame < end)


def flag_words(flags: int) -> str:
    """Say the flags of a reflection in words; empty for none."""
    return ", ".join(word for bit, word in FLAGS.items() if flags & bit)


def number(text: str, name: str, *, whole: bool = False) -> float:
    """Return the number in a text.

    Raises
    ------
    UserError
        There is none, or it is not finite, or not whole where it must be.
    """
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value) or (whole and (value != int(value) or abs(value) > 1e12)):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} must be {kind}, got {text!r}")
    return value


def _magnitude(columns: IntensityColumns, z: Array | None) -> Array:
    """Absolute deviations, -1 where there is none."""
    if z is None:
        raise UserError(
            "z needs the model of the run, which is not there (yet): wait, or order otherwise"
        )
    return np.nan_to_num(np.abs(z), nan=-1.0)
