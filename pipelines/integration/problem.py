"""Integrator and merger of a run, put together from a shoebox store."""

from __future__ import annotations

from dataclasses import dataclass

import gemmi
import torch
from torch import Tensor

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.model.build import (
    build_integrator,
    start_from_strong_spots,
    sweep_widths,
)
from braggflux.integrator.types import Flag, ReflectionMetadata
from braggflux.merge.data.scale_features import scale_features
from braggflux.merge.engine.merger import Merger
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.integration.checks import crystal_form, one_wavelength
from braggflux.pipelines.integration.joint_model import JointModel


@dataclass(frozen=True)
class Problem:
    """What a run works on: data, unique reflections and model."""

    store: ShoeboxStore
    asu: ReciprocalAsu
    model: JointModel
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    wavelength: float

    @property
    def metadata(self) -> ReflectionMetadata:
        """Everything known of the observations before counting, (N,) rows."""
        return self.store.metadata()

    @property
    def flags(self) -> Tensor:
        """Flags of the extraction, (N,)."""
        return self.store.flags


def build_problem(store: ShoeboxStore, config: RunConfig) -> Problem:
    """Build the model of a store, with the integrator started from the strong spots.

    Raises
    ------
    UserError
        The sweeps have different crystal forms, or no observation can be merged.
    """
    cell, space_group = crystal_form(
        [(e["unit_cell"], e["space_group"]) for e in store.experiments]
    )
    metadata = store.metadata()
    d_min = config.extraction.d_min or float(metadata.d.min())
    # a hair beyond: the cell of a scan-varying crystal differs a little from frame to frame
    asu = ReciprocalAsu(cell, space_group, d_min * 0.999, config.merge.anomalous)
    refl_id = torch.as_tensor(asu.refl_id(metadata.miller_index.numpy()))
    used = (refl_id >= 0) & ((store.flags & Flag.REJECTED) == 0)
    if not used.any():
        raise UserError(
            f"none of {len(store)} observations in {store.path} can be merged in "
            f"{space_group.xhm()} to {d_min:.2f} A: all are masked, outside the frames or "
            "systematically absent; check the pixel mask and the space group"
        )
    torch.manual_seed(config.training.seed)
    integrator = build_integrator(store, config.integrator)
    start_from_strong_spots(integrator, store, config.training.seed)
    n_frames = [int(e["n_images"]) for e in store.experiments]
    features = scale_features(metadata, n_frames, list(sweep_widths(store)), config.merge)
    n_obs = torch.bincount(refl_id[used], minlength=len(asu))
    merger = Merger(asu, features, n_obs, config.merge)
    wavelength = one_wavelength([e["wavelength"] for e in store.experiments])
    model = JointModel(integrator, merger, refl_id, store.flags)
    return Problem(store, asu, model, cell, space_group, wavelength)
