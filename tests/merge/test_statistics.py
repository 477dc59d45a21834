"""Shell statistics against iotbx, and half sets against what random halves must be."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.output import statistics
from braggflux.merge.output.half_sets import (
    HalfSet,
    ScaledReflections,
    half_sets,
    mean_of_mates,
    merge_half,
    split_half_sets,
    weighted_merge,
)

CELL = gemmi.UnitCell(42.0, 42.0, 58.0, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 43 21 2")
D_MIN = 3.0
N_SHELLS = 5

IOTBX = """
import json, sys
import numpy as np
from cctbx import crystal, miller
from cctbx.array_family import flex
from iotbx.merging_statistics import dataset_statistics
z = np.load(sys.argv[1])
symmetry = crystal.symmetry(unit_cell=tuple(z["cell"]), space_group_symbol=str(z["symbol"]))
indices = flex.miller_index([tuple(map(int, h)) for h in z["hkl"]])
out = {}
for anomalous in (False, True):
    s = miller.set(symmetry, indices, anomalous_flag=True)
    a = miller.array(s, flex.double(z["i"]), flex.double(z["sigma"]))
    a.set_observation_type_xray_intensity()
    st = dataset_statistics(a, n_bins=int(z["n_bins"]), anomalous=anomalous,
        use_internal_variance=False, sigma_filtering="scala",
        assert_is_not_unique_set_under_symmetry=False)
    names = ("d_max d_min n_obs n_uniq mean_redundancy completeness anom_completeness i_mean "
        "i_over_sigma_mean r_merge r_meas r_pim cc_one_half cc_anom").split()
    out["anomalous" if anomalous else "merged"] = [
        {n: getattr(b, n) for n in names} for b in [*st.bins, st.overall]]
