"""Scaled observations of a merge, unmerged: for statistics, deposition and other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.atomic import replacing
from braggflux.integrator.crystal.symmetry import to_asu
from braggflux.merge.io.dataset_labels import DatasetLabels
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.output.amplitudes import ScaledObservations
from braggflux.merge.problem import MergeProblem

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ObservedRows:
    """Index and batch of every row of the input, counted through all files.

    Parameters
    ----------
    miller_index : (N, 3) int32
        As observed.
    batch : (N,) int32
    """

    miller_index: NDArray[np.int32]
    batch: NDArray[np.int32]

    @classmethod
    def of(cls, data: Sequence[UnmergedData]) -> ObservedRows:
        """Take what is needed of the input, which is too large to be kept."""
        return cls(
            np.concatenate([d.miller_index for d in data]),
            np.concatenate([batches_of(d) for d in data]),
        )

    def write(
        self,
        path: Path,
        problem: MergeProblem,
        scaled: ScaledObservations,
        dataset: int,
        labels: DatasetLabels,
        made_by: str,
    ) -> None:
        """Write the observations of one dataset that count in its statistics.

        Parameters
        ----------
        path : Path
        problem : MergeProblem
        scaled : ScaledObservations
            Of ``problem.table``, in units of the merged file.
        dataset : int
        labels : DatasetLabels
        made_by : str
            First line of the history.
        """
        own = (problem.table.observations.dataset == dataset) & scaled.is_spot
        own = own.cpu().numpy()
        rows, asu = problem.source[own], problem.unique.asus[dataset]
        write_scaled_mtz(
            path,
            self.miller_index[rows],
            self.batch[rows],
            scaled.intensity.cpu().numpy()[own],
            scaled.variance.sqrt().cpu().numpy()[own],
            asu.cell,
            asu.space_group,
            labels,
            history=[made_by, "scaled; free of a prior; sigmas by the error model"],
        )


def batches_of(data: UnmergedData) -> NDArray[np.int32]:
    """Numbers of the images in their file where these tell images apart, else from 1, (N,)."""
    counted = (data.image + 1).astype(np.int32)
    given = data.metadata.get("BATCH")
    if given is None or not np.array_equal(given, np.rint(given)) or given.min() < 1:
        return counted
    pairs = np.unique(np.stack([data.image, given]), axis=1)
    is_one_to_one = all(len(np.unique(numbers)) == pairs.shape[1] for numbers in pairs)
    return given.astype(np.int32) if is_one_to_one else counted


def write_scaled_mtz(
    path: str | Path,
    miller_index: NDArray[np.int32],
    batch: NDArray[np.int32],
    intensity: Array,
    sigma: Array,
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    labels: DatasetLabels,
    *,
    history: Sequence[str] = (),
) -> None:
    """Write ``H K L M/ISYM BATCH I SIGI`` of observations without geometry.

    Batch headers have cell and wavelength, and no orientation.

    Parameters
    ----------
    path : str or Path
    miller_index : (N, 3) int
        As observed.
    batch : (N,) int
    intensity, sigma : (N,)
    cell : gemmi.UnitCell
    space_group : gemmi.SpaceGroup
    labels : DatasetLabels
    history : sequence of str
        Lines of at most 80 characters; longer ones are cut.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    mtz = gemmi.Mtz()
    dataset = mtz.add_dataset(labels.names.dataset)
    dataset.project_name, dataset.crystal_name = labels.names.project, labels.names.crystal
    dataset.id, dataset.wavelength = 1, labels.wavelength or 0.0
    mtz.title, mtz.spacegroup = labels.title, space_group
    mtz.set_cell_for_all(cell)
    for number in np.unique(batch):
        header = gemmi.Mtz.Batch()
        header.number, header.title = int(number), f"Batch {number}"
        header.dataset_id, header.wavelength = 1, labels.wavelength or 0.0
        for place, value in enumerate(cell.parameters):
            header.floats[place] = value
        mtz.batches.append(header)
    asu = to_asu(miller_index, space_group)
    columns = [(axis, "H", asu.miller_index[:, i]) for i, axis in enumerate("HKL")]
    columns += [("M/ISYM", "Y", asu.isym), ("BATCH", "B", batch)]
    columns += [("I", "J", intensity), ("SIGI", "Q", sigma)]
    for label, kind, _ in columns:
        mtz.add_column(label, kind, dataset_id=1)
    mtz.set_data(np.column_stack([values for *_, values in columns]).astype(np.float32))
    mtz.sort(5)  # H K L M/ISYM BATCH
    mtz.history = [line[:80] for line in history]
    with replacing(path) as temporary:
        temporary.write_bytes(mtz.write_to_bytes())
