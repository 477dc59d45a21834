"""Wavelengths and crystal forms of sweeps and stills: kept apart, refused, and written."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import gemmi
import mad_files as mad
import numpy as np
import pytest
import torch
from simulated_integration import write_integrated
from simulated_merge import CELL as FORM
from simulated_merge import SPACE_GROUP as FORM_GROUP
from simulated_merge import simulate

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import read_reflections, write_reflections
from braggflux.integrator.io.intensity_file import write_intensities
from braggflux.merge.io.dataset_split import (
    cell_groups,
    image_cell_groups,
    image_wavelength_groups,
    split_by_wavelength,
)
from braggflux.merge.io.formats.dials import read_dials_datasets
from braggflux.merge.io.formats.mtz_observations import read_mtz_datasets
from braggflux.merge.io.formats.photon_table import read_photon_table
from braggflux.merge.io.observations import make_unmerged
from braggflux.merge.io.stores.unmerged_store import write_unmerged_store
from braggflux.pipelines import cli
from braggflux.pipelines.integration.checks import one_wavelength

FAST = ("--epochs", "20", "--set", "network_width=8")


def merge(*argv) -> int:
    return cli.main(["merge", *(str(a) for a in argv), *FAST])


def wavelength_of(path) -> float:
    (dataset,) = gemmi.read_mtz_file(str(path)).datasets
    return dataset.wavelength


class TestSweeps:
    @pytest.mark.slow
    def test_opposite_anomalous_signals_stay_apart(self, tmp_path):
        sweeps = [
            (mad.observe(mad.truth(sign), seed), mad.sweep(wavelength))
            for sign, seed, wavelength in (
                (-1, 1, mad.REMOTE),
                (1, 0, mad.PEAK),
                (1, 2, mad.PEAK),
            )
        ]
        out = tmp_path / "out"
        assert merge(*mad.write_tables(tmp_path, sweeps), "--anomalous", "--out", out) == 0
        for name, sign, wavelength in (("WAVE1", -1, mad.REMOTE), ("WAVE2", 1, mad.PEAK)):
            path = out / f"mad_{name}_merged.mtz"
            assert mad.bijvoet_correlation(path, mad.truth(sign)) > 0.97
            assert wavelength_of(path) == pytest.approx(wavelength, abs=1e-5)

    def test_one_wavelength_is_one_data_set_and_is_written(self, tmp_path):
        sweeps = [
            (mad.observe(mad.truth(), seed, n_images=6), mad.sweep(1.54178 + 2e-5 * seed))
            for seed in range(2)
        ]
        paths = mad.write_tables(tmp_path, sweeps)
        assert merge(*paths, "--out", tmp_path / "out") == 0
        assert wavelength_of(tmp_path / "out" / "merged.mtz") == pytest.approx(1.54179, abs=1e-5)

    @pytest.mark.parametrize(("length", "is_refused"), [(63.6, True), (61.2, False)])
    def test_crystal_forms(self, tmp_path, length, is_refused):
        cell = gemmi.UnitCell(40, 50, length, 90, 90, 90)
        rows = mad.observe(mad.truth(), 0, n_images=6)
        files = mad.write_tables(tmp_path, [(rows, mad.sweep(1.0)), (rows, mad.sweep(1.0, cell))])
        if is_refused:
            with pytest.raises(UserError, match=r"60\.00 .*\(1 crystals\).*63\.60"):
                read_dials_datasets(*files)
            return
        (data,) = read_dials_datasets(*files)
        assert data.cell.c == pytest.approx(60.6)

    def test_a_run_has_one_wavelength(self):
        assert one_wavelength([0.9793, 0.97932]) == pytest.approx(0.97931)
        with pytest.raises(UserError, match=r"2 wavelengths \(0\.97930, 0\.97950 A\)"):
            one_wavelength([0.9793, 0.9795, 0.9793])


def stills(wavelength, cells=None, n_per_image=20):
    """Stills with these wavelengths."""
    rows = mad.observe(mad.truth(), 0, len(wavelength), n_per_image)
    return make_unmerged(
        source="stills",
        miller_index=rows.hkl,
        intensity=rows.columns["I"],
        sigma=rows.columns["SIGI"],
        image_label=rows.columns["BATCH"],
        metadata={},
        wavelength=np.repeat(wavelength, n_per_image),
        cell=mad.CELL,
        space_group=mad.GROUP,
        name="stills",
        has_lp_applied=False,
    )


class TestStills:
    @pytest.mark.parametrize("n", [4, 10, 40, 1000])
    @pytest.mark.parametrize("seed", range(5))
    def test_the_pulses_of_one_beam_are_one_data_set(self, n, seed):
        rng = np.random.default_rng(seed)
        pulses = 1.3 * (1 + 2e-3 * rng.standard_normal(n))
        assert not image_wavelength_groups(pulses, is_still=True).any()
        # the machine is tuned anew in the midst
        drift = pulses * (1 + 2e-3 * (np.arange(n) > n / 2))
        assert not image_wavelength_groups(drift, is_still=True).any()

    def test_two_beams_are_two(self):
        rng = np.random.default_rng(0)
        beams = np.repeat([1.30, 1.36], [30, 20]) * (1 + 2e-3 * rng.standard_normal(50))
        parts = split_by_wavelength(stills(rng.permutation(beams)))
        assert [p.name for p in parts] == ["stills_WAVE1", "stills_WAVE2"]
        assert [p.n_images for p in parts] == [30, 20]
        assert [p.typical_wavelength for p in parts] == pytest.approx([1.30, 1.36], rel=1e-3)

    def test_a_pulse_of_wrong_energy_is_no_data_set(self):
        assert len(split_by_wavelength(stills([1.3, 1.301, 1.299, 1.3, 2.6]))) == 1


def cells_of(length, n, spread, seed=0):
    rng = np.random.default_rng(seed)
    scatter = 1 + spread * rng.standard_normal((n, 6)) * [1, 1, 1, 0.3, 0.3, 0.3]
    return np.array([79.0, 79.0, length, 90, 90, 90]) * scatter


class TestCells:
    @pytest.mark.parametrize("n", [10, 200, 2000])
    @pytest.mark.parametrize("spread", [0.001, 0.005, 0.012])
    def test_the_spread_of_serial_data_is_one_form(self, n, spread):
        for seed in range(5):
            cells = cells_of(38.0, n, spread, seed)
            assert not image_cell_groups(cells).any()
            # strays: one in fifty indexed with another cell
            cells[::50] = np.random.default_rng(seed).uniform(30, 120, (len(cells[::50]), 6))
            assert not image_cell_groups(cells).any()

    @pytest.mark.parametrize("n", [1, 10, 500])
    def test_two_forms_are_seen(self, n):
        cells = np.concatenate([cells_of(38.0, 3 * n, 0.004), cells_of(40.28, n, 0.004, 1)])
        order = np.random.default_rng(0).permutation(len(cells))
        group = image_cell_groups(cells[order])
        np.testing.assert_array_equal(group, order >= 3 * n)

    def test_crystals_of_sweeps_are_linked(self):
        cells = np.array([[79, 79, c, 90, 90, 90] for c in (38.0, 38.8, 39.6, 42.0, 42.5)])
        np.testing.assert_array_equal(cell_groups(cells), [0, 0, 0, 1, 1])


def test_pieces_of_a_store_have_one_form(tmp_path):
    piece = stills(np.full(30, 1.3))
    other = replace(piece, cell=gemmi.UnitCell(40, 50, 63.6, 90, 90, 90))
    with pytest.raises(UserError, match="mixes crystal forms"):
        write_unmerged_store(tmp_path / "a.h5", [piece, other])
    assert not (tmp_path / "a.h5").exists()


def test_the_wavelength_goes_through_a_store(tmp_path):
    mtz = mad.empty_mtz()
    mad.add_dataset(mtz, ("proj", "xtal", "PEAK"), mad.PEAK, range(1, 9))
    rows = mad.observe(mad.truth(), 0, n_images=8)
    mad.write(tmp_path / "a.mtz", rows, mtz)
    argv = ["convert", str(tmp_path / "a.mtz"), "--out", str(tmp_path / "a.h5")]
    assert cli.main(argv) == 0
    assert merge(tmp_path / "a.h5", "--out", tmp_path / "out") == 0
    path = tmp_path / "out" / "merged.mtz"
    assert wavelength_of(path) == pytest.approx(mad.PEAK, abs=1e-5)
    assert gemmi.read_mtz_file(str(path)).datasets[0].dataset_name == "PEAK"


@pytest.mark.slow
@pytest.mark.dials
@pytest.mark.realdata
def test_two_wavelengths_that_dials_exports(shared, dials, tmp_path):
    """DIALS gives both data sets one name; rows and wavelengths are those of its tables."""
    refl, expt = write_integrated(shared, tmp_path, n_sweeps=2)
    content = json.loads(expt.read_text())
    other = content["beam"][0] | {"wavelength": content["beam"][0]["wavelength"] + 0.02}
    content["beam"].append(other)
    content["experiment"][1]["beam"] = 1
    expt.write_text(json.dumps(content))
    command = [f"{dials}/dials.export", str(refl), str(expt), "mtz.hklout=u.mtz"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    exported, ours = read_mtz_datasets(tmp_path / "u.mtz"), read_dials_datasets(refl, expt)
    for sets in (exported, ours):
        found = [data.labels.wavelength for data in sets]
        assert found == pytest.approx([1.03752, 1.05752], abs=1e-4)
        assert [data.name[-6:] for data in sets] == ["_WAVE1", "_WAVE2"]
    assert [d.labels.names.dataset for d in exported] == ["FROMDIALS_WAVE1", "FROMDIALS_WAVE2"]
    own, theirs = ([keys(data) for data in sets] for sets in (ours, exported))
    for k in (0, 1):  # a few rows have sums in place of bad profiles, or neither
        assert len(theirs[k] & own[k]) > 0.9 * len(theirs[k])
        assert len(theirs[k] & own[1 - k]) < 0.01 * len(theirs[k])


def keys(data):
    columns = np.column_stack([data.miller_index, np.round(data.metadata["XDET"])])
    return set(map(tuple, columns.astype(int).tolist()))


@pytest.mark.parametrize("column", ["xyzcal.px", "s1", "intensity.prf.value", "lp"])
def test_gaps_in_dials_tables(column, tmp_path):
    """Rows that lack a number are left out, and others are as they were."""
    rows = mad.observe(mad.truth(), 0, n_images=6)
    refl, expt = mad.write_tables(tmp_path, [(rows, mad.sweep(1.0))])
    (whole,) = read_dials_datasets(refl, expt)
    table = read_reflections(refl)
    lacks = np.random.default_rng(0).random(len(table)) < 0.03
    values = table[column].copy()
    values[lacks] = np.nan
    write_reflections(refl, replace(table, columns=table.columns | {column: values}))
    (data,) = read_dials_datasets(refl, expt)
    kept = np.isin(whole.intensity, rows.columns["I"][~lacks])
    np.testing.assert_array_equal(data.intensity, whole.intensity[kept])
    for name, values in data.metadata.items():
        assert np.isfinite(values).all(), name
        np.testing.assert_array_equal(values, whole.metadata[name][kept])


CRYSTAL = """--- Begin crystal
Cell parameters 4.00000 5.00000 {c:.5f} nm, 90.00000 90.00000 90.00000 deg
astar = +0.2500000 +0.0000000 +0.0000000 nm^-1
bstar = +0.0000000 +0.2000000 +0.0000000 nm^-1
cstar = +0.0000000 +0.0000000 {cs:+.7f} nm^-1
num_reflections = {n}
Reflections measured after indexing
   h    k    l          I   sigma(I)       peak background  fs/px  ss/px panel
{rows}
End of reflections
--- End crystal
"""


def write_stream(path, lengths, energies):
    """One crystal to each frame, with its c axis [A] and photon energy [eV]."""
    text = "CrystFEL stream format 2.3\n"
    for number, (c, energy) in enumerate(zip(lengths, energies, strict=True)):
        rows = mad.observe(mad.truth(), number, 1, 40)
        lines = [
            f"{h} {k} {l} {i:.2f} 15.00 10.0 1.0 {x:.1f} {y:.1f} q0"
            for (h, k, l), i, x, y in zip(
                rows.hkl, *(rows.columns[n] for n in ("I", "XDET", "YDET")), strict=True
            )
        ]
        text += f"----- Begin chunk -----\nImage serial number: {number}\n"
        text += f"photon_energy_eV = {energy:.3f}\n"
        text += CRYSTAL.format(c=c / 10, cs=10 / c, n=len(lines), rows="\n".join(lines))
        text += "----- End chunk -----\n"
    path.write_text(text)
    return path


class TestStreams:
    GROUP = ("--space-group", "P212121", "--stills")

    def test_two_crystal_forms_are_refused(self, tmp_path, capsys):
        path = write_stream(tmp_path / "a.stream", [60.0, 63.6] * 6, [9500.0] * 12)
        assert merge(path, *self.GROUP, "--out", tmp_path / "out") == 2
        assert "60.00 90.00 90.00 90.00 (6 crystals)" in capsys.readouterr().err
        argv = ["convert", str(path), "--space-group", "P212121", "--out", str(tmp_path / "a.h5")]
        assert cli.main(argv) == 2

    def test_two_photon_energies_are_two_data_sets(self, tmp_path):
        rng = np.random.default_rng(0)
        energies = np.repeat([9500.0, 12658.0], 8) * (1 + 1e-3 * rng.standard_normal(16))
        path = write_stream(tmp_path / "a.stream", 60 + 0.3 * rng.standard_normal(16), energies)
        assert merge(path, *self.GROUP, "--out", tmp_path / "out") == 0
        for name, energy in (("WAVE1", 12658.0), ("WAVE2", 9500.0)):
            found = wavelength_of(tmp_path / "out" / f"a_{name}_merged.mtz")
            assert found == pytest.approx(gemmi.hc / energy, rel=2e-3)
        argv = ["convert", str(path), "--space-group", "P212121", "--out", str(tmp_path / "a.h5")]
        assert cli.main(argv) == 2


def test_photon_counts_of_two_wavelengths(tmp_path):
    experiment = simulate(d_min=6.0, photons=200.0, seed=3)
    record = {
        "unit_cell": list(FORM.parameters),
        "space_group": FORM_GROUP.xhm(),
        "image_range": [1, 360],
        "oscillation_deg": [10.0, 1.0],
    }
    sweep = torch.arange(len(experiment.table)) % 2
    table = experiment.with_sweeps(sweep)
    records = [record | {"wavelength": w} for w in (mad.PEAK, mad.REMOTE)]
    write_intensities(tmp_path / "a.h5", table, records)
    parts = read_photon_table(tmp_path / "a.h5")
    assert [p.labels.wavelength for p in parts] == [mad.PEAK, mad.REMOTE]
    assert [len(p) for p in parts] == [int((sweep == k).sum()) for k in (0, 1)]
    form = {"unit_cell": [c * 1.06 for c in FORM.parameters[:3]] + [90, 90, 90]}
    records = [records[0], records[0] | form]
    write_intensities(tmp_path / "b.h5", table, records)
    with pytest.raises(UserError, match="mixes crystal forms"):
        read_photon_table(tmp_path / "b.h5")
