"""Readers of HDF5 files: frames of detectors, and stores of our own."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import possible
import seeds
import torch
from edits import Edit
from hdf5_edits import edit_hdf5, hdf5_edits, objects_of
from readers import Paths, Reader, n_edits

from braggflux.integrator.io.decoding import apart
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.io.images import open_frames
from braggflux.integrator.io.intensity_file import read_experiment_records, read_intensities
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.merge.io.read import read_table
from braggflux.merge.io.stores.store_conversion import convert_to_store
from braggflux.merge.io.stores.unmerged_store import UnmergedStore
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.integration.problem import build

apart.CPU_SECONDS = 3  # less than what the suite takes for a hang


class _Hdf5(Reader):
    @cached_property
    def objects(self) -> dict[str, dict[str, Any]]:
        """What is in the valid file."""
        return objects_of(self.path)

    def edits(self, rng: np.random.Generator) -> list[Edit]:
        return hdf5_edits(rng, self.objects, self.path.stat().st_size, n_edits(rng))

    def damaged(self, edits: list[Edit]) -> bytes:
        raise NotImplementedError

    def write(self, edits: list[Edit], folder: Path) -> Paths:
        path = folder / self.seed
        shutil.copyfile(self.path, path)
        edit_hdf5(path, edits)
        return [path]


class _Frames(_Hdf5):
    #: Folder of the seeds, and the files in it that go together.
    source = "."
    files = ("tiny_master.h5", "tiny_data_000001.h5", "tiny_data_000002.h5")

    @property
    def path(self) -> Path:
        return seeds.folder() / self.source / self.seed

    def write(self, edits: list[Edit], folder: Path) -> Paths:
        for name in self.files:
            if name != self.seed:
                shutil.copyfile(self.path.with_name(name), folder / name)
        super().write(edits, folder)
        text = (seeds.folder() / "sweep.expt").read_text()
        expt = folder / "sweep.expt"
        expt.write_text(text.replace(str(seeds.folder()), str(folder)))
        return [expt]

    def read(self, paths: Paths) -> list[str]:
        (sweep,) = read_experiments(paths[0])
        wrong = []
        with open_frames(sweep) as frames:
            mask = frames.static_mask()
            for number in range(frames.n_images):
                for photons, usable, panel in zip(
                    frames.read(number), mask, sweep.panels, strict=True
                ):
                    if photons.shape != panel.shape or usable.shape != panel.shape:
                        wrong.append(f"a frame of {photons.shape}")
                    elif photons.min() < -1 or photons.max() > panel.trusted_range[1]:
                        wrong.append(f"counts {photons.min()} to {photons.max()}")
        return wrong


class Master(_Frames):
    """NXmx master file."""

    name, seed = "nxmx-master", "tiny_master.h5"


class FrameData(_Frames):
    """NXmx data file."""

    name, seed = "nxmx-data", "tiny_data_000001.h5"


class BloscFrames(_Frames):
    """NXmx master file that holds frames packed by Blosc."""

    name, seed, source, files = "nxmx-blosc", "tiny_master.h5", "blosc", ()


class Tiles(_Frames):
    """Tiles that a virtual data set of the master file puts together."""

    name, seed, source = "nxmx-tiles", "tiles.h5", "tiles"
    files = ("tiny_master.h5", "tiles.h5")


class Shoeboxes(_Hdf5):
    """Shoebox store: read whole."""

    name, seed = "shoeboxes", "shoeboxes.h5"

    def read(self, paths: Paths) -> list[str]:
        with ShoeboxStore.open(paths[0]) as store:
            batch = store.read(slice(0, len(store)))
            field = store.background(0)
            wrong = possible.finite(store.metadata().columns())
            wrong += possible.finite({"background": field.total[0], "ratio": field.frame_ratio})
            for record in store.experiments:
                wrong += possible.cell(record.get("unit_cell", seeds.CELL.parameters))
            if not bool((batch.counts >= 0).all()):
                wrong.append("negative counts")
        return wrong


class ShoeboxesOfRun(Shoeboxes):
    """Shoebox store: the model of a run built on it, and boxes integrated."""

    name = "shoeboxes-run"

    def read(self, paths: Paths) -> list[str]:
        with ShoeboxStore.open(paths[0]) as store:
            model = build(store, RunConfig()).model
            boxes = store.read(slice(0, 64))
            with torch.no_grad():
                _, table = model.integrate(boxes, sample=False, use_expected=False)
            return possible.finite(model.state_dict()) + possible.finite(table.columns())


class PhotonCounts(_Hdf5):
    """intensities.h5."""

    name, seed = "intensities", "intensities.h5"

    def read(self, paths: Paths) -> list[str]:
        wrong = possible.finite(read_intensities(paths[0]).columns())
        read_experiment_records(paths[0])
        return wrong or possible.unmerged(read_table(paths))


class Unmerged(_Hdf5):
    """Store of `braggflux convert`."""

    name, seed = "unmerged", "unmerged.h5"

    @cached_property
    def path(self) -> Path:
        path = seeds.folder() / self.seed
        convert_to_store(seeds.folder() / "a.mtz", path)
        return path

    def read(self, paths: Paths) -> list[str]:
        store = UnmergedStore(paths[0])
        try:
            return possible.unmerged([store.read()]) + possible.unmerged(read_table(paths))
        finally:
            store.close()
