"""Detector frames of an experiment as photon counts, whatever the image format.

HDF5 (NXmx, Eiger) is read directly; every other format goes through dxtbx, which is installed
with DIALS.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.geometry import Experiment, ImageFiles, Panel
from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.decoding.apart import opened_apart
from braggflux.integrator.io.dials.lookup import LookupMaps, read_lookup
from braggflux.integrator.io.dxtbx_frames import DxtbxFrames
from braggflux.integrator.io.hdf5.nxmx import NxmxFrames
from braggflux.integrator.io.hdf5.photons import (
    NO_COUNT,
    NegativeCounts,
    PerPixel,
    PhotonScale,
    Pixels,
    rounding_changes_mean,
)
from braggflux.integrator.io.hdf5.stored import photons_of_stored

log = logging.getLogger(__name__)

REMEDY = "copy the images again"
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

Photons = NDArray[np.signedinteger[Any]]


class FrameSource(Protocol):
    """Frames of one experiment, in the order of its scan."""

    n_images: int
    panel_shapes: list[tuple[int, int]]
    n_overloads: int

    def static_mask(self) -> list[NDArray[np.bool_]]:
        """Return pixels usable on every frame, one (slow, fast) array per panel."""

    def read(self, frame: int) -> list[Photons]:
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

    def read_stored(self, number: int) -> list[NDArray[np.unsignedinteger[Any]]] | None:
        """Return the values as stored, where only the highest of their type are mask codes.

        None for frames of another kind. Valid until this thread reads another frame.
        """

    def pixel_mask(self) -> list[NDArray[np.bool_]]:
        """Return whether the pixels of each panel are good."""

    def close(self) -> None:
        """Release the files."""


def open_frames(experiment: Experiment, *, transient: bool = False) -> ExperimentFrames:
    """Open the frames of an experiment.

    Parameters
    ----------
    experiment : Experiment
        With ``images`` and ``panels``; a ``scan``, where there is one, must have as many images.
    transient : bool
        See :class:`ExperimentFrames`.

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
    with reading(images.paths[0], REMEDY):
        return _open(experiment, images, transient)


def _open(experiment: Experiment, images: ImageFiles, transient: bool) -> ExperimentFrames:
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
        good = opened_apart(images.paths[0], names, shapes, indices)
        raw: RawFrames = NxmxFrames(images.paths[0], names, shapes, needed=indices, good=good)
        numbers: Sequence[int] = indices
    else:
        raw, numbers = DxtbxFrames(images, indices, shapes), range(len(indices))
    first = experiment.scan.image_range[0] if experiment.scan is not None else 1
    return ExperimentFrames(
        *(raw, numbers, experiment.panels, lookup, images.paths[0], first), transient=transient
    )


def open_transient_frames(experiment: Experiment) -> ExperimentFrames:
    """Open frames each of which is used before the next is read."""
    return open_frames(experiment, transient=True)


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
    transient : bool
        A frame is valid until the same thread reads another: it may share its memory.

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
        *,
        transient: bool = False,
    ) -> None:
        self._raw, self._numbers, self._panels = raw, numbers, panels
        self._first_image, self._transient = first_image, transient
        self._name = name
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
        self._lock = threading.Lock()

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
            with reading(self._name, REMEDY):
                masks = self._raw.pixel_mask()
            parts = zip(masks, self._panels, self._external, self._scales, strict=True)
            self._mask = [
                self._usable(mask, panel, external & scale.is_calibrated)
                for mask, panel, external, scale in parts
            ]
        return self._mask

    @staticmethod
    def _usable(
        mask: NDArray[np.bool_], panel: Panel, good: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Pixels of a panel that its own rectangles and what else is known leave of a mask."""
        if not good.all():
            mask = mask & good
        elif panel.mask:
            mask = mask.copy()
        for fast0, slow0, fast1, slow1 in panel.mask:
            mask[max(slow0, 0) : max(slow1, 0), max(fast0, 0) : max(fast1, 0)] = False
        return mask

    def read(self, frame: int) -> list[Photons]:
        """Return the photons of one frame; several threads may read at a time.

        Parameters
        ----------
        frame : int
            0-based position in the scan. Reading in order is fastest.

        Returns
        -------
        list of ndarray, (slow, fast) int32, or int16 where the counts fit
            One per panel: ``(ADU - pedestal) / gain``, made whole. -1 where the frame has no
            count (mask code) or one outside the trusted range. The static mask is not applied.

        Raises
        ------
        UserError
            When the frame cannot be read, or its noise reaches below zero.
        """
        if not 0 <= frame < self.n_images:
            raise IndexError(f"frame {frame} of {self.n_images}")
        with reading(f"image {self._first_image + frame} of {self._name}", REMEDY):
            return self._photons(frame)

    def _photons(self, frame: int) -> list[Photons]:
        masks = self.static_mask()
        number = self._numbers[frame]
        if all(scale.keeps_counts for scale in self._scales):
            stored = self._raw.read_stored(number)
            if stored is not None:
                limits = (scale.last for scale in self._scales)
                read = [
                    photons_of_stored(*panel, in_place=self._transient)
                    for panel in zip(stored, masks, limits, strict=True)
                ]
                with self._lock:
                    self.n_overloads += sum(n for _, n in read)
                return [photons for photons, _ in read]
        with self._lock:
            return self._converted(frame, self._raw.read(number), masks)

    def _converted(
        self, frame: int, values: Sequence[Pixels], masks: Sequence[NDArray[np.bool_]]
    ) -> list[Photons]:
        """Apply pedestal, gain and trusted range to raw values."""
        # the same fractions are rounded up however often and in what order frames are read
        dither = np.random.default_rng(frame) if self._needs_dither() else None
        photons = [s.photons(adu, dither) for s, adu in zip(self._scales, values, strict=True)]
        self._negative.check(
            self._first_image + frame, values, masks, photons, lambda: self._neighbour(frame)
        )
        for adu, counts, mask, scale in zip(values, photons, masks, self._scales, strict=True):
            self.n_overloads += int(np.count_nonzero(scale.is_overload(adu) & mask))
            counts[~scale.is_trusted(adu) | (counts < 0)] = NO_COUNT
        return list(photons)

    def _neighbour(self, frame: int) -> list[Pixels] | None:
        """Return the next raw frame, of the last one that before; None where there is but one."""
        other = frame + 1 if frame + 1 < self.n_images else frame - 1
        return self._raw.read(self._numbers[other]) if other >= 0 else None

    def _needs_dither(self) -> bool:
        """Whether rounding to the nearest photon would bias the frames; the scan's first tells."""
        if self._dithers is None:
            first = self._raw.read(self._numbers[0])
            is_whole = all(s.is_whole(adu) for s, adu in zip(self._scales, first, strict=True))
            self._dithers = not is_whole and rounding_changes_mean(
                [
                    scale.scaled(adu)[scale.is_trusted(adu) & mask]
                    for adu, mask, scale in zip(
                        first, self.static_mask(), self._scales, strict=True
                    )
                ]
            )
        return self._dithers


def _is_hdf5(path: str) -> bool:
    """Whether a file is HDF5 or is named like it (then the reader says what is wrong with it)."""
    if Path(path).suffix.lower() in (".h5", ".hdf5", ".nxs", ".nx5"):
        return True
    with open(path, "rb") as file:
        return file.read(len(_HDF5_SIGNATURE)) == _HDF5_SIGNATURE
