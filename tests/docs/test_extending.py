"""The examples of `docs/extending.md`, taken from the page: each is found and used."""

from __future__ import annotations

import ast
import copy
import importlib
import re
from dataclasses import replace
from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch
from simulated_intensities import simulated
from simulated_priors import CELL, SPACE_GROUP, crystal, observe, own_rows

import braggflux
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.training import fit, start
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.statistics import write_statistics_csv
from braggflux.merge.problem import build_problem
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.merging.settings import settled
from braggflux.pipelines.report.html import write_report
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"
CONFIG = MergeConfig(physical_scale=False, network_width=0, epochs=20, batch_size=None)
SECTIONS = {
    "A likelihood": "LIKELIHOODS",
    "A term of the scale": "TERMS",
    "A prior of amplitudes": "PRIORS",
    "A reflection format": "FORMATS",
    "A figure of the report": "FIGURES",
}


def examples() -> dict[str, list[str]]:
    """Code of each section: a file, then the line that names it."""
    _, *parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    code = {
        title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return {title: blocks for title, blocks in code.items() if blocks}


@pytest.fixture
def added(monkeypatch):
    """Function that runs a section's file, and its line at the end of the file with the table."""

    def add(section: str):
        file, line = examples()[section]
        path = re.match(r"# a line in (\S+)\.py\n", line).group(1)
        registry = importlib.import_module("braggflux." + path.replace("/", "."))
        table = SECTIONS[section]
        monkeypatch.setattr(registry, table, copy.copy(getattr(registry, table)))
        names = {"__name__": "example"}
        exec(compile(file, file.splitlines()[0], "exec", dont_inherit=True), names)
        for name, value in names.items():
            if getattr(value, "__module__", "") == "example":  # what the registry would import
                monkeypatch.setattr(registry, name, value, raising=False)
        exec(compile(line, path, "exec", dont_inherit=True), vars(registry))
        return names

    return add


def fitted(data, config):
    problem = build_problem([data], config)
    torch.manual_seed(0)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    fit(merger, problem.table, config)
    return problem, merger


def test_each_part_is_one_file_and_one_line():
    assert examples().keys() == SECTIONS.keys()
    for file, line in examples().values():
        new = ROOT / file.splitlines()[0].removeprefix("# ")
        assert not new.exists(), "the example is a part of the program: take another"
        assert new.parent.is_dir()
        assert len(ast.parse(line).body) == 1


def test_likelihood(added):
    """Among outliers its amplitudes are nearer to the truth than those of a Normal."""
    added("A likelihood")
    rng = np.random.default_rng(3)
    data, f, asu = simulated(rng)
    wrong = rng.random(len(data)) < 0.03
    data.intensity[wrong] += 5000.0
    error = {}
    for name in ("laplace", "normal"):
        config = replace(CONFIG, likelihood=name, error_model=False)
        assert settled(config, None).likelihood == name  # as the command line asks for it
        problem, merger = fitted(data, config)
        assert type(merger.likelihood).__name__.lower() == name
        found = merger.inference().mean.detach().numpy()
        true = f[asu.refl_id(problem.unique.asus[0].miller_index)]
        seen = (merger.n_obs > 3).numpy()
        unit = np.sqrt(problem.table.unit_intensity)
        error[name] = np.abs(found[seen] * unit - true[seen]).mean() / true[seen].mean()
    assert error["laplace"] < 0.6 * error["normal"]


def test_scale_term(added):
    """It finds the slope that the data have, and the data without the column do without it."""
    added("A term of the scale")
    data, _, _ = simulated(np.random.default_rng(2))
    x = data.metadata["X"]
    data.intensity[:] *= np.exp(0.3 * (x - x.mean()) / x.std())
    _, merger = fitted(data, replace(CONFIG, epochs=30, batch_size=500))
    assert float(merger.scale.terms["tilt"].slope.detach()) == pytest.approx(0.3, abs=0.02)
    del data.metadata["X"]
    problem = build_problem([data], CONFIG)
    assert "tilt" not in Merger(problem.unique, problem.table, CONFIG).scale.terms


def test_prior(added):
    """Of a twin measured poorly, amplitudes are nearer to the truth than with Wilson's prior."""
    added("A prior of amplitudes")
    one, other = crystal(seed=1), crystal(seed=2)
    twin = replace(one, amplitude=np.sqrt((one.amplitude**2 + other.amplitude**2) / 2))
    data = observe(twin, noise=300.0, n_obs=2, flicker=0.0)
    error = {}
    for name in ("perfect-twin", "wilson"):
        config = settled(replace(CONFIG, prior=name), None)
        problem, merger = fitted(data, config)
        row = own_rows(problem, twin)
        found, true = merger.inference().mean.detach().numpy()[row], twin.amplitude
        keep = row >= 0
        scale = (found[keep] @ true[keep]) / (found[keep] @ found[keep])
        error[name] = np.sqrt(np.mean((scale * found[keep] - true[keep]) ** 2))
    assert error["perfect-twin"] < 0.97 * error["wilson"]
    with pytest.raises(UserError, match="one of auto, wilson, double-wilson, perfect-twin"):
        settled(replace(CONFIG, prior="twin"), None)


def test_reflection_format(added, tmp_path):
    names = added("A reflection format")
    path = tmp_path / "table.txt"  # known by its first line
    rows = ["1,2,3,100.5,10,0", "2,0,0,50,5,0", "-1,2,-3,98,9,1"]
    path.write_text("\n".join([names["HEADER"].decode(), *rows]) + "\n")
    (data,) = braggflux.read_table([path], space_group=SPACE_GROUP, cell=CELL)
    assert data.miller_index.tolist() == [[1, 2, 3], [2, 0, 0], [-1, 2, -3]]
    assert data.intensity.tolist() == [100.5, 50.0, 98.0]
    assert data.image.tolist() == [0, 0, 1]
    assert data.space_group == gemmi.SpaceGroup("P 21 21 21")
    with pytest.raises(UserError, match="--unit-cell and --space-group"):
        braggflux.read_table([path])


def test_figure_of_the_report(added, tmp_path):
    run = RunDirectory.create(RunConfig(out=tmp_path / "run"))
    try:
        rows = [
            {"shell": i, "d_max": 5.0 - i, "d_min": 4.0 - i, "r_pim": 0.1 * i} for i in (1, 2, 3)
        ]
        write_statistics_csv(run.statistics_file, rows)
        without = write_report(run).read_text(encoding="utf-8")
        added("A figure of the report")
        page = write_report(run).read_text(encoding="utf-8")
        assert page.count("data-panel=") == without.count("data-panel=") + 1
        assert "Precision of the merged intensities." in page
        assert "Precision of the merged intensities." not in without
        run.statistics_file.unlink()
        page = write_report(run).read_text(encoding="utf-8")
        assert page.count("Not drawn: statistics.csv is not there yet") == 2  # shells, precision
    finally:
        log.detach_files()
