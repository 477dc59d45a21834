"""`braggflux merge` on the table of photon-count likelihoods that a staged run writes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_merge import CELL, SPACE_GROUP, simulate
from simulated_unmerged import FAST

from braggflux.integrator.crystal.geometry import (
    Beam,
    Crystal,
    Experiment,
    Goniometer,
    Panel,
    Scan,
)
from braggflux.integrator.io.dials import write_experiments
from braggflux.integrator.io.intensity_file import (
    read_experiment_records,
    write_intensities,
)
from braggflux.integrator.types import Flag
from braggflux.merge.io.formats.photon_table import read_photon_table
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.io.observations import PHOTON_VARIANCE
from braggflux.merge.io.read import format_of
from braggflux.merge.io.sweep_columns import BEAMS, FRAME, FRAME_WIDTH, ROCKING, ZETA
from braggflux.pipelines import cli

RECORD = {
    "unit_cell": list(CELL.parameters),
    "space_group": SPACE_GROUP.xhm(),
    "image_range": [1, 360],
    "oscillation_deg": [10.0, 1.0],
}


@pytest.fixture(scope="module")
def experiment():
    return simulate(d_min=4.0, photons=200.0, seed=3)


@pytest.fixture(scope="module")
def table(experiment, tmp_path_factory):
    path = tmp_path_factory.mktemp("staged") / "intensities.h5"
    write_intensities(path, experiment.table, [RECORD])
    return path


def run(*argv):
    return cli.main(["merge", *(str(a) for a in argv)])


def test_what_is_read(experiment, table):
    assert format_of(table).name == "photon counts"
    assert read_experiment_records(table) == [RECORD]
    (data,) = read_photon_table(table)
    n = len(experiment.table)
    assert len(data) == n
    order = np.argsort(np.floor(experiment.table.metadata.xyz_px[:, 2].numpy()), kind="stable")
    table = experiment.table[torch.as_tensor(order)]
    given, likelihood = table.metadata, table.likelihood
    np.testing.assert_array_equal(data.miller_index, given.miller_index)
    np.testing.assert_allclose(data.intensity, table.intensity, rtol=1e-5, atol=1e-4)
    beta, t = likelihood.effective_background.double(), likelihood.exposure.double()
    np.testing.assert_allclose(data.sigma, (beta / t).sqrt())
    np.testing.assert_allclose(data.metadata[PHOTON_VARIANCE], 1 / t)
    np.testing.assert_allclose(data.metadata["ROT"], 10.0 + given.xyz_px[:, 2].double())
    np.testing.assert_array_equal(
        data.metadata["BATCH"], 1 + np.floor(given.xyz_px[:, 2].numpy()).clip(0, 359)
    )
    places = data.metadata
    np.testing.assert_allclose(places[FRAME], given.xyz_px[:, 2].double())
    np.testing.assert_allclose(places[FRAME_WIDTH], 1.0)
    np.testing.assert_allclose(places[ZETA], given.zeta)
    np.testing.assert_allclose(places[ROCKING], 0.4, rtol=1e-6)  # frames of 1 degree
    beams = np.stack([places[name] for name in BEAMS], 1)
    np.testing.assert_allclose(beams, torch.cat([given.s0_crystal, given.s1_crystal], 1))
    assert not data.has_lp_applied
    np.testing.assert_allclose(data.cell.parameters, CELL.parameters, rtol=1e-9)
    assert data.space_group.xhm() == SPACE_GROUP.xhm()


def test_sweeps_have_images_of_their_own(experiment, tmp_path):
    half = torch.arange(len(experiment.table)) % 2
    path = tmp_path / "two.h5"
    flags = torch.where(torch.arange(len(half)) < 10, Flag.REJECTED, 0)
    write_intensities(path, replace(experiment.with_sweeps(half), flags=flags), [RECORD, RECORD])
    (data,) = read_photon_table(path)
    assert len(data) == len(half) - 10
    batch = data.metadata["BATCH"]
    assert batch.min() == 1
    assert 1001 <= batch[batch > 360].min() <= batch.max() <= 1360


@pytest.mark.slow
def test_merged_amplitudes_are_the_true_ones(experiment, table, tmp_path):
    more = ("--anomalous", "--epochs", "40", "--set", "network_width=0")
    cc = {}
    for name, extra in (("counts", ()), ("observed", ("--set", "photon_counts=false"))):
        out = tmp_path / name
        assert run(table, "--out", out, *more, *extra) == 0
        merged = read_merged_mtz(out / "merged.mtz").table
        true = experiment.truth.amplitude[experiment.asu.refl_id(merged.miller_index)]
        seen = np.isfinite(merged.f_plus)
        cc[name] = np.corrcoef(merged.f_plus[seen], true[seen])[0, 1]
    assert cc["counts"] > 0.98
    assert cc["counts"] >= cc["observed"] - 1e-3


def expt_file(path, space_group=SPACE_GROUP):
    x, y, z = np.eye(3)
    crystal = Crystal(np.array(CELL.frac.mat.tolist()).T, space_group)
    model = Experiment(
        beam=Beam(np.array([0.0, 0.0, 1.0]), 1.0),
        panels=(Panel("p", x, y, -100.0 * z - 10.0 * (x + y), (0.1, 0.1), (200, 200)),),
        goniometer=Goniometer(np.array([1.0, 0.0, 0.0])),
        scan=Scan((1, 360), (10.0, 1.0)),
        crystal=crystal,
        identifier="a",
    )
    write_experiments(path, [model])
    return path


@pytest.mark.slow
def test_an_expt_beside_a_table_without_cell(experiment, table, tmp_path):
    bare = tmp_path / "intensities.h5"
    write_intensities(bare, experiment.table)
    expt = expt_file(tmp_path / "refined.expt")
    (given,), (own,) = read_photon_table(bare, expt), read_photon_table(table)
    np.testing.assert_allclose(given.metadata["ROT"], own.metadata["ROT"])
    np.testing.assert_allclose(given.cell.parameters, own.cell.parameters, rtol=1e-6)
    assert run(bare, expt, "--out", tmp_path / "one", *FAST) == 0
    assert run(table, expt, "--out", tmp_path / "two", *FAST) == 0
    one, two = (read_merged_mtz(tmp_path / n / "merged.mtz").table for n in ("one", "two"))
    np.testing.assert_allclose(one.f, two.f, rtol=1e-6)


def bad(kind, experiment, tmp_path):
    path = tmp_path / "bad.h5"
    if kind == "no cell":
        write_intensities(path, experiment.table)
    elif kind == "too few sweeps":
        number = experiment.table.metadata.experiment + 1
        write_intensities(path, experiment.with_sweeps(number), [RECORD])
    elif kind == "all rejected":
        flags = torch.full_like(experiment.table.flags, Flag.REJECTED)
        write_intensities(path, replace(experiment.table, flags=flags), [RECORD])
    elif kind == "empty":
        write_intensities(path, experiment.table[:0], [RECORD])
    elif kind == "two groups":
        write_intensities(path, experiment.table, [RECORD, RECORD | {"space_group": "P 2 2 2"}])
    elif kind == "truncated":
        write_intensities(path, experiment.table, [RECORD])
        path.write_bytes(path.read_bytes()[:4000])
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no cell", "does not hold its unit cell"),
        ("too few sweeps", "sweep 1, but only 1 are described"),
        ("all rejected", "no observation that could be integrated"),
        ("empty", "no observation that could be integrated"),
        ("two groups", "space groups"),
        ("truncated", "bad.h5"),
    ],
)
def test_an_unusable_table_is_one_line(kind, said, experiment, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(bad(kind, experiment, tmp_path), "--out", out, *FAST) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("braggflux: error: ")
    assert said in error
    assert not out.exists()
