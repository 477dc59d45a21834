"""Comparison with DIALS and the truth, against independent scorers and known numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import gemmi
import numpy as np
import pytest
import torch
from helpers import spot_metadata

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import DialsFlag, ReflectionTable, write_reflections
from braggflux.integrator.io.intensity_file import write_intensities
from braggflux.integrator.types import Flag, IntensityTable
from braggflux.merge.io.mtz import read_merged_mtz, write_merged_mtz
from braggflux.merge.output.merged_table import DIFFERENCE
from braggflux.pipelines.compare.counts import PIXELS_PER_FRAME, neighbour_distance
from braggflux.pipelines.compare.run import BOTH, OURS, compare, known_reference, show
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.maps.anomalous_peaks import SitePeak
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.matching import match_observations
from braggflux.pipelines.workspace.records.readers import read_rows
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory


@pytest.fixture
def run(tmp_path):
    yield RunDirectory.create(RunConfig(out=tmp_path / "run"))
    log.detach_files()


def observations(n: int, seed: int = 0) -> ReflectionTable:
    rng = np.random.default_rng(seed)
    photons = 10 ** rng.uniform(0, 4, n)
    variance = photons + 5.0
    return ReflectionTable(
        {
            "miller_index": rng.integers(-9, 10, (n, 3)).astype(np.int32),
            "id": np.zeros(n, np.int32),
            "flags": np.full(n, DialsFlag.INTEGRATED, np.uint64),
            "xyzcal.px": rng.uniform(0, 500, (n, 3)),
            "intensity.prf.value": photons,
            "intensity.prf.variance": variance,
        }
    )


def value(rows, comparison, name, metric, subject):
    found = [
        r
        for r in rows
        if (r["comparison"], r["bin"], r["metric"], r["subject"])
        == (comparison, name, metric, subject)
    ]
    assert len(found) == 1, found
    return found[0]["value"]


def test_matching_agrees_with_brute_force():
    rng = np.random.default_rng(1)
    hkl_a, hkl_b = rng.integers(-2, 3, (300, 3)), rng.integers(-2, 3, (250, 3))
    xyz_a, xyz_b = rng.uniform(0, 30, (300, 3)), rng.uniform(0, 30, (250, 3))
    rows_a, rows_b = match_observations(hkl_a, xyz_a, hkl_b, xyz_b)

    nearest: dict[int, tuple[float, int]] = {}
    for i in range(300):
        same = np.flatnonzero((hkl_b == hkl_a[i]).all(axis=1))
        if len(same) == 0:
            continue
        distance = np.linalg.norm(xyz_b[same] - xyz_a[i], axis=1)
        j, best = same[distance.argmin()], distance.min()
        if best < 5.0 and best < nearest.get(j, (np.inf, -1))[0]:
            nearest[j] = (best, i)
    expected = {(i, j) for j, (_, i) in nearest.items()}
    assert set(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == expected
    assert len(expected) > 10


def test_matching_keeps_sweeps_apart():
    hkl, xyz = np.array([[1, 2, 3]]), np.array([[5.0, 5.0, 5.0]])
    sweeps = (np.array([0]), np.array([1]))
    assert len(match_observations(hkl, xyz, hkl, xyz)[0]) == 1
    assert len(match_observations(hkl, xyz, hkl, xyz, sweeps=sweeps)[0]) == 0
    assert len(match_observations(hkl[:0], xyz[:0], hkl, xyz)[0]) == 0


def test_observations_in_another_order_and_on_another_scale(run, tmp_path):
    dials = observations(3000)
    order = np.random.default_rng(2).permutation(3000)[:2500]
    ours = dials.select(order)
    ours.columns["intensity.prf.value"] = 1.1 * ours["intensity.prf.value"]
    ours.columns["intensity.prf.variance"] = 0.25 * ours["intensity.prf.variance"]
    ours.columns["xyzcal.px"] = ours["xyzcal.px"] + 0.3
    ours.columns["flags"][:100] = DialsFlag.PREDICTED  # not integrated: not compared
    dials.columns["partiality"] = np.ones(3000)
    cut = order[200:205]  # at the end of the scan, where profile fitting may give anything
    dials.columns["partiality"][cut] = 0.003
    dials.columns["intensity.prf.value"][cut] *= -100.0
    dials.columns["intensity.prf.variance"][cut] *= 1e-9
    write_reflections(tmp_path / "dials.refl", dials)
    write_reflections(run.integrated_refl, ours)
    rows = compare(run, integrated=tmp_path / "dials.refl")
    title = "observations by I/sigma of DIALS"
    for strength in ("<= 1", "1-3", "all > 3"):
        assert value(rows, title, strength, "cc", BOTH) == pytest.approx(1.0), strength
    assert value(rows, title, "10-30", "median ratio", BOTH) == pytest.approx(1.1)
    assert value(rows, title, "10-30", "sigma ratio", BOTH) == pytest.approx(0.5)
    alone = "observations in one table only"
    assert value(rows, alone, "all", "count", OURS) == 0
    assert value(rows, alone, "all", "count", REFERENCE) == 600


def test_sweeps_pair_by_their_identifiers(run, tmp_path):
    """DIALS may list them in another order; a sweep that the run lacks pairs with nothing."""
    table = observations(3000)
    table.columns["id"] = (np.arange(3000) % 3).astype(np.int32)
    ours = table.select(table["id"] < 2)
    ours.identifiers.update({0: "a", 1: "b"})
    dials = ReflectionTable(dict(table.columns), {2: "a", 0: "b", 1: "c"})
    dials.columns["id"] = (table["id"] + 2) % 3  # a, b, c are 2, 0, 1 now
    write_reflections(run.integrated_refl, ours)
    write_reflections(tmp_path / "dials.refl", dials)
    rows = compare(run, integrated=tmp_path / "dials.refl")
    title = "observations by I/sigma of DIALS"
    assert value(rows, title, "all > 3", "cc", BOTH) == pytest.approx(1.0)
    alone = "observations in one table only"
    assert value(rows, alone, "all", "count", OURS) == 0
    assert value(rows, alone, "all", "count", REFERENCE) == 1000


def test_errors_against_true_photons(run, tmp_path):
    rng = np.random.default_rng(3)
    table = observations(20000)
    photons = table["intensity.prf.value"].copy()
    table.columns["intensity.prf.value"] = photons + rng.normal(0, np.sqrt(photons + 5.0))
    write_reflections(run.integrated_refl, table)
    truth = tmp_path / "true.npz"
    np.savez(truth, miller_index=table["miller_index"], xyz_px=table["xyzcal.px"], photons=photons)
    rows = compare(run, true_counts=truth)
    title = "observations against true photons"
    for low, high in ((5, 20), (100, 500)):
        name, inside = f"{low}-{high} photons", (photons >= low) & (photons < high)
        n = inside.sum()
        expected = np.sqrt(np.mean(photons[inside] + 5.0))
        # Standard errors: of an rms 1/sqrt(2 n), of a median absolute deviation 1.17/sqrt(n).
        rms = value(rows, title, name, "rms error", OURS)
        assert abs(rms / expected - 1) < 5 / np.sqrt(2 * n)
        assert abs(value(rows, title, name, "spread of z", OURS) - 1) < 5 * 1.17 / np.sqrt(n)


def test_errors_by_neighbour_place_and_flag_beside_the_bound(run, tmp_path):
    """Noise of the claimed size is one bound everywhere; spots cut by a gap are twice as wrong."""
    rng = np.random.default_rng(5)
    n = 12_000
    table = observations(n)
    photons = table["intensity.prf.value"].copy()
    beta, t = rng.uniform(2, 20, n), rng.uniform(0.6, 1.0, n)
    flags = rng.choice([0, Flag.OVERLAPPED, Flag.MASKED_CORE], n)
    bound = np.sqrt((photons + beta) / t)
    error = bound * rng.normal(size=n) * np.where(flags == Flag.MASKED_CORE, 2.0, 1.0)
    table.columns["intensity.prf.value"] = photons + error
    table.columns["intensity.prf.variance"] = bound**2
    table.columns["d"] = rng.uniform(1.9, 8.0, n)
    table.columns["flags"][:500] = DialsFlag.PREDICTED
    write_reflections(run.integrated_refl, table)
    dials = table.select(np.arange(n) % 10 > 0)
    dials.columns["flags"] = np.full(len(dials), DialsFlag.INTEGRATED, np.uint64)
    for name in ("value", "variance"):
        dials.columns[f"intensity.sum.{name}"] = dials[f"intensity.prf.{name}"]
    write_reflections(tmp_path / "dials.refl", dials)
    likelihood = ShiftedPoisson(*(torch.tensor(a) for a in (photons, beta, t)))
    counted = IntensityTable(
        spot_metadata(n, rng), likelihood, torch.ones(n), torch.as_tensor(flags)
    )
    write_intensities(run.intensities, counted)
    truth = tmp_path / "true.npz"
    np.savez(truth, miller_index=table["miller_index"], xyz_px=table["xyzcal.px"], photons=photons)
    rows = compare(run, integrated=tmp_path / "dials.refl", true_counts=truth)

    whole = value(rows, "error by flag", "whole", "rms error / bound", OURS)
    assert whole == pytest.approx(1.0, abs=0.05)
    core = "gap or bad pixel in the core"
    for metric, expected in (("rms error / bound", 2.0), ("spread of z", 2.0)):
        assert value(rows, "error by flag", core, metric, OURS) == pytest.approx(expected, abs=0.1)
    place = "error by place on the detector: resolution [A]"
    assert value(rows, place, "> 5", "rms error / bound", "DIALS summed") == pytest.approx(
        1.0, abs=0.05
    )
    uncut = "observations against true photons, not cut by an edge or gap"
    found, limit = (
        value(rows, uncut, "100-500 photons", "rms error", subject) for subject in (OURS, "bound")
    )
    assert found == pytest.approx(limit, rel=0.06)
    kept = "observations kept"
    assert value(rows, kept, "all", "count", OURS) == n - 500
    assert value(rows, kept, "all", "count", REFERENCE) == len(dials)
    assert value(rows, kept, "ours alone", "count", OURS) == n / 10 - 50
    assert value(rows, kept, "ours alone, whole", "count", OURS) > 100
    show(rows)

    # without the table there is no class of flags, instead of an empty one, and no bound
    write_intensities(run.intensities, counted[1:])
    reasons = ["intensities.h5 has 11999 rows, integrated.refl 12000", "run` with --resume"]
    for reason in reasons:
        rows = compare(run, integrated=tmp_path / "dials.refl", true_counts=truth)
        assert value(rows, kept, "ours alone", "count", OURS) == n / 10 - 50
        assert not any("whole" in row["bin"] or "flag" in row["comparison"] for row in rows)
        (missing,) = [row for row in rows if row["subject"] == "bound"]
        assert missing["value"] is None
        assert reason in missing["reason"]
        run.intensities.unlink(missing_ok=True)


def test_distance_to_the_nearest_spot():
    rng = np.random.default_rng(0)
    xyz = rng.uniform(0, 40, (200, 3))
    difference = (xyz[:, None] - xyz[None]) * (1, 1, PIXELS_PER_FRAME)
    distance = np.linalg.norm(difference, axis=2) + 1e9 * np.eye(200)
    np.testing.assert_allclose(neighbour_distance(xyz), distance.min(1))


@pytest.mark.realdata
def test_bijvoet_differences_agree_with_the_independent_scorer(run, shared, tmp_path):
    data = shared / "data" / "hewl_nai"
    shutil.copyfile(data / "dials_tuned_merged.mtz", run.merged)
    rows = compare(run, merged=data / "dials_merged.mtz", truth=data / "truth.mtz")
    scorer = subprocess.run(
        [
            sys.executable,
            shared / "tools" / "bijvoet_truth.py",
            data / "truth.mtz",
            run.merged,
            data / "dials_merged.mtz",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    scores = json.loads(scorer.stdout)
    title = "merged against the truth by resolution [A]"
    for subject, path in ((OURS, run.merged), (REFERENCE, data / "dials_merged.mtz")):
        for shell in scores[str(path)]:
            name = "> 5" if shell["shell"] == "60-5" else shell["shell"]
            for metric, key, digits in (
                ("cc Bijvoet", "cc_bijvoet", 1e-4),
                ("R F", "r_mean", 1e-4),
                ("rms error Bijvoet", "rms_error", 1e-3),
            ):
                expected = pytest.approx(shell[key], abs=digits)
                assert value(rows, title, name, metric, subject) == expected
    # Published with the data: DIALS .782 in the first shell, .259 in the last.
    assert value(rows, title, "> 5", "cc Bijvoet", REFERENCE) == pytest.approx(0.782, abs=1e-3)
    assert value(rows, title, "2.2-2", "cc Bijvoet", REFERENCE) == pytest.approx(0.259, abs=1e-3)
    assert value(rows, "merged by resolution [A]", "all", "cc I", BOTH) > 0.999


@pytest.mark.realdata
def test_coupled_differences_are_scored_beside_the_own(run, shared):
    data = shared / "data" / "hewl_nai"
    merged = read_merged_mtz(data / "dials_merged.mtz")
    own = merged.table.f_plus - merged.table.f_minus
    table = replace(merged.table, difference=own / 2, sigma_difference=abs(own))
    crystal = merged.cell, merged.space_group, merged.wavelength
    write_merged_mtz(run.merged, table, *crystal, history=DIFFERENCE)
    rows = compare(run, merged=data / "dials_merged.mtz", truth=data / "truth.mtz")
    title = "merged against the truth by resolution [A]"
    for shell in ("> 5", "2.2-2", "all"):
        cc = value(rows, title, shell, "cc Bijvoet", OURS)
        assert value(rows, title, shell, "cc DANO", OURS) == pytest.approx(cc, abs=1e-6)
        error = value(rows, title, shell, "rms error Bijvoet", OURS)
        assert value(rows, title, shell, "rms error DANO", OURS) < error
    assert not any(r["metric"] == "cc DANO" and r["subject"] == REFERENCE for r in rows)


@pytest.mark.realdata
def test_screw_axes_do_not_hinder_the_comparison(run, shared):
    """DIALS' full data of L-cysteine are in P222, ours in P212121."""
    mtz = gemmi.read_mtz_file(str(shared / "data" / "l_cysteine" / "dials_full_merged.mtz"))
    mtz.spacegroup = gemmi.SpaceGroup("P 21 21 21")
    mtz.write_to_file(str(run.merged))
    rows = compare(run, merged=shared / "data" / "l_cysteine" / "dials_full_merged.mtz")
    assert value(rows, "merged by resolution [A]", "all", "cc I", BOTH) == pytest.approx(1.0)


