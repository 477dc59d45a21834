"""`braggflux merge --prior-model` from files to files, and references that cannot be used."""

from __future__ import annotations

import csv
import json

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines import cli
from braggflux.pipelines.maps.atomic_model import structure_factors
from braggflux.pipelines.maps.reference_amplitudes import reference_amplitudes

CELL = gemmi.UnitCell(40, 50, 60, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")
D_MIN = 4.0
FAST = ("--epochs", "20", "--set", "network_width=0", "--batch-size", "none")


def structure(n_atoms=150, cell=CELL, group=SPACE_GROUP):
    """Return a model of carbon atoms at random places."""
    rng = np.random.default_rng(2)
    chain = gemmi.Chain("A")
    for k in range(n_atoms):
        residue, atom = gemmi.Residue(), gemmi.Atom()
        residue.name, residue.seqid = "UNK", gemmi.SeqId(k + 1, " ")
        atom.name, atom.element, atom.b_iso = "C", gemmi.Element("C"), 20.0
        atom.pos = cell.orthogonalize(gemmi.Fractional(*rng.random(3)))
        residue.add_atom(atom)
        chain.add_residue(residue)
    model = gemmi.Model(1)
    model.add_chain(chain)
    made = gemmi.Structure()
    made.add_model(model)
    made.cell, made.spacegroup_hm = cell, group.hm
    made.setup_entities()
    return made


def write_amplitudes(path, hkl, columns, cell=CELL, group=SPACE_GROUP):
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup = group
    mtz.set_cell_for_all(cell)
    mtz.add_dataset("d").wavelength = 1.0
    for label, (kind, _) in columns.items():
        mtz.add_column(label, kind)
    mtz.set_data(np.column_stack([hkl, *(v for _, v in columns.values())]).astype(np.float32))
    mtz.write_to_file(str(path))
    return path


@pytest.fixture(scope="module")
def calculated():
    """Asymmetric unit with mates, and |F_calc| of its rows."""
    asu = ReciprocalAsu(CELL, SPACE_GROUP, D_MIN, True)
    hkl, value = structure_factors(structure(), 0.99 * D_MIN)
    amplitude = np.full(len(asu), np.nan)
    for sign in (1, -1):
        row = asu.refl_id(sign * hkl)
        amplitude[row[row >= 0]] = np.abs(value)[row >= 0]
    return asu, amplitude


def write_unmerged(path, asu, f, noise, seed=0):
    rng = np.random.default_rng(seed)
    row = rng.integers(0, len(asu), 4 * len(asu))
    image = np.sort(rng.integers(0, 12, len(row)))
    x, y = rng.uniform(0, 1000, (2, len(row)))
    columns = {
        "I": ("J", f[row] ** 2 + noise * rng.standard_normal(len(row))),
        "SIGI": ("Q", np.full(len(row), noise)),
        "BATCH": ("B", image + 1),
        "X": ("R", x),
        "Y": ("R", y),
    }
    return write_amplitudes(path, asu.miller_index[row], columns)


def test_amplitudes_of_a_structure_and_of_an_mtz_are_those_of_gemmi(tmp_path, calculated):
    asu, wanted = calculated
    structure().write_pdb(str(tmp_path / "m.pdb"))
    # coordinates of a PDB file have three digits
    got = reference_amplitudes(tmp_path / "m.pdb", [asu])
    assert np.isfinite(got).all()
    assert np.corrcoef(got, wanted)[0, 1] > 0.9999
    np.testing.assert_array_equal(got, got[asu.friedel_mate])
    plus = asu.friedel_sign > 0
    columns = {
        "FC": ("F", wanted[plus]),
        "FMODEL": ("F", 2 * wanted[plus]),
        "PHIC": ("P", np.zeros(plus.sum())),
    }
    path = write_amplitudes(tmp_path / "m.mtz", asu.miller_index[plus], columns)
    np.testing.assert_allclose(reference_amplitudes(path, [asu]), 2 * wanted, rtol=1e-5)
    other = ReciprocalAsu(CELL, SPACE_GROUP, 3.0, False)
    both = reference_amplitudes(path, [asu, other])
    assert len(both) == len(asu) + len(other)
    np.testing.assert_array_equal(
        np.isfinite(both[len(asu) :]), asu.refl_id(other.miller_index) >= 0
    )


@pytest.mark.slow
def test_reference_from_file_to_file(tmp_path, calculated):
    """The model is the truth but for a fifth of the intensity: sigma_A is 0.9."""
    asu, f_calc = calculated
    rng = np.random.default_rng(3)
    rest = np.where(
        asu.is_centric,
        rng.standard_normal(len(asu)),
        (rng.standard_normal(len(asu)) + 1j * rng.standard_normal(len(asu))) / 2**0.5,
    )
    spread = np.sqrt(asu.epsilon * np.interp(asu.d, *_mean_square(asu, f_calc)))
    f = np.abs(0.9 * f_calc + 0.19**0.5 * spread * rest)
    data = write_unmerged(tmp_path / "a.mtz", asu, f, 2.0 * np.mean(f**2))
    structure().write_pdb(str(tmp_path / "m.pdb"))
    runs = {"plain": (), "with": ("--prior-model", str(tmp_path / "m.pdb"))}
    correlation = {}
    for name, more in runs.items():
        command = ["merge", str(data), "--out", str(tmp_path / name), "--anomalous", *FAST, *more]
        assert cli.main(command) == 0
        table = read_merged_mtz(tmp_path / name / "merged.mtz").table
        truth = f[asu.refl_id(table.miller_index)]
        seen = np.isfinite(table.f_plus)
        correlation[name] = np.corrcoef(table.f_plus[seen], truth[seen])[0, 1]
    assert correlation["with"] > correlation["plain"] + 0.02
    with (tmp_path / "with" / "sigma_a.csv").open() as stream:
        shells = list(csv.DictReader(stream))
    assert np.mean([float(s["sigma_a"]) for s in shells]) == pytest.approx(0.9, abs=0.08)
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in runs]
    assert metrics[0]["sigma_a"] is None
    assert len(metrics[1]["sigma_a"]) == len(shells) == 10
    assert metrics[1]["anisotropic_b"][0][1] == pytest.approx(0.0, abs=1e-9)
    inputs = json.loads((tmp_path / "with" / "provenance.json").read_text())["inputs"]
    assert "prior_model" in str(inputs)
    better = metrics[1]["held_out"]["observation"]["log_likelihood"]
    assert better > metrics[0]["held_out"]["observation"]["log_likelihood"]


