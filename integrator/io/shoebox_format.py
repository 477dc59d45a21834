"""What a file of shoeboxes is: its versions, and what a sound one has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.hdf5.checked import read_attributes
from braggflux.integrator.types import ReflectionMetadata

FORMAT = "braggflux-shoeboxes"
VERSION = 4
#: Version 3 has no checksums, and no overlapping spots: it masked what neighbours claim.
WITHOUT_CHECKSUMS = 3
#: Version 2 placed tables on scans that do not start at image 1 wrongly; the others it has right.
RIGHT_FROM_IMAGE_1 = 2
REMEDY = "make it again with braggflux extract"
UNITS = {
    "counts": "photons",
    "xyz_px": "pixels, pixels, frames from the start of the scan",
    "xyz_mm": "mm, mm, rad",
    "s1": "1/A",
    "d": "A",
    "corner": "frame, slow, fast array index",
}
INTEGER_COLUMNS = (
    *("refl_row", "miller_index", "experiment", "panel", "corner", "frames_per_layer"),
)
#: Columns that are held in single precision.
SINGLE = {f.name for f in fields(ReflectionMetadata)} - set(INTEGER_COLUMNS)


def check_boxes(counts: h5py.Dataset, mask: h5py.Dataset, n_rows: int) -> None:
    """Refuse boxes of another number, shape or type than they should have.

    Parameters
    ----------
    counts, mask : h5py.Dataset, (N, D, H, W)
    n_rows : int
        That the head of the file announces.

    Raises
    ------
    ValueError
    """
    shape = counts.shape
    if len(shape) != 4 or shape != mask.shape or shape[0] != n_rows:
        raise ValueError(
            f"{n_rows} boxes are announced; counts of {shape} and masks of {mask.shape} are there"
        )
    if mask.dtype != np.uint8 or counts.dtype.kind not in "iu":
        raise ValueError(f"boxes hold {counts.dtype} and {mask.dtype}")
    if not (counts.chunks and shape[1:] == counts.chunks[1:]):
        raise ValueError(f"chunks {counts.chunks} are not of whole boxes")


def check_photons(counts: NDArray[Any], most: int) -> None:
    """Refuse counts below zero, or more than the file announces.

    Raises
    ------
    ValueError
    """
    if counts.size and not (counts.min() >= 0 and counts.max() <= most):
        raise ValueError(
            f"counts of {counts.min()} to {counts.max()}, at most {most} are announced"
        )


def open_checked(path: Path) -> h5py.File:
    """Open a file of a version that is read.

    Raises
    ------
    UserError
    """
    if not path.is_file():
        raise UserError(f"no shoebox store {path}: make one with braggflux extract")
    with reading(path, REMEDY):
        handle = h5py.File(path, "r")
        attributes = read_attributes(handle)
        found, version = attributes.get("format"), attributes.get("version")
        if found != FORMAT or version not in (VERSION, WITHOUT_CHECKSUMS, RIGHT_FROM_IMAGE_1):
            handle.close()
            what = f"version {version}" if found == FORMAT else f"format {found!r}"
            raise UserError(
                f"{path} has {what}, but this program reads {FORMAT} version {VERSION}: make it "
                "again with braggflux extract"
            )
    return handle


def held(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Give a column as it is held: numbers that are no integers in single precision.

    Raises
    ------
    ValueError
        Measures have become integers, or integers something else.
    """
    if name in (*INTEGER_COLUMNS, "flags") and values.dtype.kind not in "iu":
        raise ValueError(f"column {name} holds no integers ({values.dtype})")
    if name not in SINGLE:
        return values
    if values.dtype.kind != "f":
        raise ValueError(f"column {name} holds integers ({values.dtype})")
    return values.astype(np.float32)


def metadata_of(columns: Mapping[str, NDArray[Any]], dtype: torch.dtype) -> ReflectionMetadata:
    """Give the columns of a store as tensors, numbers that are no integers of type ``dtype``."""

    def tensor(name: str) -> Tensor:
        kind = torch.int64 if name in INTEGER_COLUMNS else dtype
        return torch.from_numpy(columns[name]).to(kind)

    return ReflectionMetadata(**{f.name: tensor(f.name) for f in fields(ReflectionMetadata)})
