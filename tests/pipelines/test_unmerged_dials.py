"""Observations from DIALS tables against ``dials.export``, dxtbx, and published stills."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    read_experiments,
    read_reflections,
    write_reflections,
)
from braggflux.merge.io.formats.dials import read_dials
from braggflux.merge.io.formats.mtz_observations import read_mtz
from braggflux.merge.io.observations import combine_friedel
from braggflux.merge.io.read import read_table
from braggflux.merge.io.sweep_columns import BEAMS, FRAME, FRAME_WIDTH, SWEEP

DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")


@pytest.fixture(scope="module")
def sweep(shared, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Tables as of dials.integrate and dials.scale, from real geometry and random intensities."""
    folder = tmp_path_factory.mktemp("sweep")
    source = shared / "data" / "hewl_nai"
    shutil.copy(source / "refined.expt", folder / "integrated.expt")
    shutil.copy(source / "refined.expt", folder / "scaled.expt")
    table = read_reflections(source / "refined.refl")
    rng = np.random.default_rng(2)
    n = len(table)
    strength = rng.exponential(200.0, n)
    flags = np.full(n, DialsFlag.PREDICTED, dtype=np.uint64)
    flags[rng.random(n) < 0.9] |= np.uint64(DialsFlag.INTEGRATED_SUM)
    flags[rng.random(n) < 0.9] |= np.uint64(DialsFlag.INTEGRATED_PRF)
    columns = dict(table.columns)
    columns |= {
        "flags": flags,
        "d": np.full(n, 2.5),
        "lp": rng.uniform(0.1, 0.9, n),
        "qe": np.where(rng.random(n) < 0.02, 0.0, rng.uniform(0.8, 1.0, n)),
        "zeta": rng.uniform(0.1, 1.0, n),
        "partiality": np.where(rng.random(n) < 0.1, rng.random(n), 1.0),
        "partial_id": np.arange(n, dtype=np.uint64),
        "intensity.sum.value": strength * 1.1,
        "intensity.sum.variance": strength + 30.0,
        "intensity.prf.value": strength,
        "intensity.prf.variance": np.where(rng.random(n) < 0.02, -1.0, strength + 9.0),
        "background.mean": rng.uniform(0, 2, n),
    }
    write_reflections(
        folder / "integrated.refl", ReflectionTable(columns, table.identifiers, "integrated")
    )
    flags = flags | np.uint64(DialsFlag.SCALED)
    for flag in (DialsFlag.OUTLIER_IN_SCALING, DialsFlag.EXCLUDED_FOR_SCALING):
        flags[rng.random(n) < 0.05] |= np.uint64(flag)
    flags[rng.random(n) < 0.05] &= ~np.uint64(DialsFlag.SCALED)
    columns |= {
        "flags": flags,
        "intensity.scale.value": strength * 0.5,
        "intensity.scale.variance": strength,
        "inverse_scale_factor": rng.uniform(0.5, 1.5, n),
        "inverse_scale_factor_variance": np.zeros(n),
    }
    write_reflections(
        folder / "scaled.refl", ReflectionTable(columns, table.identifiers, "scaled")
    )
    return {
        name: (folder / f"{name}.refl", folder / f"{name}.expt")
        for name in ("integrated", "scaled")
    }


@pytest.fixture(scope="module")
def exported(sweep, dials, tmp_path_factory):
    """The same tables as dials.export writes them, read back."""
    folder = tmp_path_factory.mktemp("exported")
    result = {}
    for name, paths in sweep.items():
        command = [f"{dials}/dials.export", *map(str, paths), f"mtz.hklout={name}.mtz"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        result[name] = read_mtz(folder / f"{name}.mtz")
    return result


@pytest.fixture(scope="module")
def load(dials):
    """Give dxtbx's reader of experiment lists."""
    if DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(DEBIAN_BUILD))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that dxtbx imports
        from dxtbx.model.experiment_list import ExperimentListFactory
    return lambda path: ExperimentListFactory.from_json_file(str(path), check_format=False)


def by_observation(data):
    """Row of each (h, k, l, batch); these are unique in the test data."""
    keys = zip(data.miller_index.tolist(), data.metadata["BATCH"].tolist(), strict=True)
    return {(*index, batch): row for row, (index, batch) in enumerate(keys)}


