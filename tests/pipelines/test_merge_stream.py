"""`braggflux merge` on a store larger than its limit, and with scales of an earlier merge."""

from __future__ import annotations

import csv
import json

import gemmi
import numpy as np
import pytest
from simulated_unmerged import write_mtz

from braggflux.fixtures.stills import stills
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines import cli
from braggflux.pipelines.simulate.stills_store import write_stills

OPTIONS = ("--stills", "--anomalous", "--d-min", "4.0", "--epochs", "20", "--batch-size", "2000")
SMALL = ("--set", "network_width=8", "--set", "stream_training=60000")
STREAMED = ("--set", "stream_above=0")


def run(*argv):
    return cli.main(["merge", *(str(a) for a in argv)])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stills")
    for name, seed in (("first", 0), ("second", 1)):
        write_stills(folder / name, stills(200, d_min=4.0, width=6e-4, seed=seed))
    return folder


@pytest.fixture(scope="module")
def merged(files):
    out = files / "out"
    assert run(files / "first" / "stills.h5", "--out", out, *OPTIONS, *SMALL, *STREAMED) == 0
    return out


def truth_cc(files, out):
    table = read_merged_mtz(out / "merged.mtz").table
    mtz = gemmi.read_mtz_file(str(files / "first" / "truth.mtz"))
    known = {tuple(row[:3].astype(int)): row[3] for row in np.array(mtz)}
    f = np.array([known[tuple(h)] for h in table.miller_index.tolist()])
    seen = np.isfinite(table.f_plus) & (table.n_plus > 2)
    return np.corrcoef(table.f_plus[seen], f[seen])[0, 1]


@pytest.mark.slow
def test_files_are_those_of_a_merge_in_memory(files, merged):
    assert {p.name for p in merged.iterdir()} == {
        *("merged.mtz", "half_sets.mtz", "statistics.csv", "metrics.json", "run.log"),
        *("config.yaml", "provenance.json", "scale_model.pt", "correlation.csv"),
        "report.html",
        *("table1.txt", "table1.csv", "table1.tex", "deposition.cif"),
    }
    assert truth_cc(files, merged) > 0.97
    in_memory = files / "in_memory"
    assert run(files / "first" / "stills.h5", "--out", in_memory, *OPTIONS, *SMALL) == 0
    labels = [
        gemmi.read_mtz_file(str(out / "merged.mtz")).column_labels() for out in (merged, in_memory)
    ]
    assert labels[0] == labels[1]
    first, second = (read_merged_mtz(out / "merged.mtz").table for out in (merged, in_memory))
    np.testing.assert_array_equal(first.miller_index, second.miller_index)
    np.testing.assert_array_equal(first.n_plus, second.n_plus)
    assert np.corrcoef(first.f, second.f)[0, 1] > 0.97
    metrics = json.loads((merged / "metrics.json").read_text())
    assert metrics["held_out"]["observation"]["cc_pred"] > 0.8
    with (merged / "statistics.csv").open() as stream:
        overall = list(csv.DictReader(stream))[-1]
    assert 0 < float(overall["r_split"]) < 0.5
    assert float(overall["cc_half"]) > 0.9
    assert int(overall["n_obs"]) == int(np.nansum(first.n_plus) + np.nansum(first.n_minus))


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False])
def test_new_images_with_the_scales_of_others(files, merged, streamed):
    out = files / f"frozen_{streamed}"
    options = (*OPTIONS, *(STREAMED if streamed else ()), "--freeze-scales", merged)
    assert run(files / "second" / "stills.h5", "--out", out, *options) == 0
    assert truth_cc(files, out) > 0.97
    # intensities of the simulation are on one scale, and so are both merges
    first, second = (read_merged_mtz(o / "merged.mtz").table for o in (merged, out))
    index = {tuple(h): i for i, h in enumerate(first.miller_index.tolist())}
    rows = [index.get(tuple(h), -1) for h in second.miller_index.tolist()]
    ratio = (second.f / first.f[rows])[np.array(rows) >= 0]
    assert np.nanmedian(ratio) == pytest.approx(1.0, abs=0.03)


@pytest.mark.slow
def test_a_model_as_prior(files, merged):
    """The amplitudes that the simulation was made from fit, and the data say so."""
    out, truth = files / "with_model", gemmi.read_mtz_file(str(files / "first" / "truth.mtz"))
    form = {"cell": truth.cell.parameters, "space_group": truth.spacegroup.xhm()}
    columns = {"F": ("F", np.array(truth.column_with_label("F(+)")))}
    reference = write_mtz(files / "f.mtz", truth.make_miller_array(), columns, **form)
    more = ("--freeze-scales", merged, "--prior-model", reference)
    assert run(files / "second" / "stills.h5", "--out", out, *OPTIONS, *STREAMED, *more) == 0
    with (out / "sigma_a.csv").open() as stream:
        assert np.mean([float(row["sigma_a"]) for row in csv.DictReader(stream)]) > 0.9
    assert truth_cc(files, out) > truth_cc(files, merged)


@pytest.mark.slow
def test_mates_coupled_by_half_sets(files, merged):
    """With frozen scales, which is the quick way here."""
    out, alone = files / "coupled", files / "uncoupled"
    options = (*OPTIONS, *STREAMED, "--freeze-scales", merged)
    assert run(files / "first" / "stills.h5", "--out", out, *options) == 0
    options = (*options, "--prior", "wilson")
    assert run(files / "first" / "stills.h5", "--out", alone, *options) == 0
    with (out / "correlation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["shell"] for row in rows} == {str(k) for k in range(10)}
    assert all(float(row["error"]) > 0 for row in rows if row["error"])
    free, tied = (read_merged_mtz(o / "merged.mtz").table for o in (alone, out))
    both = np.isfinite(free.f_plus) & np.isfinite(free.f_minus)
    own = free.f_plus - free.f_minus
    assert not free.has_coupled_differences
    assert np.array_equal(np.isfinite(tied.difference), both)
    assert np.std(tied.difference[both]) < 0.8 * np.std(own[both])
    # each mate from its own observations, whatever ties them
    still_own = (tied.f_plus - tied.f_minus)[both]
    assert np.std(still_own) == pytest.approx(np.std(own[both]), rel=0.1)
    assert np.corrcoef(still_own, own[both])[0, 1] > 0.9
    assert truth_cc(files, out) > 0.97


@pytest.mark.slow
def test_a_scale_model_of_another_kind_is_one_line(files, merged, capsys):
    store = files / "second" / "stills.h5"
    assert run(store, "--out", files / "bad", "--freeze-scales", merged) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("braggflux: error: ")
    assert "was fitted with --stills" in error
    assert run(store, "--out", files / "bad", "--freeze-scales", files) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (files / "bad").exists()
