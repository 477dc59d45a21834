"""Columns of intensities.h5, each read when it is first asked for."""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import gemmi
import h5py
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.symmetry import AsuMapping, to_asu
from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.intensity_file import (
    REMEDY,
    WITHOUT_CHECKSUMS,
    require_readable,
)

Array = NDArray[Any]
#: Indices are packed into one integer, 21 bits each.
_HALF = 1 << 20


class IntensityColumns:
    """An intensity file whose columns are read one by one: two million rows open at once.

    Parameters
    ----------
    path : Path
    depth : int, optional
        Layers of a shoebox; without it a spot is on the frames within three standard deviations
        of its rocking curve.

    Attributes
    ----------
    sweeps : list of dict
        What the file tells of each sweep.

    Raises
    ------
    UserError
        The file is damaged, none of intensities, or of a version without the places of boxes.
    """

    def __init__(self, path: Path, depth: int | None = None) -> None:
        self.path, self._depth = path, depth
        self._lock = threading.RLock()
        self._columns: dict[str, Array] = {}
        with reading(path, REMEDY), h5py.File(path) as handle:
            version, self.sweeps = require_readable(handle, path)
            self._n = len(handle["d"])
        if version < WITHOUT_CHECKSUMS or not self.sweeps:
            raise UserError(
                f"{path} is of version {version}, which does not say where the boxes of the spots "
                f"are; {REMEDY}"
            )

    def __len__(self) -> int:
        """Return the number of observations."""
        return self._n

    def __getitem__(self, name: str) -> Array:
        """Return a column, (N, ...), as in the file."""
        with self._lock:
            if name not in self._columns:
                with reading(self.path, REMEDY), h5py.File(self.path) as handle:
                    values = handle[name][()]
                # half the memory; no index, count or frame is beyond
                small = name not in {"flags"} and values.dtype == np.int64
                self._columns[name] = values.astype(np.int32) if small else values
            return self._columns[name]

    @cached_property
    def intensity(self) -> Array:
        """Maximum-likelihood J, (N,) [photons]."""
        return self["effective_counts"] / self["exposure"] - self["effective_background"]

    @cached_property
    def sigma(self) -> Array:
        """Standard deviation of J expected at its estimate, (N,) [photons]."""
        variance = np.maximum(self.intensity, 0) + self["effective_background"]
        return np.sqrt(variance / self["exposure"])

    @cached_property
    def image(self) -> Array:
        """Number of the image that the spot is centred on, (N,)."""
        first = np.array([s.get("image_range", (1,))[0] for s in self.sweeps])
        return np.floor(self["xyz_px"][:, 2]).astype(np.int32) + first[self["experiment"]]

    @cached_property
    def frames(self) -> tuple[Array, Array]:
        """First frame of each spot's box and the one after its last, (N,) each, from 0."""
        if self._depth is not None:
            first = self["corner"][:, 0]
            return first, first + self._depth * self["frames_per_layer"]
        centre, reach = self["xyz_px"][:, 2], 3 * self["frame_sigma"]
        return np.floor(centre - reach).astype(int), np.ceil(centre + reach).astype(int)

    @cached_property
    def space_group(self) -> gemmi.SpaceGroup:
        """Space group of the first sweep."""
        return gemmi.SpaceGroup(self.sweeps[0]["space_group"])

    @cached_property
    def _asu(self) -> AsuMapping:
        return to_asu(self["miller_index"], self.space_group)

    @property
    def asu_index(self) -> Array:
        """Index in the asymmetric unit, (N, 3), of Friedel mates the same."""
        return self._asu.miller_index

    @property
    def friedel_plus(self) -> Array:
        """Whether an observation is of F(+), (N,) bool; of centric reflections always."""
        return self._asu.friedel_sign > 0

    @cached_property
    def asu_key(self) -> Array:
        """:attr:`asu_index` as one number, (N,)."""
        return packed(self.asu_index)

    @cached_property
    def dataset(self) -> Array:
        """Data set of each observation, (N,), by its number."""
        names = [str(s.get("dataset", "")) for s in self.sweeps]
        number = {name: k for k, name in enumerate(dict.fromkeys(names))}
        return np.array([number[name] for name in names])[self["experiment"]]

    def equivalents(self, row: int) -> Array:
        """Rows of all symmetry mates of a row in its data set, Bijvoet mates too."""
        same = self.asu_key == self.asu_key[row]
        return np.flatnonzero(same & (self.dataset == self.dataset[row]))

    def on_frame(self, sweep: int, frame: int, panel: int | None = None) -> Array:
        """Rows whose boxes are on a frame (from 0), on one panel or all."""
        first, end = self.frames
        found = (self["experiment"] == sweep) & (first <= frame) & (frame < end)
        if panel is not None:
            found &= self["panel"] == panel
        return np.flatnonzero(found)


def packed(hkl: Array) -> Array:
    """Pack indices, (N, 3), into one number each, (N,) int64."""
    h, k, l = np.asarray(hkl, dtype=np.int64).T + _HALF
    return (h << 42) | (k << 21) | l
