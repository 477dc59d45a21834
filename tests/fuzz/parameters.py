"""Readers of parameters: checkpoints of a run and scale models of a merge."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import possible
import seeds
import torch
from edits import Edit, byte_edits, edited_bytes, edited_tree, tree_edits
from readers import Paths, Reader, n_edits

from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.model.build import build_integrator
from braggflux.integrator.model.integrator import Integrator
from braggflux.integrator.model.saved_integrator import SavedIntegrator, pixel_size
from braggflux.integrator.torch_file import load_torch, save_torch
from braggflux.merge.config import MergeConfig
from braggflux.merge.io.read import read_table
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.saved_scale import load_scale, save_scale
from braggflux.merge.problem import build_problem
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.integration.problem import build
from braggflux.pipelines.integration.run import restore
from braggflux.pipelines.integration.trainer import Trainer


class _Torch(Reader):
    @cached_property
    def document(self) -> Any:
        """What the valid file holds."""
        return load_torch(self.path, "")

    def edits(self, rng: np.random.Generator) -> list[Edit]:
        if rng.random() < 0.3:
            return [["bytes of file", byte_edits(rng, self.path.stat().st_size, n_edits(rng))]]
        return tree_edits(rng, self.document, n_edits(rng))

    def damaged(self, edits: list[Edit]) -> bytes:
        if edits and edits[0][0] == "bytes of file":
            return edited_bytes(self.path.read_bytes(), edits[0][1])
        path = seeds.folder() / "edited.pt"
        save_torch(path, edited_tree(self.document, edits))
        return path.read_bytes()


class Checkpoint(_Torch):
    """Checkpoint, from which a run goes on."""

    name, seed = "checkpoint", "epoch_0001.pt"

    @cached_property
    def trainer(self) -> Trainer:
        """A run's trainer."""
        config = RunConfig()
        problem = build(ShoeboxStore.open(seeds.folder() / "shoeboxes.h5"), config)
        return Trainer(problem, config, torch.device("cpu"))

    @cached_property
    def path(self) -> Path:
        path = seeds.folder() / self.seed
        self.trainer.start()
        save_torch(path, self.trainer.state_dict())
        return path

    def read(self, paths: Paths) -> list[str]:
        restore(self.trainer, paths[0])
        wrong = possible.finite(self.trainer.model.state_dict())
        wrong += possible.finite(self.trainer.table.columns())
        if not isinstance(self.trainer.epoch, int) or self.trainer.epoch < 0:
            wrong.append(f"epoch {self.trainer.epoch}")
        return wrong


class TrainedIntegrator(_Torch):
    """Integrator of a finished run, given to another."""

    name, seed = "integrator", "integrator.pt"

    @cached_property
    def store(self) -> ShoeboxStore:
        """Boxes of the other run."""
        return ShoeboxStore.open(seeds.folder() / "shoeboxes.h5")

    @cached_property
    def integrator(self) -> Integrator:
        """The other run's integrator."""
        return build_integrator(self.store, RunConfig().integrator)

    @cached_property
    def path(self) -> Path:
        path = seeds.folder() / self.seed
        SavedIntegrator.of(self.integrator, self.store, 1).write(path)
        return path

    def read(self, paths: Paths) -> list[str]:
        saved = SavedIntegrator.read(paths[0])
        saved.require_settings(RunConfig().integrator, None, paths[0])
        saved.require_pixels(pixel_size(self.store), paths[0])
        saved.give_to(self.integrator)
        return possible.finite(self.integrator.state_dict())


class ScaleModel(_Torch):
    """Scale model of a merge, used by another."""

    name, seed = "scale-model", "scale_model.pt"

    @cached_property
    def merged(self) -> tuple[Merger, Any, MergeConfig]:
        """A merger, its table, and settings."""
        config = MergeConfig(anomalous=True)
        problem = build_problem(read_table([seeds.folder() / "a.mtz"]), config)
        return Merger(problem.unique, problem.table, config), problem.table, config

    @cached_property
    def path(self) -> Path:
        path = seeds.folder() / self.seed
        save_scale(path, *self.merged)
        return path

    def read(self, paths: Paths) -> list[str]:
        merger, table, config = self.merged
        saved = load_scale(paths[0])
        wrong = possible.settings({"settings": saved.settings})
        saved.configured(config)
        saved.check(table)
        saved.load_into(merger)
        return wrong + possible.finite(merger.state_dict())
