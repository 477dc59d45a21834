"""`braggflux merge` from files to files, and what it says of unusable ones."""

from __future__ import annotations

import csv
import json

import gemmi
import numpy as np
import pytest
import reciprocalspaceship as rs

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.mtz import read_merged_mtz, write_merged_mtz
from braggflux.pipelines import cli
from braggflux.pipelines.workspace.outputs import (
    MERGE_RESULTS,
    UNFINISHED,
    complete_merge,
    require_free_folder,
)

CELL = gemmi.UnitCell(40, 50, 60, 90, 90, 90)
SPACE_GROUP = gemmi.SpaceGroup("P 21 21 21")
FAST = ("--epochs", "30", "--set", "network_width=8")


def write_mtz(path, columns, hkl, *, cell=CELL, batches=True):
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup = SPACE_GROUP
    mtz.set_cell_for_all(cell)
    mtz.add_dataset("d").wavelength = 1.0
    for label, (kind, _) in columns.items():
        mtz.add_column(label, kind)
    values = [values for _, values in columns.values()]
    mtz.set_data(np.column_stack([hkl, *values]).astype(np.float32))
    mtz.write_to_file(str(path))
    return path


@pytest.fixture
def truth():
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 4.0, True)
    rng = np.random.default_rng(5)
    f = np.sqrt(rng.exponential(1000.0, len(asu)) * asu.epsilon)
    minus = asu.friedel_sign < 0
    f[minus] = f[asu.friedel_mate[minus]] * (1 + 0.05 * rng.standard_normal(minus.sum()))
    return asu, f


def observed(truth, seed, n_images=20, n_per_image=300):
    asu, f = truth
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(n_images), n_per_image)
    row = rng.integers(0, len(asu), len(image))
    x, y = rng.uniform(0, 1000, (2, len(image)))
    mean = np.exp(0.3 * np.sin(image / 3)) * f[row] ** 2
    sigma = np.full(len(image), 15.0)
    columns = {
        "I": ("J", mean + sigma * rng.standard_normal(len(image))),
        "SIGI": ("Q", sigma),
        "BATCH": ("B", image + 1),
        "X": ("R", x),
        "Y": ("R", y),
    }
    return columns, asu.miller_index[row]


def run(*argv):
    return cli.main(["merge", *(str(a) for a in argv)])


