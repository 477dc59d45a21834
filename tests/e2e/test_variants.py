"""Couplings, Friedel mates merged, no model, several sweeps, devices."""

from __future__ import annotations

import gemmi
import h5py
import numpy as np
import pytest
import torch

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    read_experiments,
    read_reflections,
    write_experiments,
    write_reflections,
)
from braggflux.integrator.io.intensity_file import read_intensities
from braggflux.pipelines import cli
from braggflux.pipelines.config.schema import updated
from braggflux.pipelines.dials.process import finish
from braggflux.pipelines.integration.run import run
from braggflux.pipelines.workspace.records.readers import read_rows

pytestmark = pytest.mark.slow


def amplitudes(path, label="F") -> dict[tuple[int, int, int], float]:
    mtz = gemmi.read_mtz_file(str(path))
    hkl = map(tuple, mtz.make_miller_array().tolist())
    values = zip(hkl, mtz.column_with_label(label), strict=True)
    return {h: v for h, v in values if np.isfinite(v)}


def correlation(a: dict, b: dict) -> float:
    shared = sorted(a.keys() & b.keys())
    assert len(shared) > 300
    return np.corrcoef([a[h] for h in shared], [b[h] for h in shared])[0, 1]


def true_means(path) -> dict[tuple[int, int, int], float]:
    plus, minus = amplitudes(path, "F(+)"), amplitudes(path, "F(-)")
    return {h: (plus[h] + minus[h]) / 2 for h in plus}


def test_staged_hands_the_table_on_through_a_file(
    configure, straight, tiny, tmp_path, monkeypatch
):
    read = []
    monkeypatch.setattr(
        "braggflux.pipelines.integration.run.read_intensities",
        lambda path: read.append(path) or read_intensities(path),
    )
    directory = run(configure(tmp_path / "run", training__coupling="staged", training__epochs=2))
    path = directory.intensities
    assert read == [path] * 3, "once an epoch, and for the start"
    with h5py.File(path) as file:
        assert len(file.attrs) > 0, "the file says what it is"
    table = read_intensities(path)
    written = read_reflections(directory.integrated_refl)
    # rows that were not integrated hold zeros in the one, and bits that say so in the other
    known = written.has_flag(DialsFlag.INTEGRATED_PRF)
    assert known.mean() > 0.9
    intensity = written["intensity.prf.value"][known]
    np.testing.assert_allclose(table.intensity.numpy()[known], intensity, rtol=1e-5, atol=1e-4)
    assert directory.read_config().training.coupling == "staged"
    # Seen 2026-11: 0.998, as joint
    assert correlation(amplitudes(directory.merged), true_means(tiny.truth_mtz)) > 0.99
    joint = read_reflections(straight.integrated_refl)["intensity.prf.value"][known]
    assert not np.array_equal(joint, intensity), "the merge takes part"
    assert np.corrcoef(joint, intensity)[0, 1] > 0.999
    # the table is complete: it can be merged without the run
    argv = ["merge", str(path), "--anomalous", "--out", str(tmp_path / "merged"), "--epochs", "20"]
    assert cli.main([*argv, "--set", "network_width=0", "--set", "held_out=0"]) == 0
    merged = amplitudes(tmp_path / "merged" / "merged.mtz")
    assert correlation(merged, true_means(tiny.truth_mtz)) > 0.98


def test_mates_merged_together(configure, tiny, tmp_path, capsys):
    directory = finish(
        run(configure(tmp_path / "run", merge__anomalous=False, training__epochs=1))
    )
    mtz = gemmi.read_mtz_file(str(directory.merged))
    labels = {c.label: c.type for c in mtz.columns}
    assert labels["F"] == "F"
    assert labels["N"] == "R"
    assert not any("(" in label for label in labels)
    assert correlation(amplitudes(directory.merged), true_means(tiny.truth_mtz)) > 0.99
    assert directory.read_peaks() == []
    assert "no peaks: Bijvoet mates are merged together" in capsys.readouterr().out


