"""Several inputs of one crystal form, merged into one amplitude each: sweeps of one data set.

Every member keeps scales of its own: images of members are no neighbours, their sweeps are other
sweeps, and no batch number is used twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.forms import CrystalForm, check_one_crystal_form
from braggflux.integrator.errors import UserError
from braggflux.merge.io.observations import PHOTON_VARIANCE, UnmergedData, common_name
from braggflux.merge.io.stores.observation_store import ObservationStore, StoreView
from braggflux.merge.io.sweep_columns import SWEEP

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: Metadata column: number of the input that a row of a group comes from.
MEMBER = "member"
BATCH = "BATCH"
#: Wavelengths that differ by more, relatively, are different experiments.
WAVELENGTH_TOLERANCE = 1e-3


def check_group(members: Sequence[CrystalForm], wavelengths: Sequence[float | None]) -> None:
    """Make sure that inputs may be one data set.

    Parameters
    ----------
    members : sequence of CrystalForm
    wavelengths : sequence of float or None
        Of each [A]; None where it is not known.

    Raises
    ------
    UserError
        Cells, space groups or wavelengths differ.
    """
    check_one_crystal_form(members)
    known = [(m.name, w) for m, w in zip(members, wavelengths, strict=True) if w]
    for name, wavelength in known[1:]:
        if abs(wavelength / known[0][1] - 1) > WAVELENGTH_TOLERANCE:
            raise UserError(
                f"--group: {known[0][0]} was measured at {known[0][1]:.5f} A and {name} at "
                f"{wavelength:.5f} A; their anomalous signals differ: leave them apart, they "
                "share a scale all the same"
            )


def batch_step(
    groups: Sequence[Sequence[int]], ranges: Sequence[tuple[float, float] | None]
) -> int:
    """Distance of the batch numbers of a group's members: 0 where none is used twice.

    The same for all groups, so that images of several datasets that had one number have one still.

    Parameters
    ----------
    groups : sequence of sequence of int
        Datasets of each group.
    ranges : sequence of (float, float) or None
        Least and largest batch number of each dataset; None where it has none.
    """
    known = [[own for k in group if (own := ranges[k]) is not None] for group in groups]
    in_order = [sorted(group) for group in known]
    if all(a[1] < b[0] for group in in_order for a, b in pairwise(group)):
        return 0
    largest = max(high for group in known for _, high in group)
    return 10 ** max(3, len(str(int(largest))))


def combine_group(members: Sequence[UnmergedData], step: int) -> UnmergedData:
    """Put the observations of several inputs behind each other as one dataset.

    Parameters
    ----------
    members : sequence of UnmergedData
    step : int
        Added to the batch numbers of each member but the first, once more for each; of
        :func:`batch_step`. 0 leaves them.

    Raises
    ------
    UserError
        As :func:`check_group`.
    """
    check_group(members, [d.typical_wavelength for d in members])
    data = [_with_lp_applied(d) for d in members] if _is_mixed(members) else list(members)
    has_counts = any(PHOTON_VARIANCE in d.metadata for d in data)
    columns: list[dict[str, Array]] = []
    n_sweeps = 0
    for k, d in enumerate(data):
        own = d.metadata | {MEMBER: np.full(len(d), float(k))}
        if has_counts:  # 0: no counts
            own = {PHOTON_VARIANCE: np.zeros(len(d))} | own
        if BATCH in own:
            own[BATCH] = own[BATCH] + k * step
        if SWEEP in own:
            own[SWEEP] = own[SWEEP] + n_sweeps
            n_sweeps = int(own[SWEEP].max()) + 1
        columns.append(own)
    shared = [name for name in columns[0] if all(name in own for own in columns)]
    if lost := sorted(set().union(*columns) - set(shared)):
        log.info("columns that not all members of a group have are left out: %s", " ".join(lost))
    first_image = np.cumsum([0, *(d.n_images for d in data)])
    has_wavelength = all(d.wavelength is not None for d in data)
    return replace(
        data[0],
        miller_index=np.concatenate([d.miller_index for d in data]),
        intensity=np.concatenate([d.intensity for d in data]),
        sigma=np.concatenate([d.sigma for d in data]),
        image=np.concatenate([d.image + n for d, n in zip(data, first_image, strict=False)]),
        wavelength=np.concatenate([d.wavelength for d in data]) if has_wavelength else None,
        metadata={name: np.concatenate([own[name] for own in columns]) for name in shared},
        cell=mean_cell([d.cell for d in data], [len(d) for d in data]),
        name=reduce(common_name, [d.name for d in data]),
        labels=data[0].labels._replace(wavelength=_first_known(data)),
    )


def mean_cell(cells: Sequence[gemmi.UnitCell], weights: Sequence[int]) -> gemmi.UnitCell:
    """Mean of the parameters of like cells, weighted."""
    return gemmi.UnitCell(*np.average([c.parameters for c in cells], axis=0, weights=weights))


def _first_known(data: Sequence[UnmergedData]) -> float | None:
    return next((d.labels.wavelength for d in data if d.labels.wavelength), None)


def _is_mixed(members: Sequence[UnmergedData]) -> bool:
    return len({d.has_lp_applied for d in members}) > 1


def _with_lp_applied(data: UnmergedData) -> UnmergedData:
    """Divide out the Lorentz and polarization factors where the input knows them."""
    if data.has_lp_applied or "LP" not in data.metadata:
        return replace(data, has_lp_applied=True)
    factor = np.maximum(data.metadata["LP"], 1e-6)
    scaled = (
        {PHOTON_VARIANCE: factor * data.metadata[PHOTON_VARIANCE]}
        if (PHOTON_VARIANCE in data.metadata)
        else {}
    )
    return replace(
        data,
        intensity=factor * data.intensity,
        sigma=factor * data.sigma,
        metadata=data.metadata | scaled,
        has_lp_applied=True,
    )


class GroupStore(StoreView):
    """Several stores read as one, as :func:`combine_group` joins them.

    Parameters
    ----------
    members : sequence of ObservationStore
        Closed with this one.
    step : int
        See :func:`combine_group`.

    Raises
    ------
    UserError
        As :func:`check_group`, or one store had Lorentz and polarization applied and another not.
    """

    def __init__(self, members: Sequence[ObservationStore], step: int) -> None:
        super().__init__(members[0])
        check_group(members, [m.labels.wavelength for m in members])
        if len({m.has_lp_applied for m in members}) > 1:
            raise UserError(
                "--group: Lorentz and polarization factors are applied in some of the stores "
                f"{' '.join(m.name for m in members)} and not in others; convert them from files "
                "of one kind"
            )
        self._members, self._step = tuple(members), step
        self.metadata_names = tuple(
            n for n in members[0].metadata_names if all(n in m.metadata_names for m in members)
        )
        self.has_wavelength = all(m.has_wavelength for m in members)
        self._first_row = np.cumsum([0, *(len(m) for m in members)])
        self._first_image = np.cumsum([0, *(m.n_images for m in members)])
        starts = [m.image_starts[:-1] + n for m, n in zip(members, self._first_row, strict=False)]
        self.image_starts = np.concatenate([*starts, self._first_row[-1:]])
        self.cell = mean_cell([m.cell for m in members], [len(m) for m in members])
        self.name = reduce(common_name, [m.name for m in members])

    def close(self) -> None:
        """Close all."""
        for member in self._members:
            member.close()

    def read(self, first: int = 0, last: int | None = None) -> UnmergedData:
        """Read images ``first`` to ``last`` - 1, as :meth:`ObservationStore.read`."""
        last = self.n_images if last is None else last
        if not 0 <= first <= last <= self.n_images:
            raise IndexError(f"images {first} to {last} of {self.n_images}")
        parts = []
        for k, low, high in self._pieces(self._first_image, first, last):
            part = self._members[k].read(low, high)
            metadata = {n: part.metadata[n] for n in self.metadata_names}
            if BATCH in metadata:
                metadata[BATCH] = metadata[BATCH] + k * self._step
            shift = int(self._first_image[k]) + low - first
            wavelength = part.wavelength if self.has_wavelength else None
            parts.append(
                replace(part, image=part.image + shift, metadata=metadata, wavelength=wavelength)
            )

        def joined(column: Callable[[UnmergedData], NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate([column(part) for part in parts])

        waves = [part.wavelength for part in parts if part.wavelength is not None]
        return replace(
            parts[0],
            miller_index=joined(lambda p: p.miller_index),
            intensity=joined(lambda p: p.intensity),
            sigma=joined(lambda p: p.sigma),
            image=joined(lambda p: p.image),
            wavelength=np.concatenate(waves) if self.has_wavelength else None,
            metadata={
                name: np.concatenate([p.metadata[name] for p in parts])
                for name in self.metadata_names
            },
            cell=self.cell,
            name=self.name,
        )

    def column(self, name: str, rows: slice) -> NDArray[Any]:
        """Read some rows of a column, as :meth:`ObservationStore.column`."""
        parts = []
        for k, low, high in self._pieces(self._first_row, rows.start, rows.stop):
            values = self._members[k].column(name, slice(low, high))
            parts.append(values + k * self._step if name == f"metadata/{BATCH}" else values)
        return np.concatenate(parts)

    @staticmethod
    def _pieces(firsts: NDArray[Any], first: int, last: int) -> list[tuple[int, int, int]]:
        """Members with anything of a range, and the range in each; at least one, be it empty."""
        found = []
        for k in range(len(firsts) - 1):
            low, high = max(first, int(firsts[k])), min(last, int(firsts[k + 1]))
            if high > low:
                found.append((k, low - int(firsts[k]), high - int(firsts[k])))
        return found or [(0, 0, 0)]
