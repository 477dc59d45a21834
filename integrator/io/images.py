"""Detector frames of an experiment as photon counts, whatever the image format.

HDF5 (NXmx, Eiger) is read directly; every other format goes through dxtbx, which is installed
with DIALS.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Experiment, ImageFiles, Panel
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials.lookup import LookupMaps, read_lookup
from braggflux.integrator.io.hdf5.nxmx import NxmxFrames
from braggflux.integrator.io.hdf5.photons import (
    INVALID,
    NO_COUNT,
    NegativeCounts,
    PerPixel,
    PhotonScale,
    Pixels,
    rounding_changes_mean,
)

log = logging.getLogger(__name__)

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
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


class FrameSource(Protocol):
    """Frames of one experiment, in the order of its scan."""

    n_images: int
    panel_shapes: list[tuple[int, int]]
    n_overloads: int

    def static_mask(self) -> list[NDArray[np.bool_]]:
        """Return pixels usable on every frame, one (slow, fast) array per panel."""

    def read(self, frame: int) -> list[NDArray[np.int32]]:
        """Return the photons of a frame (0-based), per panel; -1 where there is no count."""

    def close(self) -> None:
        """Release the files."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class RawFrames(Protocol):
    """What a format gives: detector values by number, INVALID for mask codes."""

    def read(self, number: int) -> list[Pixels]:
        """Return the values [ADU] of each panel: int32, or floating."""

    def pixel_mask(self) -> list[NDArray[np.bool_]]:
        """Return whether the pixels of each panel are good."""

    def close(self) -> None:
        """Release the files."""


def open_frames(experiment: Experiment) -> ExperimentFrames:
    """Open the frames of an experiment.

    Parameters
    ----------
    experiment : Experiment
        With ``images`` and ``panels``; a ``scan``, where there is one, must have as many images.

    Returns
    -------
    ExperimentFrames
        A :class:`FrameSource`.

    Raises
    ------
    UserError
        When files are missing, damaged, of another detector, fewer than the scan needs, or of a
        format that needs dxtbx where that is not installed; or a mask or map that does not fit.
    """
    images = experiment.images
    if images is None or not images.paths:
        raise UserError("the experiment names no images; give an .expt made by dials.import")
    indices = images.indices or tuple(range(len(images.paths)))
    if experiment.scan is not None and experiment.scan.n_images != len(indices):
        raise UserError(
            f"{images.paths[0]}: the .expt names {len(indices)} images, and its scan has "
            f"{experiment.scan.n_images}; import the images again"
        )
    missing = [path for path in images.paths if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"no image file {missing[0]} ({len(missing)} of {len(images.paths)} files are "
            "missing); copy the images there, or correct the path in the .expt"
        )
    shapes = [panel.shape for panel in experiment.panels]
    lookup = read_lookup(images.lookup, shapes)
    if _is_hdf5(images.paths[0]):
        if len(set(images.paths)) > 1:
            raise UserError(
                f"{images.paths[0]} is one of {len(images.paths)} HDF5 files that the .expt takes "
                "for one image each; give the master file of them to dials.import"
            )
        names = [panel.name for panel in experiment.panels]
        raw: RawFrames = NxmxFrames(images.paths[0], names, shapes, needed=indices)
        numbers: Sequence[int] = indices
    else:
        raw, numbers = DxtbxFrames(images, indices, shapes), range(len(indices))
    first = experiment.scan.image_range[0] if experiment.scan is not None else 1
    return ExperimentFrames(raw, numbers, experiment.panels, lookup, images.paths[0], first)


