"""One small file of each kind that the program writes and reads."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import gemmi
import numpy as np
import torch
from simulated_merge import simulate

from braggflux.integrator.io.intensity_file import (
    read_experiment_records,
    read_intensities,
    write_intensities,
)
from braggflux.integrator.io.shoebox_format import INTEGER_COLUMNS
from braggflux.integrator.io.shoebox_store import BackgroundField, ShoeboxStore, writing_store
from braggflux.integrator.torch_file import load_torch, save_torch
from braggflux.integrator.types import ReflectionMetadata
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.stores.unmerged_store import UnmergedStore, write_unmerged_store

N = 40
BOX = (3, 5, 5)


def write_shoeboxes(path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = {"miller_index", "corner", "xyz_px", "xyz_mm", "s1", "s0_crystal", "s1_crystal"}
    columns = {
        f.name: rng.integers(0, 9, (N, 3) if f.name in vectors else N).astype(
            np.int64 if f.name in INTEGER_COLUMNS else np.float64
        )
        for f in fields(ReflectionMetadata)
    }
    with writing_store(path, N, BOX, np.dtype(np.uint16)) as writer:
        counts = rng.poisson(20.0, (N, *BOX))
        writer.write_boxes(0, counts, np.ones((N, *BOX), np.uint8))
        writer.write_columns({**columns, "flags": np.zeros(N, int)})
        ones = [np.ones((4, 5))]
        writer.write_background(0, BackgroundField(ones, ones, np.ones(9)))
        writer.write_header({"max_count": 99}, [{"wavelength": 1.0}])


def read_shoeboxes(path: Path) -> list[object]:
    with ShoeboxStore.open(path) as store:
        field = store.background(0)
        arrays = [*store.read_raw(slice(0, N)), *vars(store.metadata()).values(), store.flags]
        arrays += [field.frame_ratio, *field.total, *field.count]
        return [store.experiments, store.attributes, *(np.asarray(a).tolist() for a in arrays)]


def write_counts(path: Path) -> None:
    write_intensities(path, simulate(d_min=12.0, span_deg=10.0).table, [{"wavelength": 1.0}])


def read_counts(path: Path) -> list[object]:
    columns = read_intensities(path).columns()
    return [read_experiment_records(path), {k: v.tolist() for k, v in columns.items()}]


def write_unmerged(path: Path) -> None:
    rng = np.random.default_rng(0)
    data = UnmergedData(
        miller_index=rng.integers(-30, 30, (N, 3)).astype(np.int32),
        intensity=rng.normal(size=N),
        sigma=np.ones(N),
        image=np.arange(N) // 8,
        wavelength=None,
        metadata={"x": rng.normal(size=N)},
        cell=gemmi.UnitCell(79.0, 79.0, 38.0, 90, 90, 90),
        space_group=gemmi.SpaceGroup("P 43 21 2"),
        name="a",
        has_lp_applied=True,
    )
    write_unmerged_store(path, [data])


def read_unmerged(path: Path) -> list[object]:
    store = UnmergedStore(path)
    try:
        data = store.read()
    finally:
        store.close()
    arrays = (data.miller_index, data.intensity, data.sigma, data.image, data.metadata["x"])
    names = (data.name, data.cell.parameters, data.space_group.xhm(), data.labels)
    return [*names, *(a.tolist() for a in arrays)]


def write_parameters(path: Path) -> None:
    state = {"scale": torch.linspace(0, 1, 50), "names": ["a", "b"], "epoch": 3}
    save_torch(path, {"state": state})


def read_parameters(path: Path) -> list[object]:
    state = load_torch(path, "start anew")["state"]
    return [state["scale"].tolist(), state["names"], state["epoch"]]