def test_without_a_model_there_are_no_peaks_and_the_report_says_why(configure, tmp_path, capsys):
    config = updated(configure(tmp_path / "run", training__epochs=1), {"model": None})
    directory = finish(run(config))
    assert read_rows(directory.peaks_file) == []
    header = directory.peaks_file.read_text().strip()
    assert header == "epoch,chain,seqid,residue,atom,peak_sigma,difference,peak_sigma_own"
    assert "F(+)" in gemmi.read_mtz_file(str(directory.merged)).column_labels()
    reason = "no peaks: they need the phases of a model, and none was given"
    assert reason in capsys.readouterr().out
    assert reason in directory.report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def two_sweeps(tiny, tmp_path_factory):
    """Two crystals of one form in two orientations, in one experiment list."""
    folder = tmp_path_factory.mktemp("sweeps")
    other = simulate(folder / "second", preset="tiny", seed=1)
    experiments = [*read_experiments(tiny.expt), *read_experiments(other.expt)]
    tables = [read_reflections(tiny.refl), read_reflections(other.refl)]
    for number, table in enumerate(tables):
        table.columns["id"] = np.full(len(table), number, np.int32)
    joined = {
        name: np.concatenate([t[name] for t in tables])
        for name in tables[0].columns
        if name in tables[1]
    }
    identifiers = {i: e.identifier for i, e in enumerate(experiments)}
    expt, refl = folder / "two.expt", folder / "two.refl"
    write_experiments(expt, experiments)
    write_reflections(refl, ReflectionTable(joined, identifiers))
    return expt, refl


def test_several_sweeps_merge_into_one(two_sweeps, configure, straight, tiny, tmp_path):
    expt, refl = (str(path) for path in two_sweeps)
    directory = run(configure(tmp_path / "run", expt=expt, refl=refl, training__epochs=2))
    table = read_reflections(directory.integrated_refl)
    assert set(np.unique(table["id"])) == {0, 1}
    assert len(table.identifiers) == 2
    overall = read_rows(directory.statistics_file)[-1]
    alone = read_rows(straight.statistics_file)[-1]
    assert int(overall["n_obs"]) > 1.8 * int(alone["n_obs"])
    assert float(overall["redundancy"]) > float(alone["redundancy"])
    assert float(overall["completeness"]) > 1.2 * float(alone["completeness"])
    # the sweeps share no frame but a crystal form: a scale for each, and one truth
    assert correlation(amplitudes(directory.merged), true_means(tiny.truth_mtz)) > 0.99
    batches = np.array(
        gemmi.read_mtz_file(str(directory.unmerged)).column_with_label("BATCH"), copy=True
    )
    assert len(np.unique(batches)) == 32, "frames of both sweeps, numbered apart"


def test_a_data_set_of_several_sweeps_beside_another(two_sweeps, configure, tmp_path):
    """Sweep 2, of the second data set, is number 0 of its own files."""
    third = simulate(tmp_path / "third", preset="tiny", seed=2)
    expt, refl = (str(path) for path in two_sweeps)
    more = {"more_data": [str(third.expt), str(third.refl)], "parents": "none,0"}
    directory = run(configure(tmp_path / "run", expt=expt, refl=refl, training__epochs=1, **more))
    dark, light = directory.data_sets()
    assert [dark.dataset, light.dataset] == ["two", "tiny"]
    assert set(read_reflections(dark.integrated_refl)["id"]) == {0, 1}
    table = read_reflections(light.integrated_refl)
    assert set(table["id"]) == {0}
    (given,) = read_experiments(third.expt)
    assert table.identifiers == {0: given.identifier}
    n_obs = [int(read_rows(own.statistics_file)[-1]["n_obs"]) for own in (dark, light)]
    assert n_obs[0] > 1.8 * n_obs[1]
    for own in (dark, light):
        assert correlation(amplitudes(own.merged), true_means(third.truth_mtz)) > 0.99
    batches = np.array(gemmi.read_mtz_file(str(light.unmerged)).column_with_label("BATCH"))
    assert len(np.unique(batches)) == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["run", str(tiny.expt), str(tiny.refl), "--out", str(out), "--device", "cuda"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("braggflux: error: --device cuda: torch sees no CUDA device")
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_gives_what_the_cpu_gives(configure, straight, tmp_path):
    directory = run(configure(tmp_path / "run", training__device="cuda"))
    assert correlation(amplitudes(directory.merged), amplitudes(straight.merged)) > 0.999
