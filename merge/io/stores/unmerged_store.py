"""Unmerged observations on disk, sorted by image, for data larger than memory.

One HDF5 file: columns of float32 (indices int16), uncompressed, in chunks of whole rows, and the
first row of every image. Writing and reading hold one block of images at a time; only the row
numbers (8 bytes per image) are in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.hdf5.checked import (
    CHECKSUM,
    read_attributes,
    write_attributes,
    writing_checked,
)
from braggflux.integrator.io.hdf5.columns import column_of
from braggflux.merge.io.dataset_labels import DatasetLabels, DatasetNames
from braggflux.merge.io.dataset_split import check_images, check_one_beam
from braggflux.merge.io.observations import UnmergedData, check_possible
from braggflux.merge.io.stores.observation_store import ObservationStore

if TYPE_CHECKING:
    import h5py

FORMAT, VERSION = "braggflux unmerged", 2
#: Version 1 has no checksums.
WITHOUT_CHECKSUMS = 1
REMEDY = "convert the reflections again"
SUFFIX = ".h5"
_ROWS_PER_CHUNK = 1 << 16
#: Chunks of fewer images do not show what their crystals have in common.
MIN_IMAGES_OF_A_CELL = 20
_LARGEST_INDEX = np.iinfo(np.int16).max


def write_unmerged_store(
    path: str | Path,
    chunks: Iterable[UnmergedData],
    *,
    name: str | None = None,
    space_group: gemmi.SpaceGroup | None = None,
) -> None:
    """Write the images of one chunk after the other.

    Parameters
    ----------
    path : str or Path
    chunks : iterable of UnmergedData
        Each with images of its own, counted from 0, and all with the same columns. The cell of
        the file is the mean of theirs, weighted by the number of images.
    name : str, optional
        Of the dataset, instead of that of the first chunk.
    space_group : gemmi.SpaceGroup, optional
        Instead of that of the first chunk.

    Raises
    ------
    UserError
        There are no observations, or the file cannot be written.
    """
    with writing_checked(path) as file:
        starts, cells, weights = [0], [], []
        pulses: list[NDArray[np.float64]] = []
        first: UnmergedData | None = None
        for chunk in chunks:
            if not len(chunk):
                continue
            if first is None:
                first = chunk.select(np.arange(0))
                _create(file, chunk)
            _append(file, chunk)
            file.require_written()
            starts.extend((starts[-1] + chunk.image_starts[1:]).tolist())
            cells.append(chunk.cell.parameters)
            weights.append(chunk.n_images)
            if chunk.wavelength is not None and not chunk.is_polychromatic:
                pulses.append(chunk.wavelength[np.unique(chunk.image, return_index=True)[1]])
        if first is None:
            raise UserError(f"there are no observations to write to {path}; check the input")
        file.create_dataset("image_starts", data=np.array(starts, dtype=np.int64), **CHECKSUM)
        if pulses:
            check_one_beam(np.concatenate(pulses), first.name)
        large = np.array(weights) >= MIN_IMAGES_OF_A_CELL
        if large.any():  # the last few crystals may be odd
            own = np.array(cells)[large]
            check_images(own, first.name, "pieces")
        attributes = {
            "cell": np.average(cells, axis=0, weights=weights),
            "space_group": (space_group or first.space_group).xhm(),
            "name": name or first.name,
            "has_lp_applied": first.has_lp_applied,
            "format": FORMAT,
            "version": VERSION,
        }
        write_attributes(file, attributes | _label_attributes(first.labels))


def _label_attributes(labels: DatasetLabels) -> dict[str, Any]:
    known = {} if labels.wavelength is None else {"wavelength": labels.wavelength}
    return labels.names._asdict() | {"title": labels.title} | known


def _labels(attributes: Mapping[str, Any]) -> DatasetLabels:
    """Labels of a store; earlier stores have none."""
    names = {key: str(attributes[key]) for key in DatasetNames._fields if key in attributes}
    wavelength = attributes.get("wavelength")
    return DatasetLabels(
        DatasetNames(**names),
        str(attributes.get("title", "")),
        None if wavelength is None else float(wavelength),
    )


def _columns(data: UnmergedData) -> dict[str, NDArray[Any]]:
    columns: dict[str, NDArray[Any]] = {
        "miller_index": data.miller_index,
        "intensity": data.intensity,
        "sigma": data.sigma,
    }
    if data.wavelength is not None:
        columns["wavelength"] = data.wavelength
    return columns | {f"metadata/{name}": column for name, column in data.metadata.items()}


def _create(file: h5py.File, data: UnmergedData) -> None:
    for name, column in _columns(data).items():
        file.create_dataset(
            name,
            shape=(0, *column.shape[1:]),
            maxshape=(None, *column.shape[1:]),
            chunks=(_ROWS_PER_CHUNK, *column.shape[1:]),
            dtype=np.int16 if name == "miller_index" else np.float32,
            **CHECKSUM,
        )
    file.require_group("metadata")


def _append(file: h5py.File, data: UnmergedData) -> None:
    if np.abs(data.miller_index).max() > _LARGEST_INDEX:
        raise UserError(
            f"{data.name} has a Miller index beyond {_LARGEST_INDEX}; such indices are damaged: "
            "integrate again"
        )
    columns = _columns(data)
    known = {"intensity", "miller_index", "sigma"} | ({"wavelength"} & file.keys())
    known |= {f"metadata/{name}" for name in file["metadata"]}
    if known != columns.keys():
        raise ValueError(f"chunks differ in columns: {sorted(known ^ columns.keys())}")
    for name, column in columns.items():
        dataset = file[name]
        n = len(dataset)
        dataset.resize(n + len(column), axis=0)
        dataset[n:] = column


class UnmergedStore(ObservationStore):
    """Read observations of an image range from disk.

    Parameters
    ----------
    path : str or Path
        As :func:`write_unmerged_store` writes it.

    Raises
    ------
    UserError
        The file is missing or not such a store.
    """

    def __init__(self, path: str | Path) -> None:
        import h5py  # only here: 10 MiB that a merge of other files does without

        self.path = Path(path)
        with reading(path, REMEDY):
            self._file = h5py.File(self.path, "r")
            attributes = read_attributes(self._file)
            version = attributes.get("version")
            if attributes.get("format") != FORMAT or version not in (VERSION, WITHOUT_CHECKSUMS):
                self._file.close()
                raise UserError(
                    f"{path} is not a store of unmerged reflections of version {VERSION}; give "
                    "one that was converted from unmerged reflections by this version"
                )
            self.cell = gemmi.UnitCell(*attributes["cell"])
            self.space_group = gemmi.SpaceGroup(attributes["space_group"])
            self.name = str(attributes["name"])
            self.has_lp_applied = bool(attributes["has_lp_applied"])
            self.labels = _labels(attributes)
            self.image_starts: NDArray[np.int64] = column_of(self._file, "image_starts")[()]
            self.metadata_names = tuple(self._file["metadata"])
            self.has_wavelength = "wavelength" in self._file
            self._check_columns()

    def _check_columns(self) -> None:
        """Refuse columns of unequal length, and images that do not divide them."""
        starts = self.image_starts
        if starts.ndim != 1 or starts.dtype.kind not in "iu" or not len(starts) or starts[0] != 0:
            raise ValueError("image_starts does not say where images begin")
        if np.any(np.diff(starts) < 0):
            raise ValueError("image_starts falls")
        names = ["intensity", "sigma", *(["wavelength"] if self.has_wavelength else [])]
        names += [f"metadata/{name}" for name in self.metadata_names]
        shapes = {"miller_index": (len(self), 3)} | dict.fromkeys(names, (len(self),))
        for name, shape in shapes.items():
            found = column_of(self._file, name).shape
            if found != shape:
                raise ValueError(f"column {name} is {found} and not {shape}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, first: int = 0, last: int | None = None) -> UnmergedData:
        """Read images as :meth:`ObservationStore.read`."""
        last = self.n_images if last is None else last
        if not 0 <= first <= last <= self.n_images:
            raise IndexError(f"images {first} to {last} of {self.n_images}")
        starts = self.image_starts[first : last + 1]
        rows = slice(starts[0], starts[-1])

        def column(name: str) -> NDArray[np.float64]:
            return self.column(name, rows).astype(np.float64)

        data = UnmergedData(
            miller_index=self.column("miller_index", rows).astype(np.int32),
            intensity=column("intensity"),
            sigma=column("sigma"),
            image=np.repeat(np.arange(last - first), np.diff(starts)),
            wavelength=column("wavelength") if self.has_wavelength else None,
            metadata={name: column(f"metadata/{name}") for name in self.metadata_names},
            cell=self.cell,
            space_group=self.space_group,
            name=self.name,
            has_lp_applied=self.has_lp_applied,
            labels=self.labels,
        )
        with reading(self.path, REMEDY):
            check_possible(data)
        return data

    def column(self, name: str, rows: slice) -> NDArray[Any]:
        """Read some rows of a column as they are stored."""
        with reading(self.path, REMEDY):
            return self._file[name][rows]
