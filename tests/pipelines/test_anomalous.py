"""The anomalous scorer: against an independent one, and on a structure with known f''."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import gemmi
import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.merge.io.mtz import read_merged_mtz, write_merged_mtz
from braggflux.merge.output.merged_table import DIFFERENCE
from braggflux.pipelines.maps import anomalous_peaks as anomalous
from braggflux.pipelines.maps import atomic_model
from braggflux.pipelines.maps.difference_map import NoMapError, weighted_differences

CELL = gemmi.UnitCell(31.0, 37.0, 43.0, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")
D_MIN = 2.2
F_DOUBLE_PRIME = {"I": 3.5, "S": 0.3}
IODIDE = (12.3, 8.1, 21.7)


def toy_structure(light: int = 150, with_heavy: bool = True) -> gemmi.Structure:
    """Light atoms at random, one iodide, one sulfur in two conformers."""
    rng = np.random.default_rng(7)
    structure = gemmi.Structure()
    structure.cell, structure.spacegroup_hm = CELL, SPACE_GROUP.hm
    model, chain = gemmi.Model(1), gemmi.Chain("A")

    def add(name, number, atoms):
        residue = gemmi.Residue()
        residue.name, residue.seqid = name, gemmi.SeqId(str(number))
        for label, element, position, occupancy, altloc in atoms:
            atom = gemmi.Atom()
            atom.name, atom.element, atom.pos = label, gemmi.Element(element), position
            atom.occ, atom.b_iso, atom.altloc = occupancy, 15.0, altloc
            residue.add_atom(atom)
        chain.add_residue(residue)

    for number in range(1, light + 1):
        where = CELL.orthogonalize(gemmi.Fractional(*rng.random(3)))
        add("GLY", number, [("CA", "CNO"[number % 3], where, 1.0, "\0")])
    if with_heavy:
        a, b = gemmi.Position(4.0, 20.0, 9.0), gemmi.Position(5.6, 20.5, 9.5)
        add("CYS", light + 1, [("SG", "S", a, 0.6, "A"), ("SG", "S", b, 0.4, "B")])
        add("IOD", 204, [("I", "I", gemmi.Position(*IODIDE), 0.8, "\0")])
    model.add_chain(chain)
    structure.add_model(model)
    structure.setup_entities()
    return structure


def direct_structure_factors(structure, hkl, sign=1):
    """F(sign * h) by summation over atoms and operations, with f'' (no f')."""
    cell = structure.cell
    stol2 = np.array([cell.calculate_1_d2(h) for h in hkl.tolist()]) / 4
    total = np.zeros(len(hkl), complex)
    for site in structure[0].all():
        atom = site.atom
        factor = atom.element.it92
        form = (
            sum(a * np.exp(-b * stol2) for a, b in zip(factor.a, factor.b, strict=True)) + factor.c
        )
        form = form + 1j * F_DOUBLE_PRIME.get(atom.element.name, 0.0)
        x = cell.fractionalize(atom.pos).tolist()
        for operation in SPACE_GROUP.operations():
            phase = 2 * np.pi * sign * (hkl @ np.array(operation.apply_to_xyz(x)))
            total += atom.occ * form * np.exp(-atom.b_iso * stol2 + 1j * phase)
    return total


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Model file and noisy amplitudes of both Friedel mates."""
    structure = toy_structure()
    path = tmp_path_factory.mktemp("toy") / "toy.pdb"
    structure.write_pdb(str(path))
    hkl = gemmi.make_miller_array(CELL, SPACE_GROUP, D_MIN)
    plus = np.abs(direct_structure_factors(structure, hkl))
    minus = np.abs(direct_structure_factors(structure, hkl, sign=-1))
    rng = np.random.default_rng(1)
    sigma = np.full(len(hkl), 0.5)
    return {
        "path": path,
        "hkl": hkl,
        "data": (
            plus + 0.5 * rng.standard_normal(len(hkl)),
            sigma,
            minus + 0.5 * rng.standard_normal(len(hkl)),
            sigma,
        ),
    }


@pytest.fixture(scope="module")
def model(toy):
    return anomalous.AnomalousModel(toy["path"], CELL, SPACE_GROUP, D_MIN)


def heights(peaks):
    return {f"{p.residue}{p.seqid}:{p.atom}": p.peak_sigma for p in peaks}


def test_phases_equal_direct_summation(toy, monkeypatch):
    """Gridded density against the sum over atoms, without solvent and with f'' left out."""
    monkeypatch.setattr(atomic_model, "SOLVENT_DENSITY", 0.0)
    monkeypatch.setitem(F_DOUBLE_PRIME, "I", 0.0)
    monkeypatch.setitem(F_DOUBLE_PRIME, "S", 0.0)
    structure = atomic_model.read_model(toy["path"])
    hkl, value = atomic_model.structure_factors(structure, D_MIN)
    expected = direct_structure_factors(structure, hkl)
    assert len(hkl) == len(toy["hkl"])
    assert np.abs(value - expected).max() < 0.01 * np.abs(expected).std()


def test_solvent_counts_at_low_resolution_only(toy):
    structure = atomic_model.read_model(toy["path"])
    hkl, value = atomic_model.structure_factors(structure, D_MIN)
    d = np.array([CELL.calculate_d(h) for h in hkl.tolist()])
    change = np.abs(value - direct_structure_factors(structure, hkl)) / np.abs(value).mean()
    assert change[d > 10].mean() > 5 * change[d < 2.5].mean()


def test_the_peak_is_on_the_anomalous_scatterer(toy, model):
    peaks = model.peak_heights(toy["hkl"], *toy["data"])
    found = heights(peaks)
    assert set(found) == {"IOD204:I", "CYS151:SG"}
    assert found["IOD204:I"] > 15
    assert found["IOD204:I"] > 4 * found["CYS151:SG"]
    density = model.difference_map(toy["hkl"], *toy["data"])
    first, *others = density.strongest_peaks(5, model.sites, cutoff=3.0)
    assert first.nearest == "A/IOD204:I"
    assert first.distance < 0.3
    assert all(p.peak_sigma < 0.5 * first.peak_sigma for p in others)
    # the height at the site is the interpolated maximum, at least that of the nearest grid point
    assert first.peak_sigma <= found["IOD204:I"] < 1.1 * first.peak_sigma


def test_exchanging_friedel_mates_turns_the_peak_into_a_hole(toy, model):
    f_plus, sigma_plus, f_minus, sigma_minus = toy["data"]
    swapped = model.peak_heights(toy["hkl"], f_minus, sigma_minus, f_plus, sigma_plus)
    assert heights(swapped)["IOD204:I"] < 0


def test_order_and_scale_of_the_data_do_not_matter(toy, model):
    expected = heights(model.peak_heights(toy["hkl"], *toy["data"]))
    order = np.random.default_rng(3).permutation(len(toy["hkl"]))
    shuffled = model.peak_heights(toy["hkl"][order], *(7.5 * x[order] for x in toy["data"]))
    assert heights(shuffled) == pytest.approx(expected, rel=1e-3)


def test_a_wild_outlier_hardly_changes_the_peak(toy, model):
    expected = heights(model.peak_heights(toy["hkl"], *toy["data"]))["IOD204:I"]
    f_plus, *rest = toy["data"]
    f_plus = f_plus.copy()
    acentric = ~SPACE_GROUP.operations().centric_flag_array(toy["hkl"])
    f_plus[np.flatnonzero(acentric)[100]] *= 1000
    found = heights(model.peak_heights(toy["hkl"], f_plus, *rest))["IOD204:I"]
    assert found == pytest.approx(expected, rel=0.05)


def test_resolution_limit_and_missing_values_reduce_the_pairs(toy, model):
    everything = model.difference_map(toy["hkl"], *toy["data"])
    limited = model.difference_map(toy["hkl"], *toy["data"], d_min=3.0)
    centric = SPACE_GROUP.operations().centric_flag_array(toy["hkl"])
    assert everything.n_pairs == np.sum(~centric)
    assert limited.n_pairs < everything.n_pairs
    assert limited.d_min >= 3.0
    f_plus, *rest = toy["data"]
    gaps = np.where(np.arange(len(f_plus)) % 2, np.nan, f_plus)
    half = model.difference_map(toy["hkl"], gaps, *rest)
    assert half.n_pairs == np.sum(~centric[::2])


def test_data_without_a_signal_give_reasons_instead_of_heights(toy, model):
    few = model.peak_heights(toy["hkl"][:30], *(x[:30] for x in toy["data"]))
    assert [p.peak_sigma for p in few] == [None, None]
    assert "Bijvoet pairs, 50 needed" in few[0].reason
    f, sigma, _, _ = toy["data"]
    equal = model.peak_heights(toy["hkl"], f, sigma, f, sigma)
    assert equal[0].peak_sigma is None
    assert "differences are zero" in equal[0].reason
    with pytest.raises(NoMapError):
        model.difference_map(toy["hkl"], f, sigma, f, sigma)


def test_indices_outside_the_asymmetric_unit_are_refused(toy, model):
    with pytest.raises(ValueError, match="asymmetric unit"):
        model.peak_heights(-toy["hkl"], *toy["data"])


def test_weights_prefer_precise_differences_and_survive_overstated_sigmas():
    rng = np.random.default_rng(0)
    n = 3000
    variance = rng.choice([0.1, 10.0], n)
    x = rng.standard_normal(n) * np.sqrt(1.0 + variance)
    s2 = rng.uniform(0.01, 0.2, n)
    weight = weighted_differences(x, variance, s2) / x
    # S^2 = 1: the Wiener weights are 1 / 1.1 and 1 / 11
    assert np.median(weight[variance < 1]) == pytest.approx(1 / 1.1, rel=0.05)
    assert np.median(weight[variance > 1]) == pytest.approx(1 / 11, rel=0.3)
    overstated = weighted_differences(x, 100 * variance, s2) / x
    ratio = np.median(overstated[variance < 1]) / np.median(overstated[variance > 1])
    assert ratio == pytest.approx(100, rel=0.1)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["dials_merged", "dials_tuned_merged"])
@pytest.mark.parametrize(("d_min", "tolerance"), [(None, 0.3), (2.5, 0.5)])
def test_agrees_with_the_independent_scorer(shared, name, d_min, tolerance):
    mtz, pdb = shared / f"data/hewl_nai/{name}.mtz", shared / "data/hewl_nai/9b7c.pdb"
    command = [sys.executable, str(shared / "tools/anomalous_peaks.py"), str(mtz), str(pdb)]
    command += ["--json"] if d_min is None else ["--json", "--d-min", str(d_min)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    theirs = json.loads(run.stdout)["peaks"]
    ours = heights(anomalous.peak_heights_from_mtz(mtz, pdb, d_min=d_min))
    assert set(ours) == set(theirs)
    for site in ("IOD204:I", "IOD205:I", "IOD206:I"):
        # two definitions of weights, clipping and search; a height's own noise is about 1 sigma
        assert abs(ours[site] - theirs[site]) < tolerance, site
    sulfurs = [site for site in ours if not site.startswith("IOD")]
    difference = np.mean([ours[s] - theirs[s] for s in sulfurs])
    assert abs(difference) < 0.3


def coupled_file(shared, path):
    """DIALS' file with a DANO as a coupled merge would have it: shrunk, noise and all."""
    merged = read_merged_mtz(shared / "data/hewl_nai/dials_merged.mtz")
    table = merged.table
    difference = table.f_plus - table.f_minus
    variance = table.sigma_f_plus**2 + table.sigma_f_minus**2
    shrunk = difference * 30.0 / (30.0 + variance)
    table = replace(table, difference=shrunk, sigma_difference=np.sqrt(variance))
    crystal = merged.cell, merged.space_group, merged.wavelength
    write_merged_mtz(path, table, *crystal, history=DIFFERENCE)
    return path


@pytest.mark.realdata
@pytest.mark.parametrize("d_min", [None, 2.5])
def test_coupled_differences_are_used_as_they_are(shared, tmp_path, d_min):
    mtz, pdb = coupled_file(shared, tmp_path / "coupled.mtz"), shared / "data/hewl_nai/9b7c.pdb"
    command = [sys.executable, str(shared / "tools/anomalous_peaks.py"), str(mtz), str(pdb)]
    command += ["--json", "--dano", *(() if d_min is None else ("--d-min", str(d_min)))]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    theirs = json.loads(run.stdout)["peaks"]
    peaks = anomalous.peak_heights_from_mtz(mtz, pdb, d_min=d_min)
    assert {p.difference for p in peaks} == {anomalous.COUPLED}
    ours = heights(peaks)
    for site in ("IOD204:I", "IOD205:I", "IOD206:I"):
        assert ours[site] == pytest.approx(theirs[site], rel=0.02), site  # place of the maximum
    plain = anomalous.peak_heights_from_mtz(
        shared / "data/hewl_nai/dials_merged.mtz", pdb, d_min=d_min
    )
    assert {p.difference for p in plain} == {anomalous.OWN}, "the DANO of DIALS is not coupled"
    own = {p.label: p.peak_sigma_own for p in peaks}
    assert own == pytest.approx({p.label: p.peak_sigma for p in plain})


@pytest.mark.realdata
def test_coupled_differences_that_are_all_zero_leave_the_own(shared, tmp_path):
    """As before the first step of a run, which starts the mates alike."""
    data = shared / "data/hewl_nai"
    merged = read_merged_mtz(data / "dials_merged.mtz")
    nothing = 0 * merged.table.f_minus
    table = replace(merged.table, difference=nothing, sigma_difference=1 + nothing)
    crystal = merged.cell, merged.space_group, merged.wavelength
    write_merged_mtz(tmp_path / "zero.mtz", table, *crystal, history=DIFFERENCE)
    peaks = anomalous.peak_heights_from_mtz(tmp_path / "zero.mtz", data / "9b7c.pdb")
    assert {p.difference for p in peaks} == {anomalous.OWN}
    assert heights(peaks)["IOD204:I"] > 15


def test_without_weights_and_clipping_a_map_is_its_coefficients(toy, model):
    f_plus, _, f_minus, _ = toy["data"]
    difference = f_plus - f_minus
    once = model.peaks_in(model.coupled_map(toy["hkl"], difference))
    assert heights(once)["IOD204:I"] > 15
    assert heights(model.peaks_in(model.coupled_map(toy["hkl"], 3 * difference))) == pytest.approx(
        heights(once), rel=1e-4
    )
    gaps = np.where(np.arange(len(difference)) % 2, np.nan, difference)
    halved = model.coupled_map(toy["hkl"], gaps)
    assert halved.n_pairs < 0.6 * model.coupled_map(toy["hkl"], difference).n_pairs
    with pytest.raises(NoMapError):
        model.coupled_map(toy["hkl"], 0 * difference)


@pytest.mark.realdata
def test_intensities_serve_where_there_are_no_amplitudes(shared, tmp_path):
    mtz, pdb = shared / "data/hewl_nai/dials_merged.mtz", shared / "data/hewl_nai/9b7c.pdb"
    reduced = gemmi.read_mtz_file(str(mtz))
    for label in ("F(+)", "SIGF(+)", "F(-)", "SIGF(-)"):
        reduced.remove_column(reduced.column_labels().index(label))
    reduced.write_to_file(str(tmp_path / "i.mtz"))
    from_i = heights(anomalous.peak_heights_from_mtz(tmp_path / "i.mtz", pdb))
    from_f = heights(anomalous.peak_heights_from_mtz(mtz, pdb))
    for site in ("IOD204:I", "IOD205:I", "IOD206:I"):
        assert abs(from_i[site] - from_f[site]) < 0.7


@pytest.mark.realdata
def test_elements_choose_the_sites(shared):
    mtz, pdb = shared / "data/hewl_nai/dials_merged.mtz", shared / "data/hewl_nai/9b7c.pdb"
    peaks = anomalous.peak_heights_from_mtz(mtz, pdb, elements=["I"])
    assert {p.label for p in peaks} == {"A/IOD204:I", "A/IOD205:I", "A/IOD206:I"}
    with pytest.raises(UserError, match="unknown element 'Qq'"):
        anomalous.peak_heights_from_mtz(mtz, pdb, elements=["Qq"])


def test_alternate_conformers_are_one_site(model):
    (sulfur,) = [s for s in model.sites if s.residue == "CYS"]
    assert sulfur.fractional.shape == (2, 3)


def test_a_model_without_scatterers_has_no_peaks_and_says_so(toy, tmp_path, caplog):
    path = tmp_path / "light.pdb"
    toy_structure(with_heavy=False).write_pdb(str(path))
    light = anomalous.AnomalousModel(path, CELL, SPACE_GROUP, D_MIN)
    assert light.peak_heights(toy["hkl"], *toy["data"]) == []
    assert "no anomalous scatterer" in light.why_no_sites
    assert "no anomalous scatterer" in caplog.text


@pytest.mark.parametrize(
    ("cell", "group", "message"),
    [
        (
            (31.6, 37, 43, 90, 90, 90),
            "P 21 21 21",
            r"cell 31 37 43.*data have 31\.6 37 43.*1\.5 %",
        ),
        ((31, 37, 43, 90, 92, 90), "P 21 21 21", "1.5 degrees"),
        (
            (31, 37, 43, 90, 90, 90),
            "P 2 2 2",
            "space group P 21 21 21 but the data are in P 2 2 2",
        ),
    ],
)
def test_a_model_of_another_crystal_is_refused(toy, cell, group, message):
    with pytest.raises(UserError, match=message):
        anomalous.AnomalousModel(
            toy["path"], gemmi.UnitCell(*cell), gemmi.SpaceGroup(group), D_MIN
        )


def test_a_cell_within_tolerance_is_accepted(toy):
    cell = gemmi.UnitCell(31.2, 37.1, 43.0, 90, 90, 90)
    near = anomalous.AnomalousModel(toy["path"], cell, SPACE_GROUP, D_MIN)
    hkl = gemmi.make_miller_array(cell, SPACE_GROUP, D_MIN)
    assert np.isfinite(near.phases(hkl)).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "has no atoms|cannot be read"),
        (
            "ATOM      1  CA  GLY A   1      11.000  12.000  13.000  1.00 10.00           C\n",
            "unit cell",
        ),
    ],
)
def test_useless_models_are_user_errors(tmp_path, text, message):
    path = tmp_path / "model.pdb"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        anomalous.AnomalousModel(path, CELL, SPACE_GROUP, D_MIN)


@pytest.mark.realdata
def test_merged_friedel_mates_are_a_user_error(shared, tmp_path):
    mtz = gemmi.read_mtz_file(str(shared / "data/hewl_nai/dials_merged.mtz"))
    for label in [c for c in mtz.column_labels() if "(" in c]:
        mtz.remove_column(mtz.column_labels().index(label))
    mtz.write_to_file(str(tmp_path / "mean.mtz"))
    with pytest.raises(UserError, match="no Bijvoet differences"):
        anomalous.peak_heights_from_mtz(tmp_path / "mean.mtz", shared / "data/hewl_nai/9b7c.pdb")


def test_phases_are_computed_once(toy, model, monkeypatch):
    """Every epoch is scored: the model must not be looked at again."""

    def again(*_):
        raise AssertionError("structure factors computed again")

    monkeypatch.setattr(anomalous, "structure_factors", again)
    assert heights(model.peak_heights(toy["hkl"], *toy["data"]))["IOD204:I"] > 15
