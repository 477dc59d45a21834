"""Frames of any image format that dxtbx knows; dxtbx is installed with DIALS."""

from __future__ import annotations

import importlib
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import ImageFiles
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.hdf5.photons import INVALID, Pixels

# what the readers behind dxtbx are known to raise on files that are cut or scrambled
_DAMAGED = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zlib.error,
)
_DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")


class DxtbxFrames:
    """Frames of any format that dxtbx knows.

    Parameters
    ----------
    images : ImageFiles
        One file per frame, or one file of several frames; and what the format class is told.
    indices : sequence of int
        Frame number in the file, when there is one file.
    shapes : sequence of (int, int)
        (slow, fast) of each panel.

    Raises
    ------
    UserError
        When dxtbx is not installed, or does not know the format.
    """

    def __init__(
        self, images: ImageFiles, indices: Sequence[int], shapes: Sequence[tuple[int, int]]
    ) -> None:
        self._paths, self._params = images.paths, images.params
        self._indices, self._shapes = indices, list(shapes)
        registry = _import_dxtbx(self._paths[0])
        self._format_class = registry.get_format_class_for_file(self._paths[0])
        if self._format_class is None:
            raise UserError(
                f"{self._paths[0]} is in no image format that dxtbx knows; convert it, or check "
                "that the file is whole"
            )

    def close(self) -> None:
        """Do nothing: each file is closed after reading."""

    def read(self, number: int) -> list[Pixels]:
        """Return the values of each panel; INVALID where there is none."""
        one_file = len(self._paths) == 1
        path = self._paths[0 if one_file else number]
        try:
            image = self._format_class.get_instance(path, **self._params)
            single = not hasattr(image, "get_num_images")
            raw = image.get_raw_data() if single else image.get_raw_data(self._indices[number])
        except _DAMAGED as error:
            raise UserError(
                f"cannot read {path} ({' '.join(str(error).split())[:160]}); the file is damaged, "
                "copy it again"
            ) from error
        panels = [_as_pixels(panel) for panel in (raw if isinstance(raw, tuple) else (raw,))]
        self._check_shapes([panel.shape for panel in panels], path)
        return panels

    def read_stored(self, number: int) -> None:
        """Return nothing: dxtbx converts the values."""

    def pixel_mask(self) -> list[NDArray[np.bool_]]:
        """Return the format's static mask, where it has one."""
        image = self._format_class.get_instance(self._paths[0], **self._params)
        mask = image.get_static_mask()
        if mask is None:
            return [np.ones(shape, dtype=bool) for shape in self._shapes]
        panels = mask if isinstance(mask, tuple) else (mask,)
        return [np.array(panel.as_numpy_array()) for panel in panels]

    def _check_shapes(self, shapes: list[tuple[int, ...]], path: str) -> None:
        if shapes != self._shapes:
            raise UserError(
                f"{path} has panels of {sorted(set(shapes))} pixels, the .expt of "
                f"{sorted(set(self._shapes))}; give the images that the .expt was made from"
            )


def _as_pixels(panel: Any) -> Pixels:
    """Convert a flex array."""
    raw = panel.as_numpy_array()
    if raw.dtype.kind == "f":
        return np.where(np.isfinite(raw), raw, INVALID)
    pixels = raw.astype(np.int32)
    pixels[pixels != raw] = INVALID  # beyond 32 bits
    return pixels


def _import_dxtbx(path: str) -> ModuleType:
    """Import dxtbx's registry of formats; Debian's build needs to be told where it is."""
    if _DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(_DEBIAN_BUILD))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that dxtbx imports
            importlib.import_module("scitbx.array_family.flex")
            return importlib.import_module("dxtbx.format.Registry")
    except (ImportError, KeyError) as error:  # KeyError: libtbx without its build folder
        raise UserError(
            f"{path} is not HDF5, and other image formats are read through dxtbx, which is not "
            f"installed ({error}); install it with DIALS: apt install dials, or conda install -c "
            "conda-forge dials"
        ) from error
