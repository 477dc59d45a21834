"""Figures of the report against known answers, and DIALS' column against another program."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
from report_data import merged_table

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.io.dials import DialsFlag, ReflectionTable, write_reflections
from braggflux.merge.io.mtz import MergedMtz, write_merged_mtz
from braggflux.pipelines.report.figures import calibration, images, intensities
from braggflux.pipelines.report.sources import (
    OURS,
    DataSource,
    NoDataError,
    Observations,
)
from braggflux.pipelines.report.table_one import (
    assigned,
    score,
    score_merged,
    score_observations,
    table_one,
)
from braggflux.pipelines.report.verdict import BAD, FAIR, GOOD, state_of
from braggflux.pipelines.workspace.image_statistics import (
    ImageStatistics,
    read_image_statistics,
    write_image_statistics,
)
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory

CELL, GROUP, D_MIN = gemmi.UnitCell(50, 60, 70, 90, 90, 90), gemmi.SpaceGroup("P 21 21 21"), 2.99


@pytest.fixture
def crystal():
    """Unique reflections and true acentric intensities with B = 20 A^2."""
    rng = np.random.default_rng(1)
    asu = ReciprocalAsu(CELL, GROUP, D_MIN, anomalous=False)
    falloff = np.exp(-2 * 20.0 / (4 * asu.d**2)) * intensities._sum_f2(0.25 / asu.d**2)
    normal = rng.normal(size=(2, len(asu)))
    wilson = np.where(asu.is_centric, normal[0] ** 2, (normal**2).sum(0) / 2)
    return asu, 1000 * falloff * asu.epsilon * wilson


@pytest.fixture
def source(tmp_path, crystal):
    """A merge in a folder: merged.mtz alone."""
    asu, value = crystal
    write_merged_mtz(
        tmp_path / "merged.mtz",
        merged_table(asu.miller_index, value, np.full(len(asu), 0.02 * value.mean())),
        *(CELL, GROUP, 1.0),
        history=["test"],
    )
    return DataSource(RunDirectory(tmp_path), "", True)


def observed(asu, value, rng, n: int = 4, relative: float = 0.02) -> Observations:
    """Every reflection ``n`` times in equivalent settings, on images whose scales differ."""
    operations = GROUP.operations()
    hkl, truth = [], []
    for k in range(n):
        rotation = np.array(operations.sym_ops[k % 4].rot) // 24
        hkl.append(asu.miller_index @ rotation)
        truth.append(value)
    hkl, truth = np.concatenate(hkl), np.concatenate(truth)
    sigma = relative * truth + 0.01 * truth.mean()
    image = rng.integers(1, 41, len(truth))
    return Observations(
        hkl.astype(np.int64),
        truth + sigma * rng.normal(size=len(truth)),
        sigma,
        image,
        np.where(image == 17, -1.0, 0.0),
        np.zeros((len(truth), 3)),
    )


def test_wilson_b_is_that_of_the_crystal(source):
    x, y = intensities._wilson(source.merged)
    assert intensities.wilson_b(x, y) == pytest.approx(20.0, abs=2.5)


def test_l_test_tells_a_twin(crystal):
    asu, value = crystal
    hkl, sigma = asu.miller_index, 0.01 * value + 1e-6
    whole = MergedMtz(merged_table(hkl, value, sigma), CELL, GROUP, 1.0, ())
    assert intensities.l_test(whole).mean == pytest.approx(0.5, abs=0.015)
    other = np.random.default_rng(2).permutation(value)
    twin = MergedMtz(merged_table(hkl, (value + other) / 2, sigma), CELL, GROUP, 1.0, ())
    assert intensities.l_test(twin).mean < 0.43


def test_patterson_finds_a_pseudo_translation(tmp_path, crystal):
    asu, value = crystal
    assert intensities._from_origin(np.array([[0.5, 0.5, 0.0]]), CELL)[0] == pytest.approx(
        np.hypot(25, 30)
    )
    phase = np.pi * (asu.miller_index @ np.array([1.0, 0.0, 1.0]))  # copies at (1/2, 0, 1/2)
    shifted = value * (1 + 0.9 * np.cos(phase))
    for name, v in (("plain", value), ("shifted", shifted)):
        folder = tmp_path / name
        folder.mkdir()
        table = merged_table(asu.miller_index, v, np.ones(len(v)))
        write_merged_mtz(folder / "merged.mtz", table, CELL, GROUP, 1.0, history=["test"])
    peaks = [
        intensities.patterson_peak(DataSource(RunDirectory(tmp_path / name), "", True))
        for name in ("plain", "shifted")
    ]
    assert peaks[0].height < 0.3
    assert peaks[1].height > 0.7
    np.testing.assert_allclose(np.abs(peaks[1].at), [0.5, 0.0, 0.5], atol=0.04)


def test_anisotropy_is_seen_along_its_axis(tmp_path, crystal):
    asu, value = crystal
    l_part = (asu.miller_index[:, 2] / 70.0) ** 2
    table = merged_table(
        asu.miller_index, value * np.exp(-60 * l_part), np.full(len(value), 900.0)
    )
    write_merged_mtz(tmp_path / "merged.mtz", table, CELL, GROUP, 1.0, history=["test"])
    found = intensities.directional_signal(DataSource(RunDirectory(tmp_path), "", True))
    limits = {axis: limit for axis, (_, _, (limit, _)) in found.items()}
    assert limits["c*"] > limits["a*"] + 0.3


def test_dials_column_is_that_of_another_program(tmp_path, source, crystal):
    """scaled.refl through our scorer against the merging statistics of gemmi."""
    asu, value = crystal
    rng = np.random.default_rng(3)
    o = observed(asu, value, rng)
    scale = rng.uniform(0.5, 2.0, len(o.sigma))
    flags = np.full(len(scale), DialsFlag.INTEGRATED_PRF | DialsFlag.SCALED, dtype=np.uint64)
    flags[:50] |= np.uint64(DialsFlag.OUTLIER_IN_SCALING)
    columns = {
        "miller_index": o.miller_index.astype(np.int32),
        "intensity.scale.value": o.intensity * scale,
        "intensity.scale.variance": (o.sigma * scale) ** 2,
        "inverse_scale_factor": scale,
        "xyzcal.px": np.stack([scale, scale, o.image - 0.5], 1),
        "flags": flags,
    }
    folder = tmp_path / "dials"
    folder.mkdir()
    write_reflections(folder / "scaled.refl", ReflectionTable(columns, {}))
    write_merged_mtz(
        folder / "merged.mtz",
        merged_table(asu.miller_index, value, np.ones(len(value))),
        *(CELL, GROUP, 1.0),
        history=["test"],
    )
    source.reference = folder / "merged.mtz"
    source.files.statistics_file.write_text("shell,d_max,d_min\n0,9,4\noverall,9,3\n")
    found = source.reference_observations
    assert len(found.intensity) == len(scale) - 50
    np.testing.assert_array_equal(np.unique(found.image), np.arange(1, 41))

    row = score_observations(found, source)[-1]
    theirs = gemmi.Intensities()
    theirs.set_data(CELL, GROUP, found.miller_index.astype(np.int32), found.intensity, found.sigma)
    theirs.prepare_for_merging(gemmi.DataType.Mean)
    [stats] = theirs.calculate_merging_stats(None)
    assert row["r_merge"] == pytest.approx(stats.r_merge(), rel=0.02)
    assert row["r_meas"] == pytest.approx(stats.r_meas(), rel=0.02)
    assert row["r_pim"] == pytest.approx(stats.r_pim(), rel=0.02)
    assert row["n_obs"] == len(found.intensity)
    header, rows = table_one(score(source))
    assert [h.split(",")[0] for h in header[1:]] == [OURS] * 3 + [REFERENCE] * 3
    assert rows[0][1] == "9.00–3.00"


def test_merged_file_alone_has_completeness_and_signal(source, crystal):
    _, value = crystal
    row = score_merged(source.merged, source)[-1]
    assert row["completeness"] == pytest.approx(1.0)
    assert row["redundancy"] == pytest.approx(4.0)
    assert row["i_over_sigma"] == pytest.approx(np.mean(value) / (0.02 * value.mean()), rel=0.01)
    with pytest.raises(NoDataError, match="no merged MTZ of DIALS"):
        _ = source.merged_reference
    with pytest.raises(NoDataError, match="a merge writes none"):
        _ = source.observations


def test_z_of_mates_is_normal_where_sigmas_are_right(source, crystal):
    o = observed(*crystal, np.random.default_rng(4))
    z = assigned(o, source).z
    assert np.isfinite(z).mean() > 0.95
    assert calibration.robust_spread(z[np.isfinite(z)]) == pytest.approx(1.0, abs=0.03)


def test_an_image_that_stands_out_is_flagged(tmp_path, source, crystal):
    o = observed(*crystal, np.random.default_rng(5))
    inv_d2 = CELL.calculate_1_d2_array(o.miller_index.astype(np.int32))
    b = np.where(o.image == 30, 5.0, 0.0)
    log_scale = o.log_scale - b / 2 * inv_d2
    mean = assigned(o, source).mean
    found = ImageStatistics.of(o.image, log_scale, inv_d2, o.intensity, o.sigma, mean)
    assert found.image[images.flagged(found)].tolist() == [17]
    assert found.scale[16] == pytest.approx(np.exp(-1), rel=1e-6)
    assert found.b_factor[29] == pytest.approx(5.0)
    assert np.median(found.chi2) == pytest.approx(0.7, abs=0.2)  # the mean holds the observation
    path = tmp_path / "images.csv"
    write_image_statistics(path, found, found.image, ["a"] * 20 + ["b"] * 20)
    again = read_image_statistics(path, "a")
    np.testing.assert_allclose(again.scale, found.scale[:20], rtol=1e-4)
    assert read_image_statistics(tmp_path / "none.csv") is None


@pytest.mark.parametrize(
    ("value", "bounds", "state"),
    [
        *((0.6, (0.5, 0.3), GOOD), (0.4, (0.5, 0.3), FAIR), (0.2, (0.5, 0.3), BAD)),
        *((0.04, (0.05, 0.1), GOOD), (0.07, (0.05, 0.1), FAIR), (0.2, (0.05, 0.1), BAD)),
    ],
)
def test_levels(value, bounds, state):
    assert state_of(value, *bounds) == state
