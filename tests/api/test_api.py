"""The functions take plain strings and the options of the command line, and say what is wrong."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
from simulated_unmerged import observed, write_mtz

import braggflux as bf
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.pipelines.api.actions import _configured
from braggflux.pipelines.config.flags import MERGE_FLAGS, RUN_FLAGS
from braggflux.pipelines.config.run import RunConfig

FORM = {"cell": (40, 50, 60, 90, 90, 90), "space_group": "P 21 21 21"}


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asu = ReciprocalAsu(gemmi.UnitCell(*FORM["cell"]), gemmi.SpaceGroup("P212121"), 5.0, False)
    hkl, columns = observed(asu, np.random.default_rng(0), n_per_image=60)
    return write_mtz(tmp_path_factory.mktemp("api") / "unmerged.mtz", hkl, columns, **FORM)


@pytest.fixture(scope="module")
def merged(unmerged: Path) -> bf.Merge:
    out = str(unmerged.parent / "merged")
    return bf.merge(str(unmerged), out, d_min=5.5, epochs=2, seed=3, progress=False)


def test_a_merge_by_strings(merged: bf.Merge, unmerged: Path) -> None:
    [amplitudes] = merged
    assert merged.path == unmerged.parent / "merged"
    assert amplitudes.d_min >= 5.5
    assert not amplitudes.is_anomalous
    assert repr(merged) == f"<Merge {merged.path}: 1 data set, {len(amplitudes)} reflections>"
    assert repr(bf.Merge(str(merged.path))) == repr(merged)
    assert "P 21 21 21" in merged._repr_html_()
    text = "seed: 3"
    assert text in (merged.path / "config.yaml").read_text()


def test_tables(merged: bf.Merge) -> None:
    amplitudes = merged.amplitudes
    table, dataset = amplitudes.table(), amplitudes.dataset()
    assert table.index.names == ["H", "K", "L"]
    assert np.allclose(table["F"], dataset["F"].to_numpy(float), equal_nan=True)
    statistics = merged.statistics
    assert statistics["shell"].iloc[-1] == "overall"
    assert statistics["cc_half"].dtype.kind == "f"


def test_a_path_is_shown_as_text(merged: bf.Merge, tmp_path: Path) -> None:
    path = tmp_path / "<b>merged.mtz"
    path.write_bytes(merged.amplitudes.path.read_bytes())
    assert "&lt;b&gt;merged.mtz" in bf.Amplitudes(path)._repr_html_()


def test_options_are_those_of_the_command_line() -> None:
    given = {"expt": Path("a.expt"), "out": "run"}
    options = {"d_min": 2.5, "epochs": 3, "model": Path("model.pdb"), "reference": None}
    settings = {"merge.prior": "wilson"}
    config = _configured(RunConfig(), "run", RUN_FLAGS, given, settings, options)
    assert config.extraction.d_min == 2.5
    assert config.training.epochs == 3
    assert config.model == Path("model.pdb")
    assert config.merge.prior == "wilson"
    assert config.out == Path("run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "merge has no option epoch; did you mean epochs?"),
        ({"dmin": 3}, "merge has no option dmin; did you mean d_min?"),
        ({"epochs": "many"}, "epochs must be a whole number"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        _configured(MergeConfig(), "merge", MERGE_FLAGS, {}, None, options)
    assert str(caught.value).startswith(message)


def test_what_is_missing_is_named(merged: bf.Merge, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out is not given"):
        bf.merge("unmerged.mtz")
    with pytest.raises(UserError, match="out is not given"):
        bf.run("a.expt", "a.refl")
    with pytest.raises(UserError, match=r"absent_master\.h5"):
        bf.process("absent_master.h5", out=str(tmp_path / "run"), space_group="P43212")
    with pytest.raises(UserError, match="process has no option reference"):
        bf.process("absent_master.h5", out="run", reference="merged.mtz")
    with pytest.raises(UserError, match="holds no finished result of braggflux merge"):
        bf.Merge(tmp_path)
    with pytest.raises(UserError, match="is not a run directory"):
        bf.Run(tmp_path)
    with pytest.raises(UserError, match=r"absent\.mtz does not exist"):
        bf.Amplitudes("absent.mtz")


@pytest.mark.parametrize("name", ["pandas", "matplotlib", "reciprocalspaceship"])
def test_a_missing_package_is_named(
    merged: bf.Merge, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    if name == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ask = {
        "pandas": merged.amplitudes.table,
        "matplotlib": merged.plot_statistics,
        "reciprocalspaceship": merged.amplitudes.dataset,
    }[name]
    with pytest.raises(UserError, match=rf"need the package {name}.*braggflux\[notebook\]"):
        ask()


def test_logging_is_left_as_it_was(merged: bf.Merge) -> None:
    logger = logging.getLogger("braggflux")
    assert not logger.handlers
    before = logger.level
    with pytest.raises(UserError):
        bf.merge("absent.mtz", "nowhere")
    assert logger.level == before
    assert not logger.handlers
