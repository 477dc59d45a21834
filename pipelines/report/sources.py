"""What a report is drawn from: the files of one data set, of a run or of a merge, read once.

Every reader either answers or raises :class:`NoDataError` with the reason, which the page
then shows in the place of the figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import DialsFlag, read_reflections
from braggflux.merge.io.formats.dials import MIN_PARTIALITY
from braggflux.merge.io.formats.unmerged_mtz import read_unmerged_mtz
from braggflux.merge.io.mtz import MergedMtz, read_merged_mtz
from braggflux.pipelines.maps.anomalous_peaks import AnomalousModel
from braggflux.pipelines.workspace.records.readers import read_table
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory

if TYPE_CHECKING:
    from braggflux.integrator.types import IntensityTable

Array = NDArray[np.float64]
T = TypeVar("T")

OURS = "braggflux"


class NoDataError(Exception):
    """A figure cannot be drawn; the message says why and what would help."""


class NotMeantError(NoDataError):
    """A figure says nothing of such data: it is left out of the page."""


@dataclass(frozen=True)
class Observations:
    """Scaled, unmerged observations of one program, (N,) each.

    Parameters
    ----------
    miller_index : (N, 3) int
        As observed.
    intensity, sigma : (N,)
        On the common scale, free of any prior on the intensity.
    image : (N,) int
        Number of the image (of the batch, for several sweeps).
    log_scale : (N,)
        Log of K in I_observed = K I, Lorentz and polarization factors left out.
    xyz : (N, 3)
        Predicted fast [pixels], slow [pixels], rotation [deg or frames].
    """

    miller_index: NDArray[np.int64]
    intensity: Array
    sigma: Array
    image: NDArray[np.int64]
    log_scale: Array
    xyz: Array


def finite_mean(values: Array) -> float | None:
    """Mean of the values that are numbers; None where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