json.dump(out, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def simulated() -> dict:
    """Observations with a Bijvoet signal, uneven redundancy and gaps."""
    rng = np.random.default_rng(11)
    asu = ReciprocalAsu(CELL, SPACE_GROUP, D_MIN, anomalous=True)
    mean = rng.exponential(400.0, len(asu))
    mates = asu.friedel_mate
    true = 0.5 * (mean + mean[mates]) * np.exp(0.1 * rng.standard_normal(len(asu)))
    n_obs = rng.integers(0, 9, len(asu))
    refl_id = rng.permutation(np.repeat(np.arange(len(asu)), n_obs))
    sigma = np.sqrt(true[refl_id] + 25.0) * rng.uniform(0.7, 1.4, len(refl_id))
    intensity = true[refl_id] + sigma * rng.standard_normal(len(refl_id))
    operations = list(SPACE_GROUP.operations().sym_ops)
    which = rng.integers(0, len(operations), len(refl_id))
    hkl = np.array(
        [
            operations[w].apply_to_hkl(h)
            for w, h in zip(which, asu.miller_index[refl_id].tolist(), strict=True)
        ]
    )
    return {"asu": asu, "hkl": hkl, "i": intensity, "sigma": sigma, "refl_id": refl_id}


def rows_of(data: dict, **options) -> list[dict]:
    asu = data["asu"]
    observations = ScaledReflections.of(
        asu, asu.refl_id(data["hkl"]), data["i"], data["sigma"] ** 2
    )
    unique = statistics.unique_reflections(asu)
    seen = np.unique(observations.refl_id)
    shells = statistics.resolution_shells(unique.inv_d2[seen], N_SHELLS)
    possible = statistics.possible_reflections(CELL, SPACE_GROUP, asu.d.min())
    return statistics.shell_statistics(observations, unique, shells, possible=possible, **options)


@pytest.mark.dials
def test_statistics_match_iotbx(simulated, dials, tmp_path):
    np.savez(
        tmp_path / "in.npz",
        hkl=simulated["hkl"],
        i=simulated["i"],
        sigma=simulated["sigma"],
        cell=CELL.parameters,
        symbol=SPACE_GROUP.hm,
        n_bins=N_SHELLS,
    )
    environment = dict(os.environ)
    for build in Path("/usr/lib/cctbx").glob("python3*"):
        environment.setdefault("LIBTBX_BUILD", str(build))
    command = [sys.executable, "-c", IOTBX, str(tmp_path / "in.npz"), str(tmp_path / "out.json")]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    theirs = json.loads((tmp_path / "out.json").read_text())
    ours = rows_of(simulated)
    assert [r["shell"] for r in ours] == [*range(N_SHELLS), "overall"]
    same = {
        "n_obs": "n_obs",
        "n_unique": "n_uniq",
        "d_max": "d_max",
        "d_min": "d_min",
        "redundancy": "mean_redundancy",
        "completeness": "completeness",
        "mean_i": "i_mean",
        "i_over_sigma": "i_over_sigma_mean",
        "r_merge": "r_merge",
        "r_meas": "r_meas",
        "r_pim": "r_pim",
    }
    for row, merged, anomalous in zip(ours, theirs["merged"], theirs["anomalous"], strict=True):
        for mine, other in same.items():
            # cctbx widens the outermost shells by a hair
            rel = 1e-4 if mine.startswith("d_") else 1e-6
            assert row[mine] == pytest.approx(merged[other], rel=rel), (row["shell"], mine)
        assert row["anomalous_redundancy"] == pytest.approx(anomalous["mean_redundancy"])
        assert row["anomalous_completeness"] == pytest.approx(
            anomalous["anom_completeness"], rel=1e-5
        )
        # two random splits of the same data: standard error of a correlation, on both sides
        for mine, other in (("cc_half", "cc_one_half"), ("cc_anom", "cc_anom")):
            n, cc = row[f"{mine}_pairs"], merged[other]
            assert abs(row[mine] - cc) < 5 * np.sqrt(2 / n) * max(1 - cc**2, 0.02), mine


def test_weighted_merge_is_the_inverse_variance_mean():
    mean, sigma, n = weighted_merge(
        np.array([2, 0, 2]), np.array([10.0, 7.0, 16.0]), np.array([1.0, 4.0, 2.0]), 4
    )
    np.testing.assert_allclose(mean, [7.0, np.nan, 12.0, np.nan])
    np.testing.assert_allclose(sigma, [2.0, np.nan, np.sqrt(2 / 3), np.nan])
    assert n.tolist() == [1, 0, 2, 0]
    with pytest.raises(ValueError, match="negative rows"):
        weighted_merge(np.array([-1]), np.ones(1), np.ones(1), 4)


def test_halves_are_balanced_and_reproducible_and_random():
    rng = np.random.default_rng(0)
    refl_id = rng.integers(0, 300, 3000)
    sign = rng.choice([-1, 1], 3000)
    half = split_half_sets(refl_id, sign, seed=3)
    for group in (refl_id, refl_id * 2 + (sign > 0)):
        difference = np.bincount(group, weights=2 * half - 1)
        assert np.abs(difference).max() <= 1
    assert np.array_equal(half, split_half_sets(refl_id, sign, seed=3))
    assert not np.array_equal(half, split_half_sets(refl_id, sign, seed=4))
    # no preference: of reflections with an odd number of observations, either half has more
    odd = np.bincount(refl_id) % 2 == 1
    surplus = np.bincount(refl_id, weights=2 * half - 1)[odd]
    assert abs(surplus.sum()) < 5 * np.sqrt(odd.sum())
    assert np.array_equal(np.sort(np.unique(half)), [0, 1])


def test_the_split_does_not_depend_on_the_order_of_reflections():
    """Row numbers may be sparse: only equality of ids matters."""
    refl_id = np.array([5, 5, 900, 900])
    half = split_half_sets(refl_id, np.ones(4, int), seed=0)
    assert half[0] != half[1]
    assert half[2] != half[3]


def test_half_sets_share_no_observation(simulated):
    asu = simulated["asu"]
    o = ScaledReflections.of(asu, simulated["refl_id"], simulated["i"], simulated["sigma"] ** 2)
    n = int(np.sum(asu.friedel_sign > 0))
    first, second = half_sets(o, n, seed=1)
    everything = merge_half(o.usable(), n)
    # the weights of independent halves add up to that of the whole
    both = np.isfinite(first.mean) & np.isfinite(second.mean)
    assert both.sum() > 100
    weight = first.sigma[both] ** -2 + second.sigma[both] ** -2
    np.testing.assert_allclose(weight, everything.sigma[both] ** -2)
    z = (first.mean - second.mean)[both] / np.hypot(first.sigma, second.sigma)[both]
    # Friedel mates differ by 10 % here, which the sigmas do not know, so z is wider than 1
    assert 1.0 < np.std(z) < 3.0


def test_calibration_of_correct_and_of_understated_sigmas(simulated):
    """The spread of z is 1 for honest sigmas and scales with dishonest ones."""
    honest = rows_of(simulated)[-1]
    n = honest["cc_anom_pairs"]
    # median absolute deviation has 37 % efficiency: standard error 1.17 / sqrt(n)
    assert abs(honest["z_spread_anom"] - 1) < 5 * 1.17 / np.sqrt(n)
    understated = rows_of(simulated | {"sigma": simulated["sigma"] / 2})[-1]
    assert understated["z_spread_anom"] == pytest.approx(2 * honest["z_spread_anom"])


def test_r_split_of_known_noise():
    """Reflections of equal intensity 100 with 8 observations of sigma 10 each."""
    rng = np.random.default_rng(0)
    n_refl, n = 20_000, 8
    refl_id = np.repeat(np.arange(n_refl), n)
    intensity = 100 + 10 * rng.standard_normal(len(refl_id))
    unique = statistics.UniqueReflections(np.linspace(0.01, 0.1, n_refl), np.zeros(n_refl, bool))
    observations = ScaledReflections(
        refl_id, np.ones_like(refl_id), intensity, np.full(len(refl_id), 100.0)
    )
    shells = statistics.resolution_shells(unique.inv_d2, 2)
    rows = statistics.shell_statistics(observations, unique, shells)
    # halves of 4: |I1 - I2| of sigma 10 / sqrt(2) has the mean sigma sqrt(2 / pi)
    expected = 10 / 2 * np.sqrt(2) * np.sqrt(2 / np.pi) / 100 / np.sqrt(2)
    for row in rows:
        assert row["r_split"] == pytest.approx(expected, rel=0.02)
        assert row["z_spread"] == pytest.approx(1.0, abs=0.05)
    # the definition, term by term; what one half lacks does not count
    first, second = np.array([4.0, 10.0, np.nan]), np.array([6.0, 9.0, 5.0])
    assert statistics.r_split(first, second) == pytest.approx((2 + 1) / (5 + 9.5) / np.sqrt(2))
    assert statistics.r_split(first[2:], second[2:]) is None
    assert statistics.r_split(-first, second * 0) is None


def test_amplitude_halves_leave_r_split_to_the_intensities(simulated):
    rows = rows_of(simulated)
    asu = simulated["asu"]
    observations = ScaledReflections.of(
        asu, simulated["refl_id"], simulated["i"], simulated["sigma"] ** 2
    )
    halves = half_sets(observations, len(statistics.unique_reflections(asu)), seed=5)
    roots = tuple(HalfSet(*(np.sqrt(np.abs(v)) for v in vars(h).values())) for h in halves)
    given = rows_of(simulated, halves=roots)
    assert given[-1]["r_split"] == rows[-1]["r_split"]
    assert given[-1]["cc_half"] != rows[-1]["cc_half"]


def test_unusable_observations_change_nothing(simulated):
    bad = {
        "hkl": np.vstack([simulated["hkl"], [[1, 2, 3]] * 4]),
        "i": np.append(simulated["i"], [np.nan, np.inf, 1e9, 1e9]),
        "sigma": np.append(simulated["sigma"], [1.0, 1.0, 0.0, np.nan]),
        "asu": simulated["asu"],
    }
    assert rows_of(bad) == rows_of(simulated)


def test_given_halves_replace_random_ones(simulated):
    n = int(np.sum(simulated["asu"].friedel_sign > 0))
    rng = np.random.default_rng(2)
    amplitude = rng.uniform(1, 10, n)
    ones = np.ones(n)
    plus = amplitude + rng.standard_normal(n)
    half = HalfSet(amplitude, ones, plus, ones, amplitude, ones)
    opposite = HalfSet(amplitude, ones, amplitude, ones, plus, ones)
    overall = rows_of(simulated, halves=(half, opposite))[-1]
    assert overall["cc_half"] == pytest.approx(1.0)
    assert overall["cc_anom"] == pytest.approx(-1.0)
    assert overall["z_spread"] == pytest.approx(0.0)


def test_too_little_data_gives_none_with_a_reason(tmp_path):
    unique = statistics.UniqueReflections(np.array([0.01, 0.02, 0.05]), np.array([False] * 3))
    observations = ScaledReflections(
        np.array([0, 1, 1]), np.ones(3, int), np.array([1.0, 2.0, 3.0]), np.ones(3)
    )
    shells = statistics.ResolutionShells(np.array([0.005, 0.015, 0.03, 0.06]))
    rows = statistics.shell_statistics(observations, unique, shells)
    single, double, empty, _ = rows
    assert single["r_pim"] is None
    assert "r_pim: no reflection seen twice" in single["reason"]
    assert "cc_half, z_spread: 0 pairs" in single["reason"]
    assert double["r_merge"] == pytest.approx(1.0 / 5.0)
    assert double["r_pim"] == pytest.approx(1.0 / 5.0)
    assert double["r_meas"] == pytest.approx(np.sqrt(2) / 5.0)
    assert empty["n_obs"] == 0
    assert empty["redundancy"] is None
    assert "no observations" in empty["reason"]
    path = tmp_path / "statistics.csv"
    statistics.write_statistics_csv(path, rows)
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == statistics.COLUMNS
    assert read[0]["r_pim"] == ""
    assert float(read[1]["r_merge"]) == pytest.approx(0.2)
    assert read[-1]["shell"] == "overall"


def test_shells_have_equal_volume_and_hold_every_reflection():
    inv_d2 = np.linspace(0.001, 0.25, 1000)
    shells = statistics.resolution_shells(inv_d2, 7)
    volume = np.diff(shells.edges**1.5)
    np.testing.assert_allclose(volume, volume[0])
    assigned = shells.assign(inv_d2)
    assert assigned.min() == 0
    assert assigned.max() == 6
    assert np.all(np.diff(assigned) >= 0)
    assert shells.assign(np.array([0.0009, 0.2501])).tolist() == [-1, -1]
    assert shells.d_range(6)[1] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="n_shells"):
        statistics.resolution_shells(inv_d2, 0)


