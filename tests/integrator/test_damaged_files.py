"""A flipped bit in a file of our own is noticed, or lies where nothing is stored."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_files import (
    read_counts,
    read_parameters,
    read_shoeboxes,
    read_unmerged,
    write_counts,
    write_parameters,
    write_shoeboxes,
    write_unmerged,
)

from braggflux.integrator.atomic import remove_leftovers
from braggflux.integrator.errors import UserError
from braggflux.integrator.torch_file import load_torch, save_torch

N_FLIPS = 200


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
    remove_leftovers(tmp_path, "a.h5")
    assert len(list(tmp_path.iterdir())) == 5
    remove_leftovers(tmp_path, "a.mtz")
    assert not (tmp_path / ours[1]).exists()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(theirs)
