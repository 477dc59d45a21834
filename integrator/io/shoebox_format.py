"""What a file of shoeboxes is: its versions, and what a sound one has."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.hdf5.checked import read_attributes

FORMAT = "braggflux-shoeboxes"
VERSION = 4
#: Version 3 has no checksums, and no overlapping spots: it masked what neighbours claim.
WITHOUT_CHECKSUMS = 3
#: Version 2 placed tables on scans that do not start at image 1 wrongly; the others it has right.
RIGHT_FROM_IMAGE_1 = 2
REMEDY = "make it again with braggflux extract"


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
