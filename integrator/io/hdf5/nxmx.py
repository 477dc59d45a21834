"""NXmx and Eiger HDF5: frames as recorded, per panel, with mask codes made INVALID.

See the NeXus application definition NXmx and the Dectris Eiger file writer ("nearly NXmx", whose
mask and cut-off are in ``detectorSpecific``). Geometry is not read here: DIALS does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.decoding.chunk_check import require_decodable
from braggflux.integrator.io.hdf5.files import is_class
from braggflux.integrator.io.hdf5.frames import FrameStack
from braggflux.integrator.io.hdf5.photons import INVALID, Pixels

_Cut = tuple[int | slice, ...]
_LARGEST = np.iinfo(np.int32).max


class NxmxFrames:
    """Frames of an NXmx master file, cut into panels.

    Parameters
    ----------
    path : str or Path
        Master file.
    panel_names : sequence of str
        Names of the panels wanted, in order. dxtbx names a panel after the path of its
        ``NXdetector_module``; with other names the modules are taken in file order. One panel of
        the size of the whole image takes it all, whatever the modules.
    panel_shapes : sequence of (int, int)
        (slow, fast) of each panel.
    needed : sequence of int, optional
        Frame numbers that will be read; see :class:`FrameStack`.
    may_crash : bool
        See :class:`FrameStack`.
    good : ndarray, (pixels,) bool, optional
        What :meth:`good_pixels` of another process has returned; else the mask is decoded here.

    Attributes
    ----------
    n_images : int

    Raises
    ------
    UserError
        When files are missing or damaged, or the panels are not those of the file.
    """

    def __init__(
        self,
        path: str | Path,
        panel_names: Sequence[str],
        panel_shapes: Sequence[tuple[int, int]],
        needed: Sequence[int] | None = None,
        *,
        may_crash: bool = False,
        good: NDArray[np.bool_] | None = None,
    ) -> None:
        self._stack = FrameStack(path, needed, may_crash=may_crash)
        self._may_crash, self._good = may_crash, good
        try:
            self.n_images = self._stack.n_images
            self._needed = range(self.n_images) if needed is None else needed
            self._detector = self._find_detector()
            self._panels = self._find_panels(list(panel_names), list(panel_shapes))
            self._largest, self._codes = self._mask_codes()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    def read(self, number: int) -> list[Pixels]:
        """Return frame ``number`` (0-based), one (slow, fast) array per panel [ADU].

        INVALID where the detector says that there is no value: a mask code of the stored type
        (2^n - 1 and 2^n - 2 of n bits; of ``bit_depth_image`` bits too when the frame is stored
        with more; the smallest of a signed type), not a number. Other negative values stay: only
        the trusted range of the panel tells whether -1 is a code or noise. The file's own
        ``saturation_value`` is not applied: dxtbx makes the trusted range of it, which the user
        may change.
        """
        raw = self._stack.read(number)
        if raw.dtype.kind == "f":
            image = np.where(np.isfinite(raw), raw, INVALID)
        else:
            image = raw.astype(np.int32)
            image[raw > self._largest] = INVALID
            if raw.dtype.kind == "i":
                image[raw <= max(np.iinfo(raw.dtype).min, INVALID)] = INVALID
        for code in self._codes:
            image[raw == code] = INVALID
        masks = self._masks[1]
        if masks is not None:
            image[masks[number] != 0] = INVALID
        return [image[panel] for panel in self._panels]

    def read_stored(self, number: int) -> list[NDArray[np.unsignedinteger[Any]]] | None:
        """Return frame ``number`` as stored, where the highest values of its type are the codes.

        None for frames with other codes, or a mask for each image. Valid until the same thread
        reads another frame.
        """
        if (
            self._stack.dtype not in (np.uint16, np.uint32)
            or self._codes
            or self._masks[1] is not None
        ):
            return None
        raw = self._stack.read(number)
        return [raw[panel] for panel in self._panels]

    def pixel_mask(self) -> list[NDArray[np.bool_]]:
        """Return whether pixels are good, per panel: ``pixel_mask`` is zero, or absent.

        Of a mask for each image, whether they are good on any of those needed; :meth:`read`
        knows on which.
        """
        return [self._masks[0][panel] for panel in self._panels]

    def good_pixels(self) -> NDArray[np.bool_] | None:
        """Return whether pixels of the whole frame are good; None where images differ in that."""
        good, by_image = self._masks
        return good if by_image is None else None

    @cached_property
    def _masks(self) -> tuple[NDArray[np.bool_], h5py.Dataset | None]:
        """Good pixels of the frame array, and the masks by frame number where they differ."""
        shape = self._stack.shape
        if self._good is not None:
            return self._good.reshape(shape), None
        mask = self._member("pixel_mask")
        if mask is None:
            mask = self._member("detectorSpecific/pixel_mask")
        if not isinstance(mask, h5py.Dataset) or mask.size < 2:
            return np.ones(shape, dtype=bool), None
        if not self._may_crash:
            require_decodable(mask)
        if mask.size == np.prod(shape):
            return _zeros(mask).reshape(shape), None
        if mask.shape[1:] != shape or len(mask) <= max(self._needed):
            raise UserError(
                f"{self._stack.path}: the pixel mask is {mask.shape}, the frames are "
                f"{shape}, {max(self._needed) + 1} at least; use the master file that belongs to "
                "the frames"
            )
        on_any, on_all = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
        for number in self._needed:
            good = mask[number] == 0
            on_any |= good
            on_all &= good
        return on_any, mask if (on_any != on_all).any() else None

    def _find_detector(self) -> h5py.Group | None:
        """Return the first NXdetector of the first entry that has an instrument."""
        for entry in self._stack.master.values():
            instrument = entry.get("instrument") if isinstance(entry, h5py.Group) else None
            if not isinstance(instrument, h5py.Group):
                continue
            for group in instrument.values():
                if is_class(group, "NXdetector"):
                    return group
            return instrument.get("detector")
        return None

    def _find_panels(self, names: list[str], shapes: list[tuple[int, int]]) -> list[_Cut]:
        """Return the part of the frame array that each panel is."""
        shape = self._stack.shape
        *leading, height, width = shape
        if shapes == [(height, width)] and set(leading) <= {1}:
            return [(*(0 for _ in leading), slice(None), slice(None))]
        modules = self._modules()
        cuts: list[_Cut]
        if set(names) <= modules.keys():
            cuts = [modules[name] for name in names]
        elif len(modules) == len(names):
            cuts = list(modules.values())
        elif len(shape) == 3 and shape[0] == len(names):
            cuts = [(i, slice(None), slice(None)) for i in range(len(names))]
        else:
            cuts = []
        image = np.broadcast_to(np.int8(0), shape)
        if [image[cut].shape for cut in cuts] != shapes:
            raise UserError(
                f"{self._stack.path}: frames of {shape} with {len(modules)} modules do not fit "
                f"the {len(shapes)} panels of {sorted(set(shapes))} pixels of the .expt; give the "
                "images that it was made from"
            )
        return cuts

    def _modules(self) -> dict[str, _Cut]:
        """Return the part of a frame that each NXdetector_module is, by its path."""
        modules: dict[str, _Cut] = {}
        if self._detector is None:
            return modules
        groups = {k: v for k, v in self._detector.items() if is_class(v, "NXdetector_module")}
        shape = self._stack.shape
        for name, group in groups.items():
            limits = []
            for field, whole in (("data_origin", [0] * len(shape)), ("data_size", shape)):
                found = self._stack.follow(group, field)
                if found is None and len(groups) > 1:
                    raise UserError(
                        f"{self._stack.path}: {group.name} has no {field}, which tells it from "
                        "the other modules; use a complete master file"
                    )
                values = whole if found is None else np.ravel(found[()]).astype(int).tolist()
                limits.append(values[-len(shape) :])  # some write a frame or panel in front
            origin, size = limits
            cut: list[int | slice] = [slice(o, o + s) for o, s in zip(origin, size, strict=True)]
            if len(cut) == 3:  # a leading panel dimension
                cut[0] = origin[0]
            modules[f"{self._detector.name}/{name}"] = tuple(cut)
        return modules

    def _mask_codes(self) -> tuple[int, tuple[int, ...]]:
        """Return the largest value that may be a count, and codes below it."""
        dtype = self._stack.dtype
        if dtype.kind == "f":
            return _LARGEST, ()
        has_two = dtype.kind == "u" or dtype.itemsize >= 4
        largest = min(int(np.iinfo(dtype).max) - (2 if has_two else 1), _LARGEST)
        depth = self._number("bit_depth_image", "detectorSpecific/bit_depth_image")
        if depth is None or depth >= dtype.itemsize * 8:
            return largest, ()
        return largest, (2 ** int(depth) - 1, 2 ** int(depth) - 2)

    def _member(self, path: str) -> h5py.Dataset | h5py.Group | None:
        """Return an object below the detector, through any links."""
        found = self._detector
        for name in path.split("/"):
            if not isinstance(found, h5py.Group):
                return None
            found = self._stack.follow(found, name)
        return found

    def _number(self, *paths: str) -> float | None:
        """Return the first positive number among the places where it may be."""
        for path in paths:
            found = self._member(path)
            if isinstance(found, h5py.Dataset) and found.size == 1 and found.dtype.kind in "iuf":
                value = float(np.ravel(found[()])[0])
                if value > 0:
                    return value
        return None


def _zeros(mask: h5py.Dataset) -> NDArray[np.bool_]:
    """Whether the numbers of a data set are zero; read in rows of chunks, for less new memory."""
    depth = mask.chunks[0] if mask.chunks else len(mask)
    step = -(-128 // depth) * depth
    parts = [mask[first : first + step] == 0 for first in range(0, len(mask), step)]
    return np.concatenate(parts)
