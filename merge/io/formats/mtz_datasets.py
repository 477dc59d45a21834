"""Data sets within one unmerged MTZ file, told apart by the headers of its batches."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.merge.io.dataset_labels import DatasetLabels, DatasetNames
from braggflux.merge.io.dataset_split import (
    WAVELENGTH_TOLERANCE,
    cell_groups,
    check_images,
    check_one_form,
    image_wavelength_groups,
    wavelength_groups,
)

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: Offset of the rotation at the start and the end of an image in a batch header.
_PHI = slice(36, 38)


@dataclass(frozen=True)
class MtzDatasets:
    """Data set of each batch.

    Parameters
    ----------
    batches : (b,) int
        Batch numbers, rising.
    group : (b,) int
        Data set of each, from 0.
    suffixes : tuple of str
        A word for each data set.
    labels : tuple of DatasetLabels
    cells : tuple of gemmi.UnitCell
    """

    batches: NDArray[np.int64]
    group: NDArray[np.int64]
    suffixes: tuple[str, ...]
    labels: tuple[DatasetLabels, ...]
    cells: tuple[gemmi.UnitCell, ...]

    def of_rows(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the data set of each observation, (N,), by its batch number."""
        return self.group[np.searchsorted(self.batches, batch)]


def mtz_datasets(
    mtz: gemmi.Mtz, batches: NDArray[np.int64], intensity_label: str, path: Path
) -> MtzDatasets:
    """Group batches as the file does: by the data set of their headers, and by wavelength.

    Data sets of one name and wavelength are one, and so are those of single stills. A batch
    without a header belongs to the data set of the intensity column.

    Parameters
    ----------
    mtz : gemmi.Mtz
    batches : (b,) int
        Numbers of the batches with observations, rising.
    intensity_label : str
    path : Path
        For messages.

    Raises
    ------
    UserError
        The cells of the data sets, or of the images of one, are far apart; or there are several
        wavelengths and nothing says whose the observations are.
    """
    found = _Batches(mtz, batches, intensity_label, path)
    keys: dict[tuple, int] = {}
    group = np.zeros(len(batches), dtype=np.int64)
    wavelength = _wavelengths(found, path)
    near, is_one = wavelength_groups(wavelength), _is_per_image(found)
    for k, dataset in enumerate(found.dataset):
        key = () if is_one else (*_names(dataset), int(near[k]))
        group[k] = keys.setdefault(key, len(keys))
    members = [np.flatnonzero(group == k) for k in range(len(keys))]
    first = [found.dataset[rows[0]] for rows in members]
    cells = [_cell(dataset, mtz) for dataset in first]
    parameters = [cell.parameters for cell in cells]
    check_one_form(parameters, cell_groups(parameters), str(path), "data sets")
    if len(found.cells):
        check_images(found.cells, str(path), "batches")
    labels = []
    for dataset, rows in zip(first, members, strict=True):
        value = float(np.median(wavelength[rows]))
        labels.append(DatasetLabels(_names(dataset), _title(mtz), value if value > 0 else None))
    suffixes, labels = _told_apart(labels)
    return MtzDatasets(batches, group, suffixes, labels, tuple(cells))


class _Batches:
    """Header of each batch with observations."""

    def __init__(
        self, mtz: gemmi.Mtz, batches: NDArray[np.int64], intensity_label: str, path: Path
    ) -> None:
        datasets = {d.id: d for d in mtz.datasets if not _says_nothing(d)}
        own = _own_dataset(mtz, intensity_label, path)
        by_number = {header.number: header for header in mtz.batches}
        headers = [by_number.get(number) for number in batches.tolist()]
        found = [None if h is None else datasets.get(h.dataset_id, own) for h in headers]
        self.dataset = _of_neighbours(found, batches, own, path)
        self.wavelength = np.array([0.0 if h is None else h.wavelength for h in headers])
        cells = [None if h is None else h.cell for h in headers]
        self.cells = np.array([c.parameters for c in cells if c is not None and c.is_crystal()])
        phi = np.array([[0.0, 0.0] if h is None else list(h.floats)[_PHI] for h in headers])
        self.is_still = bool(np.all(phi[:, 0] == phi[:, 1])) and any(
            h is not None for h in headers
        )


def _of_neighbours(
    found: list[gemmi.Mtz.Dataset | None],
    batches: NDArray[np.int64],
    own: gemmi.Mtz.Dataset | None,
    path: Path,
) -> list[gemmi.Mtz.Dataset | None]:
    """Fill gaps: a batch without a header has the data set of those around it, if it is one."""
    known = [k for k, dataset in enumerate(found) if dataset is not None]
    if len({found[k].id for k in known}) < 2:
        return [own if dataset is None else dataset for dataset in found]
    place = np.searchsorted(known, np.arange(len(found))).clip(1, len(known) - 1)
    filled = list(found)
    for k, dataset in enumerate(found):
        if dataset is None:
            near = [found[known[place[k] - 1]], found[known[place[k]]]]
            if near[0].id != near[1].id or not known[0] < k < known[-1]:
                raise UserError(
                    f"{path} holds several data sets and batch {batches[k]} has no header that "
                    "says whose it is; write the header, or leave the batch out"
                )
            filled[k] = near[0]
    if len(known) < len(found):
        log.warning(
            "%s: %d batches without headers are taken for the data set of their neighbours",
            *(path, len(found) - len(known)),
        )
    return filled


