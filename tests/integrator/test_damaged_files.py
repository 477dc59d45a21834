"""A flipped bit in a file of our own is noticed, or lies where nothing is stored."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch
from simulated_merge import simulate

from braggflux.integrator.atomic import remove_leftovers
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.intensity_file import (
    read_experiment_records,
    read_intensities,
    write_intensities,
)
from braggflux.integrator.io.shoebox_store import BackgroundField, ShoeboxStore, writing_store
from braggflux.integrator.torch_file import load_torch, save_torch
from braggflux.integrator.types import ReflectionMetadata
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.stores.unmerged_store import UnmergedStore, write_unmerged_store

N_FLIPS = 200
N = 40
BOX = (3, 5, 5)


def write_shoeboxes(path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = {"miller_index", "corner", "xyz_px", "xyz_mm", "s1", "s0_crystal", "s1_crystal"}
    columns = {
        f.name: rng.integers(0, 9, (N, 3) if f.name in vectors else N)
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


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (write_shoeboxes, read_shoeboxes),
        (write_counts, read_counts),
        (write_unmerged, read_unmerged),
        (write_parameters, read_parameters),
    ],
    ids=["shoeboxes", "intensities", "unmerged", "parameters"],
)
def test_every_flipped_bit(
    tmp_path: Path, write: Callable[[Path], None], read: Callable[[Path], list[object]]
) -> None:
    path = tmp_path / "whole"
    write(path)
    whole, content = read(path), path.read_bytes()
    rng = np.random.default_rng(1)
    n_noticed = 0
    damaged = tmp_path / "damaged"
    for bit in rng.choice(8 * len(content), N_FLIPS, replace=False).tolist():
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(flipped)
        try:
            found = read(damaged)
        except UserError:
            n_noticed += 1
        else:
            assert found == whole, f"bit {bit} changes what is read"
    assert n_noticed > 0.5 * N_FLIPS, "the rest lies between the data sets"


def test_parameters_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    save_torch(tmp_path / "x.pt", {"state": {"scale": torch.tensor([1.0, torch.nan])}})
    with pytest.raises(UserError, match=r"not finite \(state.scale\); start anew"):
        load_torch(tmp_path / "x.pt", "start anew")


@pytest.mark.parametrize("content", [[1, 2], {"x": Path()}], ids=["no mapping", "code"])
def test_whole_files_with_other_contents_are_refused(tmp_path: Path, content: object) -> None:
    save_torch(tmp_path / "x.pt", content)
    with pytest.raises(UserError, match="start anew"):
        load_torch(tmp_path / "x.pt", "start anew")


def test_only_files_of_the_program_are_leftovers(tmp_path: Path) -> None:
    theirs, ours = (".paper.markdown", ".git", "notes"), (".latest.ab12_xyz", ".a.mtz.q1w2e3r4")
    for name in (*theirs, *ours):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(theirs)
