"""What ``import braggflux`` offers: names that work, none of them before it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
from simulated_unmerged import observed, write_mtz

import braggflux
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.io.stores.unmerged_store import UnmergedStore, write_unmerged_store
from braggflux.pipelines.api.actions import run
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.inputs.inputs import MergeInputs

FORM = {"cell": (40, 50, 60, 90, 90, 90), "space_group": "P 21 21 21"}


def test_names_are_those_of_the_packages() -> None:
    assert braggflux.run is run
    assert braggflux.RunConfig is RunConfig
    assert braggflux.MergeInputs is MergeInputs
    assert set(dir(braggflux)) == set(braggflux.__all__)
    assert all(callable(getattr(braggflux, name)) for name in braggflux.__all__)
    with pytest.raises(AttributeError, match="'braggflux' has no attribute 'mergee'"):
        braggflux.mergee  # noqa: B018


def test_importing_costs_nothing() -> None:
    program = "import sys, braggflux; print(sorted({'torch', 'numpy', 'gemmi'} & {*sys.modules}))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asu = ReciprocalAsu(gemmi.UnitCell(*FORM["cell"]), gemmi.SpaceGroup("P212121"), 5.0, False)
    hkl, columns = observed(asu, np.random.default_rng(0), n_per_image=60)
    return write_mtz(tmp_path_factory.mktemp("api") / "unmerged.mtz", hkl, columns, **FORM)


def test_merge_is_a_function_and_a_package(unmerged: Path, tmp_path: Path) -> None:
    """An import of a module of the package leaves the function where it is."""
    import braggflux.merge.config

    config = braggflux.MergeConfig(epochs=2, network_width=8, d_min=5.5)
    assert isinstance(config, braggflux.merge.config.MergeConfig)
    [path] = braggflux.merge(MergeInputs((unmerged,), tmp_path / "merged"), config)
    assert read_merged_mtz(path).table.f.shape[0] > 100


def test_open_store_knows_what_a_file_is(unmerged: Path, tmp_path: Path) -> None:
    [data] = braggflux.read_table([unmerged])
    path = tmp_path / "unmerged.h5"
    write_unmerged_store(path, [data])
    with braggflux.open_store(path) as store:
        assert isinstance(store, UnmergedStore)
        assert len(store) == len(data)
    with pytest.raises(UserError, match=r"is an MTZ file; a store of shoeboxes .* is needed here"):
        braggflux.open_store(unmerged)
    with pytest.raises(UserError, match=r"absent.h5 does not exist; give a store of"):
        braggflux.open_store(tmp_path / "absent.h5")
