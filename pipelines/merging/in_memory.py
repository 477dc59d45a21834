"""The steps of a merge in memory.

    start -> fit to the training part -> choose what the data decide -> predict what was held out
          -> fit again to all

What the data decide: the indexing of stills, scales of single frames, sigma_A of a reference, r of
relatives. Each step leaves scales and amplitudes where the next one goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from braggflux.integrator.errors import UserError
from braggflux.integrator.processes import ALONE, Processes
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.fit.flicker import choose_flicker, is_in_doubt
from braggflux.merge.fit.gauge import fix_gauge
from braggflux.merge.fit.half_set_correlation import half_set_correlation
from braggflux.merge.fit.held_out import predict, split
from braggflux.merge.fit.sigma_a import set_sigma_a
from braggflux.merge.fit.training import (
    Observer,
    fit,
    pool_trees,
    start,
    start_amplitudes,
    start_held_out,
)
from braggflux.merge.indexing.refine import reassigned, refined, seeded
from braggflux.merge.model.finite import require_finite
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.saved_scale import SavedScale
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.problem import MergeProblem
from braggflux.merge.rows import UniqueRows
from braggflux.pipelines.workspace import log

#: Share of the epochs that a fit gets which goes on from another.
SHORT = 0.25
#: Of amplitudes whose mates have just been tied.
COUPLED_EPOCHS = 60


@dataclass(frozen=True)
class FixedInputs:
    """Inputs of a fit that stay as they are.

    Parameters
    ----------
    saved : SavedScale, optional
        Scales and error model of an earlier merge; then amplitudes alone are fitted.
    f_calc : Tensor, (R,), optional
        Amplitudes of a reference, NaN where there is none.
    indexing : Tensor, (R0,), optional
        F^2 of the rows of the first dataset under the indexing that is wanted, NaN for none.
    """

    saved: SavedScale | None = None
    f_calc: Tensor | None = None
    indexing: Tensor | None = None


@dataclass(frozen=True)
class FittedMerge:
    """Merger on the CPU, the problem with indices as chosen, and what was found on the way.

    ``predictions`` is of the held-out observations by kind, ``tables`` rows by name.
    """

    merger: Merger
    problem: MergeProblem
    predictions: Mapping[str, Any]
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def check_coupling(unique: UniqueRows, config: MergeConfig) -> None:
    """Check that a double-Wilson prior can act.

    Raises
    ------
    UserError
        It was asked for, and there is no relative.
    """
    if config.prior == "double-wilson" and not (unique.parent >= 0).any():
        raise UserError(
            "--prior double-wilson finds no amplitude with a relative; give --parents for "
            "datasets or --anomalous for Bijvoet mates"
        )


def _require_images(table: ObservationTable, processes: Processes) -> None:
    if table.n_units < processes.size:
        raise UserError(
            f"{processes.size} processes cannot share {table.n_units} image(s): start fewer"
        )


class MergeFit:
    """One fit.

    Parameters
    ----------
    problem : MergeProblem
    config : MergeConfig
    known : FixedInputs
    device : torch.device
    processes : Processes
        Each takes some of the images of every step, and knows all of them.
    """

    def __init__(
        self,
        problem: MergeProblem,
        config: MergeConfig,
        known: FixedInputs,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.known, self.device = config, known, device
        _require_images(problem.table, processes)
        self.masks = split(problem.table, config.held_out, config.stills, config.seed)
        if problem.ambiguity is not None:
            problem = seeded(problem, self.masks, config, known.indexing)
        self.problem = problem
        check_coupling(problem.unique, config)
        merger = Merger(problem.unique, self.training, config, known.f_calc)
        self.merger = merger.to(device)
        merger.processes = processes
        self.couples = merger.prior.has(DoubleWilson)
        self.tables: dict[str, Sequence[Mapping[str, Any]]] = {}

    @property
    def with_scales(self) -> bool:
        """Whether scales and error model are fitted too."""
        return self.known.saved is None

    @property
    def training(self) -> ObservationTable:
        """Observations as they are indexed now, some held out."""
        masked = self.problem.table.with_masks(self.masks.is_used, self.masks.is_seen)
        return masked.to(self.device)

    def run(self) -> FittedMerge:
        """Take all steps."""
        self._start()
        merger, config, masks = self.merger, self.config, self.masks
        if self.problem.ambiguity is not None:
            self.problem = refined(merger, self.problem, masks, config, self.with_scales)
        with log.progress("merging") as advance:
            self._fit(self.training, 1.0, lambda e, _: advance(e, config.epochs))
        if self.with_scales:
            o = self.training.observations
            merger.scale.describe_unseen(o.exposure_group, o.is_used)
            self._choose_flicker()
        if self.known.f_calc is not None:
            self._choose_sigma_a()
        if self.couples:
            self._choose_correlation()
        held = (("image", masks.by_image), ("observation", masks.by_observation))
        predictions = {k: asdict(predict(merger, self.training, chosen)) for k, chosen in held}
        if self.problem.ambiguity is not None:
            self.problem = reassigned(merger, self.problem)
        table = self.problem.table.to(self.device)
        start_held_out(merger, table, self.training, self.with_scales)
        self._fit_all(table)
        if self.with_scales:
            fix_gauge(merger, table, config)
        require_finite(merger, None, "end of the fit")
        merger.processes = ALONE
        return FittedMerge(merger.to("cpu"), self.problem, predictions, self.tables)

    def _start(self) -> None:
        if self.with_scales:
            start(self.merger, self.training)
        else:
            self.known.saved.load_into(self.merger)
            start_amplitudes(self.merger, self.training)
        if self.couples and self.problem.unique.ties_datasets:
            self._couple()

    def _couple(self) -> None:
        """Tie relatives; they start alike, so that each outvotes outliers of the other."""
        self.merger.prior.couple()
        pool_trees(self.merger)

    def _fit_all(self, table: ObservationTable) -> None:
        """Fit again to all data.

        Mates are tied when scales and errors are as they would be without: F(+) and F(-) of the
        files, each from its own observations, are then the same, and so are their sigmas.
        """
        if not self.couples or self.problem.unique.ties_datasets:
            self._fit(table, SHORT)
            return
        self.merger.prior.uncouple()
        self._fit(table, SHORT)
        self._couple()
        fit(self.merger, table, self.config, epochs=COUPLED_EPOCHS, with_scales=False)

    def _fit(
        self,
        table: ObservationTable,
        share: float,
        observer: Observer | None = None,
    ) -> None:
        fit(
            self.merger,
            table,
            self.config,
            epochs=max(1, round(share * self.config.epochs)),
            with_scales=self.with_scales,
            observer=observer,
        )

    def _choose_flicker(self) -> None:
        if not self.config.held_out or not is_in_doubt(self.merger, self.training, self.config):
            return
        held_out = self.masks.by_observation.to(self.device)
        epochs = max(1, round(SHORT * self.config.epochs))
        rows = choose_flicker(self.merger, self.training, held_out, self.config, epochs)
        self.tables["scale"] = rows

    def _choose_sigma_a(self) -> None:
        rows = set_sigma_a(self.merger, self.training)
        self.tables["sigma_a"] = rows
        self._fit(self.training, SHORT)

    def _choose_correlation(self) -> None:
        """Choose r and fit the amplitudes with it.

        Scales are fitted with the mates tied to one amplitude: r of the mates is nothing to them.
        """
        if self.config.correlation is not None:
            self.merger.prior.part(DoubleWilson).one_minus_r2.fill_(1 - self.config.correlation**2)
        else:
            rows = half_set_correlation(self.merger, self.training, self.config.seed)
            self.tables["correlation"] = rows
        self._couple()
        if self.problem.unique.ties_datasets:
            self._fit(self.training, SHORT)
        else:
            fit(self.merger, self.training, self.config, epochs=COUPLED_EPOCHS, with_scales=False)