@pytest.mark.realdata
def test_files_of_another_crystal_have_a_reason(run, shared):
    shutil.copyfile(shared / "data" / "hewl_nai" / "dials_merged.mtz", run.merged)
    rows = compare(run, merged=shared / "data" / "l_cysteine" / "dials_full_merged.mtz")
    reasons = [r["reason"] for r in rows if r["comparison"] == "merged by resolution [A]"]
    assert len(reasons) == 1
    assert reasons[0].startswith("space groups differ")


def test_what_is_missing_has_a_row_with_the_reason(run, capsys):
    run.note("reference", "dials.scale failed: Sorry: too few reflections")
    run.write_peaks(1, [SitePeak("A", "204", "IOD", "I", 8.5)])
    write_reflections(run.integrated_refl, observations(50))
    rows = compare(run)
    by_title = {r["comparison"]: r for r in rows if r["value"] is None}
    assert "too few reflections" in by_title["observations by I/sigma of DIALS"]["reason"]
    assert "merged.mtz is not there" in by_title["merged by resolution [A]"]["reason"]
    assert "too few" in by_title["anomalous peak height [sigma]"]["reason"]
    assert value(rows, "anomalous peak height [sigma]", "IOD A204 I", "height", OURS) == 8.5
    saved = read_rows(run.compare_file)
    assert [r["reason"] for r in saved] == [r["reason"] for r in rows]
    show(rows)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "observations by I/sigma of DIALS: not compared, no integrated.refl of DIALS: dials.scale "
        "failed: Sorry: too few reflections" in shown
    )
    assert "all 0" not in shown  # no table without a number


def test_what_a_run_was_compared_with_is_found_again(run, tmp_path):
    assert known_reference(run) == (None, None)
    run.dials.mkdir()
    own = run.dials / "integrated.refl", run.dials / "merged.mtz"
    for path in own:
        path.touch()
    assert known_reference(run) == own
    given = tmp_path / "given.mtz"
    given.touch()
    run = RunDirectory.create(RunConfig(out=tmp_path / "other", reference=given))
    log.detach_files()
    assert known_reference(run) == (None, given)


def test_named_files_must_exist(run, tmp_path):
    with pytest.raises(UserError, match=r"none\.mtz does not exist"):
        compare(run, merged=tmp_path / "none.mtz")


def test_true_counts_of_another_kind(run, tmp_path):
    write_reflections(run.integrated_refl, observations(50))
    np.savez(tmp_path / "x.npz", photons=np.zeros(3))
    with pytest.raises(UserError, match="lacks the arrays miller_index, xyz_px"):
        compare(run, true_counts=tmp_path / "x.npz")
