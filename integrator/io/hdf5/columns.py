"""Columns of our own HDF5 files, checked where they enter: kind, shape, finite numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    import h5py

#: Columns of three values a row; all others have one.
VECTORS = frozenset(
    {"miller_index", "xyz_px", "xyz_mm", "s1", "s0_crystal", "s1_crystal", "corner", "offset"}
)
#: Column -> lowest and highest value that is possible.
LIMITS: Mapping[str, tuple[float, float]] = {
    "miller_index": (-32767, 32767),
    "experiment": (0, 10**6),
    "panel": (0, 10**6),
    "frames_per_layer": (0, 10**6),
    "d": (0.0, 1e6),
    "exposure": (0.0, 1.0 + 1e-3),
    "sigma": (0.0, 1e30),
    "wavelength": (0.01, 200.0),
    # of the background: photons and frames of a pixel, and the level of a frame over the mean
    "sum": (0.0, 1e15),
    "count": (0.0, 1e7),
    "frame_ratio": (0.0, 1e6),
}
_LARGEST = 1e30
"""Of numbers that are added and squared in single precision."""
_CHECKSUM_BYTES = 4
#: No filter packs numbers closer; a data set that claims more than is stored is damaged.
_CLOSEST, _FREE_BYTES = 5000, 1 << 24


def column_of(group: h5py.Group, name: str) -> h5py.Dataset:
    """Return a data set of numbers that is as large as what is stored of it can be.

    Raises
    ------
    ValueError
    """
    import h5py

    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "iufb":
        raise ValueError(f"{name} is no column of numbers")
    if dataset.nbytes > _CLOSEST * dataset.id.get_storage_size() + _FREE_BYTES:
        raise ValueError(f"{name} should be {dataset.shape}, of which too little is there")
    if dataset.fletcher32 and hasattr(dataset.id, "chunk_iter"):  # of HDF5 1.14 on
        sizes = [_CHECKSUM_BYTES + 1]
        dataset.id.chunk_iter(lambda chunk: sizes.append(chunk.size))
        if min(sizes) <= _CHECKSUM_BYTES:  # its filter would look before the chunk's beginning
            raise ValueError(f"{name} has a chunk without numbers")
    return dataset


def read_columns(
    group: h5py.Group, n_rows: int | None = None, *, without: str = ""
) -> dict[str, NDArray[Any]]:
    """Read the columns of a group, all of one length.

    Parameters
    ----------
    group : h5py.Group
    n_rows : int, optional
        Length that they must have.
    without : str
        Data set that is none.

    Raises
    ------
    ValueError
        Names the column, and what is wrong with it.
    """
    return dict(each_column(group, n_rows, without=without))


def each_column(
    group: h5py.Group, n_rows: int | None = None, *, without: str = ""
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Read the columns of a group one by one, names and values; see :func:`read_columns`."""
    for name in group:
        if name == without:
            continue
        dataset = column_of(group, name)
        n_rows = dataset.shape[0] if n_rows is None and dataset.ndim else n_rows
        wanted = (n_rows, 3) if name in VECTORS else (n_rows,)
        if dataset.shape != wanted:
            raise ValueError(f"column {name} is {dataset.shape} and not {wanted}")
        values = dataset[()]
        check_values(name, values)
        yield name, values


def check_values(name: str, values: NDArray[Any]) -> None:
    """Refuse values that are not finite, or outside :data:`LIMITS`.

    Raises
    ------
    ValueError
    """
    low, high = LIMITS.get(name, (-_LARGEST, _LARGEST))
    if values.dtype.kind in "iuf" and values.size:
        if not (values.min() >= low and values.max() <= high):  # NaN is neither
            raise ValueError(
                f"column {name} has values from {values.min()} to {values.max()}, "
                f"{low:g} to {high:g} are possible"
            )


def read_array(group: h5py.Group, name: str, ndim: int) -> NDArray[Any]:
    """Read finite numbers of as many dimensions.

    Raises
    ------
    ValueError
    """
    dataset = column_of(group, name)
    if dataset.ndim != ndim:
        raise ValueError(f"{name} is {dataset.shape}")
    values: NDArray[Any] = dataset[()]
    check_values(name, values)
    return values