@pytest.mark.slow
@pytest.mark.dials
@pytest.mark.realdata
@pytest.mark.parametrize("name", ["integrated", "scaled"])
def test_selection_and_corrections_are_those_of_dials_export(sweep, exported, name):
    ours, theirs = read_dials(*sweep[name]), exported[name]
    # by index and angle: DIALS takes the batch from the observed centroid, we from the predicted
    keys = [np.column_stack([d.miller_index, d.metadata["ROT"]]) for d in (ours, theirs)]
    distance, row = cKDTree(keys[0]).query(keys[1])
    assert distance.max() < 1e-4
    assert len(np.unique(row)) == len(row)
    # of unscaled data dials.export wants both kinds of intensity (.81 of these), dials.scale and
    # we either (.99)
    assert len(ours) == len(theirs) or (name == "integrated" and len(ours) < 1.25 * len(theirs))
    batches = ours.metadata["BATCH"][row] - theirs.metadata["BATCH"]
    assert np.abs(batches).max() <= 1
    np.testing.assert_allclose(ours.intensity[row], theirs.intensity, rtol=1e-5)
    np.testing.assert_allclose(ours.sigma[row], theirs.sigma, rtol=1e-5)
    for label, name_there in (("xobs", "XDET"), ("yobs", "YDET"), ("ROT", "ROT"), ("LP", "LP")):
        np.testing.assert_allclose(
            ours.metadata[label][row], theirs.metadata[name_there], rtol=1e-5, atol=1e-4
        )
    # places on the sweep, from our models and from the batch headers of dials.export
    for label, tolerance in ((SWEEP, 0), (FRAME, 1e-3), (FRAME_WIDTH, 1e-6)):
        np.testing.assert_allclose(
            ours.metadata[label][row], theirs.metadata[label], rtol=0, atol=tolerance
        )
    here, there = (np.stack([d.metadata[n] for n in BEAMS], 1) for d in (ours, theirs))
    here, there = (b.reshape(len(b), 2, 3) for b in (here[row], there))
    turn, _ = Rotation.align_vectors(here.reshape(-1, 3), there.reshape(-1, 3))
    miss = np.linalg.norm(turn.apply(there.reshape(-1, 3)) - here.reshape(-1, 3), axis=1)
    assert np.median(miss) < 1e-3
    assert miss.max() < 5e-3
    np.testing.assert_allclose(ours.cell.parameters, theirs.cell.parameters, rtol=1e-4)
    assert ours.has_lp_applied
    assert theirs.has_lp_applied
    assert ours.wavelength is None


@pytest.mark.dials
@pytest.mark.realdata
def test_beams_in_the_frame_of_the_crystal(sweep, load):
    """s1 - s0 is the reciprocal-lattice vector, which in the crystal's frame does not turn."""
    data = read_dials(*sweep["integrated"])
    (experiment,) = read_experiments(sweep["integrated"][1])
    s0, s1 = (
        np.column_stack([data.metadata[f"{beam}c_{axis}"] for axis in "xyz"])
        for beam in ("s0", "s1")
    )
    np.testing.assert_allclose(np.linalg.norm(s0, axis=1), 1.0, rtol=1e-9)
    r = (s1 - s0) / experiment.beam.wavelength
    expected = data.miller_index @ experiment.crystal.A.T
    assert np.abs(r - expected).max() < 2e-3  # s1 was refined scan-varying
    model = load(sweep["integrated"][1])[0]
    goniometer = model.goniometer
    axis = np.array(goniometer.get_rotation_axis_datum())
    setting, fixed = (
        np.reshape(m, (3, 3))
        for m in (goniometer.get_setting_rotation(), goniometer.get_fixed_rotation())
    )
    reference = []
    for phi in np.radians(data.metadata["ROT"][:200]):
        cross = np.cross(np.eye(3), axis)  # cross @ v = axis x v
        turn = np.eye(3) + np.sin(phi) * cross + (1 - np.cos(phi)) * cross @ cross
        reference.append(np.linalg.solve(setting @ turn @ fixed, model.beam.get_unit_s0()))
    np.testing.assert_allclose(s0[:200], reference, atol=1e-12)


