"""Integrator and merger of a run, put together from a shoebox store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.model.build import build_integrator, start_from_strong_spots
from braggflux.integrator.model.integrator import Integrator
from braggflux.integrator.model.saved_integrator import SavedIntegrator
from braggflux.integrator.types import IntensityTable, ReflectionMetadata
from braggflux.merge.config import MergeConfig
from braggflux.merge.io.formats.photon_table import (
    STORE_ROW,
    by_data_set,
    photon_observations,
)
from braggflux.merge.model.merger import Merger
from braggflux.merge.problem import MergeProblem, build_problem
from braggflux.merge.rows import parse_parents
from braggflux.pipelines.config.run import RunConfig, RunMergeConfig
from braggflux.pipelines.config.run_settings import OF_MERGES_ALONE
from braggflux.pipelines.integration.checks import crystal_form, one_wavelength
from braggflux.pipelines.integration.data_sets import names_of, sweeps_of_set
from braggflux.pipelines.integration.joint_model import JointModel
from braggflux.pipelines.maps.reference_amplitudes import reference_amplitudes


@dataclass(frozen=True)
class Problem:
    """Data, unique reflections and model of a run."""

    store: ShoeboxStore
    merging: MergeProblem
    model: JointModel
    is_marginal: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Of each data set; empty where there is one."""
        return names_of(self.store.experiments)

    @property
    def asus(self) -> tuple[ReciprocalAsu, ...]:
        """Unique reflections of each data set, Bijvoet mates apart where the run keeps them so."""
        return self.merging.unique.asus

    def wavelength(self, name: str) -> float:
        """Wavelength of a data set [A]."""
        sweeps = self.store.experiments
        return one_wavelength([sweeps[k]["wavelength"] for k in sweeps_of_set(sweeps, name)])

    @property
    def metadata(self) -> ReflectionMetadata:
        """Everything known of the observations before counting, (N,) rows."""
        return self.store.metadata()

    @property
    def flags(self) -> Tensor:
        """Flags of the extraction, (N,)."""
        return self.store.flags


def build(store: ShoeboxStore, config: RunConfig, saved: SavedIntegrator | None = None) -> Problem:
    """Build the model of a store, with the integrator started from the strong spots.

    An integrator that was ``saved`` by another run gives networks and profile.

    Raises
    ------
    UserError
        The sweeps have different crystal forms, or no observation can be merged.
    """
    store.require_complete()
    torch.manual_seed(config.training.seed)
    integrator = build_integrator(store, config.integrator, saved)
    seed = config.training.seed
    start_from_strong_spots(integrator, store, seed, has_profile=saved is not None)
    settings = merge_settings(config, float(store.metadata().d.min()))
    parents = parse_parents(config.parents)
    merging, model = join(integrator, store, settings, parents, config.prior_model)
    return Problem(store, merging, model, settings.sigma != "difference")


def join(
    integrator: Integrator,
    store: ShoeboxStore,
    settings: MergeConfig,
    parents: Sequence[int | None] | None = None,
    prior_model: Path | None = None,
) -> tuple[MergeProblem, JointModel]:
    """Bind an integrator to an untrained merger of the observations of a store.

    Parameters
    ----------
    integrator : Integrator
    store : ShoeboxStore
    settings : MergeConfig
    parents : sequence of int or None, optional
        Of each data set.
    prior_model : Path, optional
        Model or merged MTZ whose amplitudes become the prior.
    """
    merging, store_row = _observations(store, settings, parents)
    table_row = torch.full((len(store),), -1)
    table_row[store_row] = torch.arange(len(store_row))
    f_calc = None
    if prior_model is not None:
        f_calc = torch.as_tensor(reference_amplitudes(prior_model, merging.unique.asus))
    merger = Merger(merging.unique, merging.table, settings, f_calc)
    merger.prior.couple()
    model = JointModel(integrator, merger, merging.table, table_row, store_row, store.flags)
    return merging, model


def merge_settings(config: RunConfig, d_min: float) -> MergeConfig:
    """Return the settings of the merge with what a run decides.

    Parameters
    ----------
    config : RunConfig
    d_min : float
        Of the observations [A].
    """
    defaults = RunMergeConfig()
    given = {name: getattr(defaults, name) for name in OF_MERGES_ALONE}
    # boxes come in any order, and a common error ties whole images
    given |= {"overloads": "keep", "resolve_ambiguity": "none", "pairing": "none"}
    has_parents = any(parent is not None for parent in parse_parents(config.parents) or ())
    is_coupled = (config.merge.anomalous or has_parents) and config.merge.prior != "wilson"
    if not has_parents:
        given["sigma"] = "amplitude"
    elif config.merge.sigma == "auto":
        given["sigma"] = "difference"
    return replace(
        config.merge,
        **given,
        # a hair beyond: the cell of a scan-varying crystal differs a little from frame to frame
        d_min=(config.extraction.d_min or d_min) * 0.999,
        prior="double-wilson" if is_coupled else "wilson",
        seed=config.training.seed,
    )


def _observations(
    store: ShoeboxStore, settings: MergeConfig, parents: Sequence[int | None] | None
) -> tuple[MergeProblem, Tensor]:
    """Observations that may be merged, and the row of each in the store, (N',).

    None is integrated yet: they have a photon each. What a run merges are the likelihoods of its
    latest pass over the boxes.
    """
    cell, space_group = crystal_form(
        [(e["unit_cell"], e["space_group"]) for e in store.experiments]
    )
    metadata, one = store.metadata(), torch.ones(len(store))
    asu = ReciprocalAsu(cell, space_group, settings.d_min, settings.anomalous)
    refl_id = torch.as_tensor(asu.refl_id(metadata.miller_index.numpy()))
    table = IntensityTable(metadata, ShiftedPoisson(2 * one, one, one), one, store.flags)
    can_be_merged = (refl_id >= 0) & table.is_integrated
    names = names_of(store.experiments)
    for name in names:
        sweeps = torch.tensor(sweeps_of_set(store.experiments, name))
        own = torch.isin(metadata.experiment, sweeps)
        if not can_be_merged[own].any():
            raise UserError(
                f"none of {int(own.sum())} observations {f'of {name} ' if name else ''}in "
                f"{store.path} can be merged in {space_group.xhm()} to {settings.d_min:.2f} A: "
                "all are masked, outside the frames or systematically absent; check the pixel "
                "mask and the space group"
            )
    whole = photon_observations(table, store.experiments, store.path)
    data = by_data_set(whole, store.experiments)
    if len(names) > 1:
        data = [replace(d, name=name) for d, name in zip(data, names, strict=True)]
    problem = build_problem(data, settings, parents)
    rows = np.concatenate([d.metadata[STORE_ROW] for d in data])[problem.source]
    return problem, torch.as_tensor(rows.astype(np.int64))