def test_rotation_data_to_merged_files(tmp_path, truth):
    path = write_mtz(tmp_path / "a.mtz", *observed(truth, 0))
    out = tmp_path / "out"
    assert run(path, "--out", out, "--anomalous", *FAST, "--half-set-repeats", "2") == 0
    asu, f = truth
    table = read_merged_mtz(out / "merged.mtz").table
    plus = f[asu.refl_id(table.miller_index)]
    seen = np.isfinite(table.f_plus) & (plus > 15)
    assert np.corrcoef(table.f_plus[seen], plus[seen])[0, 1] > 0.99
    labels = gemmi.read_mtz_file(str(out / "merged.mtz")).column_labels()
    assert {"F(+)", "F(-)", "E", "N(+)"} <= set(labels)
    halves = gemmi.read_mtz_file(str(out / "half_sets.mtz"))
    first, third = (np.array(halves.column_with_label(n)) for n in ("F1", "F3"))
    both = np.isfinite(first) & np.isfinite(third)
    assert np.mean(first[both] != third[both]) > 0.5, "repeats must differ"
    mtz = gemmi.read_mtz_file(str(out / "merged.mtz"))
    e2 = np.nanmean(np.array(mtz.column_with_label("E")) ** 2)
    assert 0.85 < e2 < 1.15
    record = json.loads((out / "provenance.json").read_text())
    assert record["started"] <= record["ended"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["held_out"]["image"]["cc_pred"] > 0.9
    assert metrics["held_out"]["observation"]["cc_pred"] > 0.95
    with (out / "statistics.csv").open() as stream:
        overall = list(csv.DictReader(stream))[-1]
    assert float(overall["cc_half"]) > 0.98
    assert 0.6 < float(overall["z_spread"]) < 1.4
    assert {p.name for p in out.iterdir()} == {
        *("merged.mtz", "half_sets.mtz", "statistics.csv", "metrics.json", "run.log"),
        *("config.yaml", "provenance.json", "scale_model.pt", "correlation.csv"),
        *("unmerged.mtz", "images.csv", "report.html"),
        *("table1.txt", "table1.csv", "table1.tex", "deposition.cif"),
    }
    with (out / "images.csv").open() as stream:
        images = list(csv.DictReader(stream))
    assert len(images) == 20
    assert np.median([float(row["scale"]) for row in images]) == pytest.approx(1, abs=0.02)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Scale, B, R and I/σ against image" in page
    assert "maps need the phases of a model; give one" in page


def column(mtz, label):
    return np.array(mtz.column_with_label(label))


@pytest.mark.parametrize("flags", [("--anomalous",), ()])
def test_columns_of_the_merged_file(tmp_path, truth, flags):
    """Labels and types by gemmi and by reciprocalspaceship; N, E and I mean what they say."""
    path = write_mtz(tmp_path / "a.mtz", *observed(truth, 0, 10))
    out = tmp_path / "out"
    common = ("--epochs", "3", "--set", "held_out=0", "--half-set-repeats", "3")
    assert run(path, "--out", out, *flags, *common) == 0
    mtz = gemmi.read_mtz_file(str(out / "merged.mtz"))
    types = {c.label: c.type for c in mtz.columns}
    wanted = {"F": "F", "SIGF": "Q", "IMEAN": "J", "SIGIMEAN": "Q", "E": "E"}
    halves = {f"{p}F{k}": t for k in range(1, 7) for p, t in (("", "F"), ("SIG", "Q"))}
    if flags:
        wanted |= {"DANO": "D", "SIGDANO": "Q", "FOMDANO": "W"}
        for name, value, sigma in (("F", "G", "L"), ("I", "K", "M")):
            wanted |= {f"{name}({m})": value for m in "+-"}
            wanted |= {f"SIG{name}({m})": sigma for m in "+-"}
        halves |= {f"F{k}({m})": "G" for k in range(1, 7) for m in "+-"}
        halves |= {f"SIGF{k}({m})": "L" for k in range(1, 7) for m in "+-"}
    counts = ("N(+)", "N(-)") if flags else ("N",)
    wanted |= dict.fromkeys(counts, "R") | {"FreeR_flag": "I"}
    assert types == wanted | dict.fromkeys("HKL", "H")
    apart = gemmi.read_mtz_file(str(out / "half_sets.mtz"))
    assert {c.label: c.type for c in apart.columns} == halves | dict.fromkeys("HKL", "H")
    assert apart.nreflections == mtz.nreflections
    n_obs = 10 * 300
    assert np.nansum([column(mtz, name) for name in counts]) == n_obs
    data = rs.read_mtz(str(out / "merged.mtz"))
    assert str(data.dtypes["IMEAN"]) == "Intensity"
    assert str(data.dtypes["E"]) == "NormalizedSFAmplitude"
    assert str(data.dtypes[counts[0]]) == "MTZReal"  # integers look like flags of R_free
    strong = column(mtz, "IMEAN") > 10 * column(mtz, "SIGIMEAN")
    ratio = column(mtz, "F")[strong] ** 2 / column(mtz, "IMEAN")[strong]
    assert np.median(ratio) == pytest.approx(1.0, abs=0.02)


def test_half_sets_are_of_different_splits_and_their_statistics_averaged(tmp_path, truth):
    path = write_mtz(tmp_path / "a.mtz", *observed(truth, 0, 10))
    common = ("--epochs", "3", "--set", "held_out=0")
    assert run(path, "--out", tmp_path / "three", *common, "--half-set-repeats", "3") == 0
    mtz = gemmi.read_mtz_file(str(tmp_path / "three" / "half_sets.mtz"))
    pairs = [(column(mtz, f"F{k}"), column(mtz, f"F{k + 1}")) for k in (1, 3, 5)]
    correlations = []
    for first, second in pairs:
        both = np.isfinite(first) & np.isfinite(second)
        correlations.append(np.corrcoef(first[both], second[both])[0, 1])
    assert len(set(correlations)) == 3
    for other in pairs[1:]:
        # neither the same halves nor the same in the other order
        assert all(np.mean(pairs[0][0] == half) < 0.3 for half in other)
    with (tmp_path / "three" / "statistics.csv").open() as stream:
        overall = list(csv.DictReader(stream))[-1]
    assert float(overall["cc_half"]) == pytest.approx(np.mean(correlations), abs=1e-4)


@pytest.mark.slow
def test_same_seed_same_file(tmp_path, truth):
    path = write_mtz(tmp_path / "a.mtz", *observed(truth, 0, 8))
    for name in ("one", "two"):
        assert run(path, "--out", tmp_path / name, *FAST) == 0
    one, two = (read_merged_mtz(tmp_path / n / "merged.mtz").table for n in ("one", "two"))
    np.testing.assert_array_equal(one.f, two.f)


@pytest.mark.slow
def test_datasets_with_parents(tmp_path, truth):
    asu, f = truth
    light = asu, np.abs(f + 0.03 * f * np.random.default_rng(1).standard_normal(len(f)))
    paths = [
        write_mtz(tmp_path / f"{name}.mtz", *observed(t, 3))
        for name, t in (("dark", truth), ("light", light))
    ]
    out = tmp_path / "out"
    common = ("--parents", "none,0", "--prior", "double-wilson", "--out", out, *FAST)
    assert run(*paths, *common) == 0
    dark, light_out = (read_merged_mtz(out / f"{n}_merged.mtz").table for n in ("dark", "light"))
    assert len(dark) > 100
    assert len(light_out) > 100
    with (out / "correlation.csv").open() as stream:
        shells = {row["shell"] for row in csv.DictReader(stream)}
    assert shells == {str(k) for k in range(10)}


@pytest.mark.slow
def test_friedel_halves_of_stills(tmp_path, truth):
    asu, _ = truth
    columns, hkl = observed(truth, 4, n_images=40)
    sign = asu.friedel_sign[asu.refl_id(hkl)]
    paths = [
        write_mtz(
            tmp_path / f"{name}.mtz",
            {label: (kind, v[sign == s]) for label, (kind, v) in columns.items()},
            hkl[sign == s],
        )
        for name, s in (("plus", 1), ("minus", -1))
    ]
    assert run(*paths, "--friedel", "--stills", "--out", tmp_path / "out", *FAST) == 0
    table = read_merged_mtz(tmp_path / "out" / "merged.mtz").table
    assert np.isfinite(table.f_plus).sum() > 100
    assert np.isfinite(table.f_minus).sum() > 100


@pytest.mark.slow
def test_datasets_of_one_name_do_not_overwrite_each_other(tmp_path, truth):
    paths = []
    for seed, folder in enumerate(("dark", "light")):
        (tmp_path / folder).mkdir()
        paths.append(write_mtz(tmp_path / folder / "scaled.mtz", *observed(truth, seed, 8)))
    assert run(*paths, "--out", tmp_path / "out", *FAST) == 0
    written = {p.name for p in (tmp_path / "out").glob("scaled*")}
    kinds = ("merged.mtz", "unmerged.mtz", "half_sets.mtz", "statistics.csv", "deposition.cif")
    kinds += ("table1.txt", "table1.csv", "table1.tex")
    assert written == {f"scaled_{k}_{kind}" for k in (0, 1) for kind in kinds}


def without(columns, *names):
    return {k: v for k, v in columns.items() if k not in names}


@pytest.fixture
def good(tmp_path, truth):
    return write_mtz(tmp_path / "good.mtz", *observed(truth, 0, 6))


def bad_input(kind, tmp_path, truth, good):
    columns, hkl = observed(truth, 0, 6)
    path = tmp_path / "bad.mtz"
    if kind == "no intensity":
        return [write_mtz(path, without(columns, "I", "SIGI"), hkl)]
    if kind == "zero sigmas":
        return [write_mtz(path, columns | {"SIGI": ("Q", np.zeros(len(hkl)))}, hkl)]
    if kind == "merged":
        return [write_mtz(path, without(columns, "BATCH"), hkl)]
    if kind == "cells":
        return [good, write_mtz(path, columns, hkl, cell=gemmi.UnitCell(44, 50, 60, 90, 90, 90))]
    if kind == "metadata":
        return [good, "--metadata", "nonsense"]
    if kind == "own parent":
        return [good, write_mtz(path, *observed(truth, 1, 6)), "--parents", "none,1"]
    if kind == "no wavelength":
        return [good, "--laue"]
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:5000])
        return [path]
    if kind == "empty stream":
        path = tmp_path / "bad.stream"
        path.write_text("CrystFEL stream format 2.3\n")
        return [path]
    if kind == "one friedel half":
        return [good, "--friedel"]
    return [good, "--prior", "double-wilson"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no intensity", "intensit"),
        ("zero sigmas", "sigmas are 0"),
        ("merged", "is merged"),
        ("cells", "cells of"),
        ("metadata", "unknown metadata nonsense"),
        ("own parent", "own parent"),
        ("no wavelength", "wavelength"),
        ("truncated", "complete MTZ"),
        ("empty stream", "bad.stream"),
        ("one friedel half", "PLUS.mtz MINUS.mtz"),
        ("nothing to couple", "--parents"),
    ],
)
def test_wrong_input_is_one_line(kind, said, tmp_path, truth, good, capsys):
    assert run(*bad_input(kind, tmp_path, truth, good), "--out", tmp_path / "out", *FAST) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("braggflux: error: ")
    assert said in error
    assert not list(tmp_path.glob("out/*.mtz"))