class ExperimentFrames:
    """Raw frames made photons: trusted range, pedestal and gain applied.

    Parameters
    ----------
    raw : RawFrames
    numbers : sequence of int
        Number in ``raw`` of each frame of the experiment.
    panels : sequence of Panel
    lookup : LookupMaps, optional
        Mask to apply; gain and pedestal in place of the panels'.
    name : str
        Of the images, for messages.
    first_image : int
        Number of the first image, for messages.

    Attributes
    ----------
    n_images : int
    panel_shapes : list of (int, int)
        (slow, fast)
    n_overloads : int
        Usable pixels that were above the trusted range, summed over the frames read so far.

    Raises
    ------
    UserError
        When no panel has a trusted range.
    """

    def __init__(
        self,
        raw: RawFrames,
        numbers: Sequence[int],
        panels: Sequence[Panel],
        lookup: LookupMaps | None = None,
        name: str = "the images",
        first_image: int = 1,
    ) -> None:
        self._raw, self._numbers, self._panels = raw, numbers, panels
        self._first_image = first_image
        lookup = lookup or LookupMaps()
        self._external = lookup.mask or [np.array(True)] * len(panels)
        gain: Sequence[PerPixel] = lookup.gain or [panel.gain for panel in panels]
        pedestal: Sequence[PerPixel] = lookup.pedestal or [panel.pedestal for panel in panels]
        ranges = [panel.trusted_range for panel in panels]
        self._scales = list(map(PhotonScale, ranges, gain, pedestal))
        if all(scale.is_empty for scale in self._scales):
            low, high = panels[0].trusted_range
            raise UserError(
                f"{name}: the trusted range of the .expt, {low:g} to {high:g}, holds no count; "
                "give the detector's: dials.import ... trusted_range=-1,65535"
            )
        self._negative = NegativeCounts(name, self._scales)
        self._dithers: bool | None = None
        self._mask: list[NDArray[np.bool_]] | None = None
        self.n_images = len(numbers)
        self.panel_shapes = [panel.shape for panel in panels]
        self.n_overloads = 0

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
        """Release the files."""
        self._raw.close()

    def static_mask(self) -> list[NDArray[np.bool_]]:
        """Return pixels usable on every frame.

        Those that neither the detector's mask, the panels' rectangles nor the mask of the image
        set leave out, and that have a gain.

        Returns
        -------
        list of ndarray, (slow, fast) bool
            One per panel; True = usable. Shared: copy before writing.
        """
        if self._mask is None:
            masks = [mask.copy() for mask in self._raw.pixel_mask()]
            for mask, panel in zip(masks, self._panels, strict=True):
                for fast0, slow0, fast1, slow1 in panel.mask:
                    mask[max(slow0, 0) : max(slow1, 0), max(fast0, 0) : max(fast1, 0)] = False
            for mask, external, scale in zip(masks, self._external, self._scales, strict=True):
                mask &= external & scale.is_calibrated
            self._mask = masks
        return self._mask

    def read(self, frame: int) -> list[NDArray[np.int32]]:
        """Return the photons of one frame.

        Parameters
        ----------
        frame : int
            0-based position in the scan. Reading in order is fastest.

        Returns
        -------
        list of ndarray, (slow, fast) int32
            One per panel: ``(ADU - pedestal) / gain``, made whole. -1 where the frame has no
            count (mask code) or one outside the trusted range. The static mask is not applied.

        Raises
        ------
        UserError
            When the frame cannot be read, or its noise reaches below zero.
        """
        if not 0 <= frame < self.n_images:
            raise IndexError(f"frame {frame} of {self.n_images}")
        values = self._raw.read(self._numbers[frame])
        masks = self.static_mask()
        # the same fractions are rounded up however often and in what order frames are read
        dither = np.random.default_rng(frame) if self._needs_dither(values) else None
        photons = [s.photons(adu, dither) for s, adu in zip(self._scales, values, strict=True)]
        self._negative.check(
            self._first_image + frame, values, masks, photons, lambda: self._neighbour(frame)
        )
        for adu, counts, mask, scale in zip(values, photons, masks, self._scales, strict=True):
            self.n_overloads += int(np.count_nonzero(scale.is_overload(adu) & mask))
            counts[~scale.is_trusted(adu) | (counts < 0)] = NO_COUNT
        return photons

    def _neighbour(self, frame: int) -> list[Pixels] | None:
        """Return the next raw frame, of the last one that before; None where there is but one."""
        other = frame + 1 if frame + 1 < self.n_images else frame - 1
        return self._raw.read(self._numbers[other]) if other >= 0 else None

    def _needs_dither(self, values: Sequence[Pixels]) -> bool:
        """Whether rounding to the nearest photon would bias the frames; the first one tells."""
        if self._dithers is None:
            self._dithers = False
            if not all(s.is_whole(adu) for s, adu in zip(self._scales, values, strict=True)):
                self._dithers = rounding_changes_mean(
                    [
                        scale.scaled(adu)[scale.is_trusted(adu) & mask]
                        for adu, mask, scale in zip(
                            self._raw.read(self._numbers[0]),
                            self.static_mask(),
                            self._scales,
                            strict=True,
                        )
                    ]
                )
        return self._dithers


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


def _is_hdf5(path: str) -> bool:
    """Whether a file is HDF5 or is named like it (then the reader says what is wrong with it)."""
    if Path(path).suffix.lower() in (".h5", ".hdf5", ".nxs", ".nx5"):
        return True
    with open(path, "rb") as file:
        return file.read(len(_HDF5_SIGNATURE)) == _HDF5_SIGNATURE