def test_mean_of_mates_uses_whichever_is_there():
    nan = np.nan
    mean, sigma = mean_of_mates(
        np.array([1.0, nan, 1.0, nan]),
        np.array([1.0, nan, 2.0, nan]),
        np.array([4.0, 5.0, nan, nan]),
        np.array([0.5, 2.0, nan, nan]),
    )
    np.testing.assert_allclose(mean, [17 / 5, 5.0, 1.0, nan])
    np.testing.assert_allclose(sigma, [np.sqrt(0.2), 2.0, 2.0, nan])


def test_unwritable_csv_is_a_user_error_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        statistics.write_statistics_csv(tmp_path / "missing" / "statistics.csv", [])
    assert list(tmp_path.iterdir()) == []


def test_average_over_repeats_changes_what_the_split_changes(simulated):
    repeats = [rows_of(simulated, seed=seed) for seed in (0, 1, 2)]
    repeats[1][0] |= {"cc_anom": None, "z_spread_anom": None}
    mean = statistics.average_over_repeats(repeats)
    for k, row in enumerate(mean):
        for name in statistics.COLUMNS:
            if name not in statistics.OF_HALF_SETS:
                assert row[name] == repeats[0][k][name], name
        assert row["cc_half"] == pytest.approx(np.mean([r[k]["cc_half"] for r in repeats]))
    assert len({r[-1]["cc_half"] for r in repeats}) == 3
    others = [repeats[0][0]["cc_anom"], repeats[2][0]["cc_anom"]]
    assert mean[0]["cc_anom"] == pytest.approx(np.mean(others))
    for r in repeats:
        r[1]["cc_half"] = None
    assert statistics.average_over_repeats(repeats)[1]["cc_half"] is None


def test_rounding_does_not_put_the_outermost_reflections_outside():
    """1/d^2 is computed in two ways, of the measured and of the possible ones."""
    inv_d2 = np.linspace(0.01, 0.1110868765808712, 50)
    shells = statistics.resolution_shells(inv_d2, 5)
    for hair in (-1e-16, 0.0, 1e-16):
        shell = shells.assign(inv_d2 * (1 + hair) + 2 * hair)
        assert (shell[0], shell[-1]) == (0, 4)
    assert shells.assign(inv_d2 * (1 + 1e-6))[-1] == -1
    assert shells.assign(inv_d2 * (1 - 1e-6))[0] == -1