@pytest.mark.realdata
def test_summed_intensities_where_none_were_fitted(sweep, tmp_path):
    table = read_reflections(sweep["integrated"][0])
    flags = table["flags"] & ~np.uint64(DialsFlag.INTEGRATED_PRF)
    write_reflections(
        tmp_path / "sum.refl", ReflectionTable(table.columns | {"flags": flags}, table.identifiers)
    )
    data = read_dials(tmp_path / "sum.refl", sweep["integrated"][1])
    rows = by_observation(data)
    good = (flags & np.uint64(DialsFlag.INTEGRATED_SUM)) != 0
    good &= (table["partiality"] >= 0.4) & (table["qe"] > 0) & (table["id"] >= 0)
    assert len(data) == good.sum()
    first = np.flatnonzero(good)[0]
    z = np.floor(table["xyzcal.px"][first, 2])
    row = rows[(*table["miller_index"][first].tolist(), np.clip(z + 1, 1, 400))]
    factor = table["lp"][first] / table["qe"][first] / table["partiality"][first]
    assert data.intensity[row] == pytest.approx(table["intensity.sum.value"][first] * factor)
    variance = table["intensity.sum.variance"][first]
    assert data.sigma[row] == pytest.approx(np.sqrt(variance) * factor)


@pytest.mark.realdata
def test_stills_are_those_of_the_published_mtz_files(shared):
    """The three stills are the first images of the thermolysin files."""
    small = shared / "data" / "small"
    (data,) = read_table([small / "stills.expt", small / "stills.refl"])
    folder = shared / "data" / "thermolysin_xfel"
    halves = read_table([folder / f"friedel_{m}_n395.mtz" for m in ("plus", "minus")])
    published = combine_friedel(*halves)
    assert (len(data), data.n_images) == (502, 3)
    rows, reference = by_observation(data), by_observation(published.select(published.image < 3))
    assert rows.keys() == reference.keys()
    row = np.array([rows[key] for key in reference])
    np.testing.assert_allclose(data.intensity[row], published.intensity[:502], rtol=1e-6)
    np.testing.assert_allclose(data.sigma[row], published.sigma[:502], rtol=1e-6)
    for label in ("ewald_offset", "xobs", "yobs"):
        np.testing.assert_allclose(
            data.metadata[label][row], published.metadata[label][:502], rtol=1e-5, atol=1e-10
        )
    assert np.unique(data.wavelength).size == 3
    assert not data.has_lp_applied
    assert not data.is_polychromatic


@pytest.mark.realdata
def test_pairs_and_order(sweep, shared):
    (first, first_expt), (second, second_expt) = sweep["scaled"], sweep["integrated"]
    mtz = shared / "data" / "pyp_laue" / "off_iso_uc.mtz"
    data = read_table([first, mtz, second_expt, second, first_expt])
    assert [d.name for d in data] == ["scaled", "off_iso_uc", "integrated"]
    with pytest.raises(UserError, match=r"2 \.refl and 1 \.expt"):
        read_table([first, second, first_expt])


@pytest.mark.realdata
def test_faults_are_named(sweep, shared, tmp_path):
    table = read_reflections(sweep["integrated"][0])
    empty = np.zeros_like(table["flags"])
    write_reflections(
        tmp_path / "a.refl", ReflectionTable(table.columns | {"flags": empty}, table.identifiers)
    )
    with pytest.raises(UserError, match="holds no integrated reflection"):
        read_dials(tmp_path / "a.refl", sweep["integrated"][1])
    with pytest.raises(UserError, match=r"\.expt and \.refl of the same"):
        read_dials(shared / "data" / "small" / "stills.refl", sweep["integrated"][1])
    both = json.loads((shared / "data" / "small" / "stills.expt").read_text())
    both["crystal"][1]["space_group_hall_symbol"] = " P 6 2"
    (tmp_path / "b.expt").write_text(json.dumps(both))
    with pytest.raises(UserError, match="crystals of the space groups"):
        read_dials(shared / "data" / "small" / "stills.refl", tmp_path / "b.expt")