@dataclass(eq=False)
class DataSource:
    """Files of one data set.

    Parameters
    ----------
    files : RunDirectory
        Names of the files; of a merge too, whose files are called the same.
    name : str
        Of the data set; empty where there is one.
    is_merge : bool
        `braggflux merge` made it: no pixels, no epochs.
    model, reference : Path, optional
        Atomic model; merged MTZ of DIALS.
    notes : dict of str to str
        Why something is missing.
    is_still : bool
        Of stills: single observations are partial, R factors of them say little.
    """

    files: RunDirectory
    name: str = ""
    is_merge: bool = False
    model: Path | None = None
    reference: Path | None = None
    notes: dict[str, str] = field(default_factory=dict)
    is_still: bool = False
    answers: dict[Callable[..., Any], Any] = field(default_factory=dict, repr=False)

    def once(self, function: Callable[[DataSource], T]) -> T:
        """Answer of a function of this source, or its reason for none, computed once."""
        if function not in self.answers:
            try:
                self.answers[function] = function(self)
            except NoDataError as reason:
                self.answers[function] = reason
        answer = self.answers[function]
        if isinstance(answer, NoDataError):
            raise answer
        return answer

    @cached_property
    def merged(self) -> MergedMtz:
        """Our merged amplitudes: at the end, or of the last epoch so far."""
        path = self.files.merged
        if not path.is_file():
            epochs = sorted(self.files.mtz_folder.glob(f"{self.files.stem}epoch_*.mtz"))
            if not epochs:
                raise NoDataError("nothing is merged yet: no epoch has ended")
            path = epochs[-1]
        return _read(read_merged_mtz, path)

    @cached_property
    def merged_reference(self) -> MergedMtz:
        """DIALS' merged amplitudes."""
        if self.reference is None:
            why = self.notes.get("reference", "no merged MTZ of DIALS was given (--reference)")
            raise NoDataError(why)
        if not self.reference.is_file():
            raise NoDataError(f"{self.reference} is no longer there")
        return _read(read_merged_mtz, self.reference)

    @cached_property
    def asu(self) -> ReciprocalAsu:
        """Unique reflections that both programs are scored on: our cell, to our resolution."""
        ours = self.merged
        d_min = float(ours.cell.calculate_d_array(ours.table.miller_index).min())
        return ReciprocalAsu(ours.cell, ours.space_group, d_min * (1 - 1e-6), anomalous=True)

    @cached_property
    def observations(self) -> Observations:
        """Our scaled observations, unmerged.mtz."""
        path = self.files.unmerged
        if not path.is_file():
            why = "a merge writes none" if self.is_merge else "it is written at the end of the run"
            raise NoDataError(f"{path.name} is not there: {why}")
        mtz = _read(read_unmerged_mtz, path)
        none = np.full(len(mtz.intensity), np.nan)
        columns = mtz.columns
        with np.errstate(all="ignore"):
            log_scale = np.log(columns.get("SCALEUSED", none))
        return Observations(
            mtz.miller_index.astype(np.int64),
            mtz.intensity,
            mtz.sigma,
            mtz.batch,
            log_scale,
            np.stack([columns.get(name, none) for name in ("XDET", "YDET", "ROT")], axis=1),
        )

    @cached_property
    def reference_observations(self) -> Observations:
        """DIALS' scaled observations: scaled.refl beside its merged MTZ."""
        if self.reference is None:
            raise NoDataError(self.notes.get("reference", "no merged MTZ of DIALS was given"))
        path = self.reference.parent / "scaled.refl"
        if not path.is_file():
            raise NoDataError(
                "DIALS' scaled.refl is not beside its merged MTZ: put it there, then "
                "`braggflux report` again"
            )
        return _dials_observations(path)

    @cached_property
    def intensities(self) -> IntensityTable:
        """What the integrator says of every observation, intensities.h5."""
        if self.is_merge:
            raise NoDataError("a merge has no pixels: see the report of the run that integrated")
        if not self.files.intensities.is_file():
            raise NoDataError("intensities.h5 is not there: it is written at the end of the run")
        from braggflux.integrator.io.intensity_file import read_intensities  # HDF5

        return _read(read_intensities, self.files.intensities)

    @cached_property
    def anomalous_model(self) -> AnomalousModel:
        """Phases and sites of the atomic model."""
        if self.model is None:
            option = "`braggflux report DIR --model M.pdb`" if self.is_merge else "--model"
            raise NoDataError(
                self.notes.get("peaks", f"maps need the phases of a model; give one: {option}")
            )
        if not self.model.is_file():
            raise NoDataError(f"{self.model} is no longer there")
        ours = self.merged
        try:
            return AnomalousModel(self.model, ours.cell, ours.space_group, self.asu.d_min)
        except UserError as error:
            raise NoDataError(str(error)) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, one per epoch."""
        return [] if self.is_merge else self.files.read_metrics()

    def statistics(self) -> list[dict[str, str]]:
        """Rows of statistics.csv, of all last."""
        rows = read_table(self.files.statistics_file, ("shell",))
        if not rows:
            raise NoDataError("statistics.csv is not there yet")
        return rows

    def by_program(self, kind: str) -> dict[str, Any]:
        """Read ``kind`` (``merged`` or ``observations``) of both programs, as far as there is any.

        Raises
        ------
        NoDataError
            We have none ourselves.
        """
        found = {OURS: getattr(self, kind)}
        name = "merged_reference" if kind == "merged" else "reference_observations"
        try:
            found[REFERENCE] = getattr(self, name)
        except NoDataError:
            pass
        return found

    def why_no_reference(self, kind: str) -> str:
        """Reason why :meth:`by_program` has no DIALS; empty where it has."""
        name = "merged_reference" if kind == "merged" else "reference_observations"
        try:
            getattr(self, name)
        except NoDataError as reason:
            return str(reason)
        return ""


def _read(reader: Any, path: Path) -> Any:
    try:
        return reader(path)
    except UserError as error:
        raise NoDataError(str(error)) from error


def _dials_observations(path: Path) -> Observations:
    """Scaled observations that DIALS counts in its own statistics."""
    table = _read(read_reflections, path)
    needed = ("intensity.scale.value", "intensity.scale.variance", "inverse_scale_factor")
    if missing := [name for name in (*needed, "xyzcal.px", "flags") if name not in table]:
        raise NoDataError(f"{path.name} has no column {missing[0]}: it is not of dials.scale")
    flags = table["flags"].astype(np.int64)
    scale = table["inverse_scale_factor"]
    partiality = table.columns.get("partiality", np.ones(len(table)))
    keep = ((flags & DialsFlag.SCALED) != 0) & ((flags & DialsFlag.BAD_FOR_SCALING) == 0)
    keep &= (scale > 0) & (partiality > MIN_PARTIALITY)
    keep &= table["intensity.scale.variance"] > 0
    if not keep.any():
        raise NoDataError(f"{path.name} has no scaled reflection")
    xyz, scale = table["xyzcal.px"][keep], scale[keep]
    return Observations(
        table["miller_index"][keep].astype(np.int64),
        table["intensity.scale.value"][keep] / scale,
        np.sqrt(table["intensity.scale.variance"][keep]) / scale,
        np.floor(xyz[:, 2]).astype(np.int64) + 1,
        np.log(scale),
        xyz,
    )