@pytest.mark.slow
@pytest.mark.parametrize("failure", [UserError("no room"), KeyboardInterrupt()])
def test_a_merge_that_stops_leaves_no_result_and_can_be_repeated(
    tmp_path, truth, monkeypatch, failure
):
    path = write_mtz(tmp_path / "a.mtz", *observed(truth, 0))
    out = tmp_path / "out"
    whole = write_merged_mtz

    def half(*args, **kwargs):
        whole(*args, **kwargs)
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr("braggflux.pipelines.workspace.merged_files.write_merged_mtz", half)
        assert run(path, "--out", out, *FAST) in (2, 130)
    assert [p.name for p in out.iterdir()] == ["run.log"]
    (out / ".unfinished").mkdir()  # of a killed one
    (out / ".unfinished" / "old_merged.mtz").touch()
    assert run(path, "--out", out, *FAST) == 0
    assert (out / "merged.mtz").is_file()
    assert not list(out.glob(".*"))
    assert json.loads((out / "provenance.json").read_text())["ended"]


def test_a_merge_killed_while_it_moved_its_files_is_completed(tmp_path):
    """Its record goes last; without an end in it, what is there counts for nothing."""
    unfinished = tmp_path / UNFINISHED
    for ended in (None, "now"):
        unfinished.mkdir(exist_ok=True)
        (unfinished / "provenance.json").write_text(json.dumps({"ended": ended}))
        (unfinished / "images.csv").touch()
        complete_merge(tmp_path)
        moved = {"provenance.json", "images.csv"} if ended else {UNFINISHED}
        assert {p.name for p in tmp_path.iterdir()} == moved
    with pytest.raises(UserError, match="earlier result"):
        require_free_folder(tmp_path, MERGE_RESULTS)