@pytest.mark.slow
def test_reference_with_double_wilson(tmp_path, calculated):
    """The root dataset takes the model, its child the parent; both get closer to the truth."""
    asu, f_calc = calculated
    rng = np.random.default_rng(4)
    light = f_calc * (1 + 0.03 * rng.standard_normal(len(asu)))
    noise = 2.0 * np.mean(f_calc**2)
    paths = [
        str(write_unmerged(tmp_path / f"{name}.mtz", asu, f, noise, seed))
        for seed, (name, f) in enumerate({"dark": f_calc, "light": light}.items())
    ]
    structure().write_pdb(str(tmp_path / "m.pdb"))
    common = ("--parents", "none,0", "--prior", "double-wilson", "--correlation", "0.99", *FAST)
    correlation = {}
    for name, more in (("plain", ()), ("with", ("--prior-model", str(tmp_path / "m.pdb")))):
        assert cli.main(["merge", *paths, "--out", str(tmp_path / name), *common, *more]) == 0
        for dataset, f in (("dark", f_calc), ("light", light)):
            table = read_merged_mtz(tmp_path / name / f"{dataset}_merged.mtz").table
            truth = f[asu.refl_id(table.miller_index)]
            correlation[name, dataset] = np.corrcoef(table.f, truth)[0, 1]
    for dataset in ("dark", "light"):
        assert correlation["with", dataset] > correlation["plain", dataset] + 0.01


def _mean_square(asu, f):
    """Mean of F^2 / epsilon against d in shells, for interpolation."""
    order = np.argsort(asu.d)
    parts = np.array_split(order, 8)
    return [asu.d[p].mean() for p in parts], [(f[p] ** 2 / asu.epsilon[p]).mean() for p in parts]


def bad_reference(kind, tmp_path, asu, f):
    pdb, mtz = tmp_path / "m.pdb", tmp_path / "m.mtz"
    plus = asu.friedel_sign > 0
    hkl, columns = asu.miller_index[plus], {"FC": ("F", f[plus])}
    if kind == "cell":
        structure(cell=gemmi.UnitCell(42, 50, 60, 90, 90, 90)).write_pdb(str(pdb))
    elif kind == "space group":
        structure(group=gemmi.SpaceGroup("P 21 21 2")).write_pdb(str(pdb))
    elif kind == "no atoms":
        pdb.write_text("CRYST1   40.000   50.000   60.000  90.00  90.00  90.00 P 21 21 21\nEND\n")
    elif kind == "MTZ cell":
        return write_amplitudes(mtz, hkl, columns, gemmi.UnitCell(40, 50, 64, 90, 90, 90))
    elif kind == "MTZ space group":
        return write_amplitudes(mtz, hkl, columns, group=gemmi.SpaceGroup("P 2 2 2"))
    elif kind == "no amplitudes":
        return write_amplitudes(mtz, hkl, {"I": ("J", f[plus]), "SIGI": ("Q", f[plus])})
    elif kind == "unknown labels":
        return write_amplitudes(mtz, hkl, dict.fromkeys(("ONE", "TWO"), ("F", f[plus])))
    elif kind == "nothing in common":
        return write_amplitudes(mtz, hkl[:40], {"FC": ("F", np.full(40, np.nan))})
    elif kind == "unmerged":
        return write_unmerged(mtz, asu, f, 1.0)
    return pdb


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "does not exist"),
        ("cell", "has the cell"),
        ("space group", "space group"),
        ("no atoms", "no atoms"),
        ("MTZ cell", "has the cell"),
        ("MTZ space group", "space group"),
        ("no amplitudes", "no column of amplitudes"),
        ("unknown labels", "several columns of amplitudes (ONE TWO)"),
        ("nothing in common", "no reflection in common"),
        ("unmerged", "unmerged"),
    ],
)
def test_unusable_references(kind, said, tmp_path, calculated, capsys):
    asu, f = calculated
    path = bad_reference(kind, tmp_path, asu, f)
    with pytest.raises(UserError) as caught:
        reference_amplitudes(path, [asu])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    if kind != "cell":
        return
    data = write_unmerged(tmp_path / "a.mtz", asu, f, 1.0)
    out = tmp_path / "out"
    assert cli.main(["merge", str(data), "--out", str(out), "--prior-model", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("braggflux: error: ")
    assert not out.exists()