def _says_nothing(dataset: gemmi.Mtz.Dataset) -> bool:
    """Whether it is HKL_base, which CCP4 keeps for indices and whose wavelength is 0."""
    return dataset.dataset_name == "HKL_base" and dataset.wavelength <= 0.0


def _own_dataset(mtz: gemmi.Mtz, intensity_label: str, path: Path) -> gemmi.Mtz.Dataset | None:
    """Return the data set of the intensities; of HKL_base, the only other."""
    number = mtz.column_with_label(intensity_label).dataset_id
    own = next((d for d in mtz.datasets if d.id == number), None)
    others = [d for d in mtz.datasets if not _says_nothing(d)]
    wavelength = [d.wavelength for d in others if d.wavelength > 0.0]
    has_columns = {c.dataset_id for c in mtz.columns if c.type != "H"} - {number}
    is_own = own is not None and not _says_nothing(own)
    # where columns are spread over the data sets, they say whose they are
    is_open = not is_own or not has_columns & {d.id for d in others}
    if is_open and not mtz.batches and wavelength_groups(wavelength or [0.0]).any():
        raise UserError(
            f"{path} lists data sets of several wavelengths "
            f"({', '.join(f'{d.dataset_name} {d.wavelength:.5f} A' for d in others)}) and has no "
            "batch headers that say which observations are whose; write the headers, or each data "
            "set to a file of its own"
        )
    if is_own:
        is_only_one = own.wavelength <= 0.0 and len(wavelength) == 1
        return next(d for d in others if d.wavelength > 0.0) if is_only_one else own
    return others[0] if len(others) == 1 else own


def _wavelengths(found: _Batches, path: Path) -> Array:
    """Wavelength of each batch [A], (b,); 0 where nothing says it."""
    wavelength = np.array([0.0 if d is None else d.wavelength for d in found.dataset])
    number = np.array([-1 if d is None else d.id for d in found.dataset])
    for k in np.unique(number):
        rows = np.flatnonzero((number == k) & (found.wavelength > 0.0))
        if not len(rows):
            continue
        own, given = found.wavelength[rows], wavelength[rows[0]]
        group = image_wavelength_groups(own, found.is_still)
        medians = np.array([np.median(own[group == g]) for g in range(group.max() + 1)])
        if given <= 0.0 or len(medians) > 1:
            wavelength[rows] = medians[group]
        elif abs(medians[0] - given) > max(WAVELENGTH_TOLERANCE, np.ptp(own)):
            log.warning(
                "%s: data set %d has wavelength %.5f A and its batches have %.5f A; the first is "
                "written",
                path,
                k,
                given,
                medians[0],
            )
    return wavelength


def _is_per_image(found: _Batches) -> bool:
    """Whether each still has a data set of its own: pulses of one beam."""
    numbers = {d.id for d in found.dataset if d is not None}
    if not found.is_still or len(numbers) <= len(found.dataset) / 2:
        return False
    return not image_wavelength_groups([d.wavelength for d in found.dataset], True).any()


def _names(dataset: gemmi.Mtz.Dataset | None) -> DatasetNames:
    if dataset is None:
        return DatasetNames()
    given = (dataset.project_name, dataset.crystal_name, dataset.dataset_name)
    return DatasetNames(*(n or own for n, own in zip(given, DatasetNames(), strict=True)))


def _cell(dataset: gemmi.Mtz.Dataset | None, mtz: gemmi.Mtz) -> gemmi.UnitCell:
    """Cell of the data set where it has one, else of the file."""
    return mtz.cell if dataset is None or not dataset.cell.is_crystal() else dataset.cell


def _title(mtz: gemmi.Mtz) -> str:
    """Title, without what stands for none."""
    title = (mtz.title or "").strip()
    return "" if title in ("None", "From None") else title


def _told_apart(
    labels: list[DatasetLabels],
) -> tuple[tuple[str, ...], tuple[DatasetLabels, ...]]:
    """Words for the data sets, the shortest of their names that do, and their labels.

    Data sets of one name, as DIALS exports those of several wavelengths, get numbers.
    """
    for words in (lambda n: n.dataset, lambda n: f"{n.crystal}_{n.dataset}", "_".join):
        found = [words(own.names) for own in labels]
        if len(set(found)) == len(found):
            return tuple(found), tuple(labels)
    suffixes = tuple(f"WAVE{k + 1}" for k in range(len(labels)))
    names = [
        own.names._replace(dataset=f"{own.names.dataset}_{suffix}")
        for own, suffix in zip(labels, suffixes, strict=True)
    ]
    renamed = (own._replace(names=n) for own, n in zip(labels, names, strict=True))
    return suffixes, tuple(renamed)
