"""Several data sets in one MTZ file, and what of a file's header goes to the merged one."""

from __future__ import annotations

from pathlib import Path

import gemmi
import mad_files as mad
import numpy as np
import pytest

from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.mtz_observations import read_mtz_datasets
from braggflux.pipelines import cli

FAST = ("--epochs", "20", "--set", "network_width=8", "--anomalous")


def two_wavelengths(path: Path) -> Path:
    """MAD: opposite anomalous signals by the data set of the batches."""
    parts = [
        mad.observe(mad.truth(sign), seed, first_batch=first)
        for sign, seed, first in ((1, 0, 1), (-1, 1, 1001))
    ]
    mtz = mad.empty_mtz()
    mad.add_dataset(mtz, ("proj", "xtal", "PEAK"), mad.PEAK, range(1, 21))
    mad.add_dataset(mtz, ("proj", "xtal", "HREM"), mad.REMOTE, range(1001, 1021))
    return mad.write(path, mad.joined(*parts), mtz)


def merge(*argv) -> int:
    return cli.main(["merge", *(str(a) for a in argv), *FAST])


@pytest.mark.slow
def test_opposite_anomalous_signals_stay_apart(tmp_path):
    """Merged together they cancel: correlations with the truths are .00; apart they are .99."""
    assert merge(two_wavelengths(tmp_path / "mad.mtz"), "--out", tmp_path / "out") == 0
    for name, sign, wavelength in (("PEAK", 1, mad.PEAK), ("HREM", -1, mad.REMOTE)):
        path = tmp_path / "out" / f"mad_{name}_merged.mtz"
        assert mad.bijvoet_correlation(path, mad.truth(sign)) > 0.97
        merged = gemmi.read_mtz_file(str(path))
        (dataset,) = merged.datasets
        assert dataset.wavelength == pytest.approx(wavelength, abs=1e-5)
        names = (dataset.project_name, dataset.crystal_name, dataset.dataset_name)
        assert names == ("proj", "xtal", name)
        assert merged.title == "title of the file"
        assert (tmp_path / "out" / f"mad_{name}_statistics.csv").is_file()


def test_parents_and_reindex_count_the_data_sets(tmp_path, capsys):
    path = two_wavelengths(tmp_path / "mad.mtz")
    assert merge(path, "--parents", "none,2", "--out", tmp_path / "out") == 2
    assert "parent" in capsys.readouterr().err
    assert merge(path, "--reindex", "2:-h,-k,l", "--out", tmp_path / "out") == 2
    assert "allowed are 0 to 1" in capsys.readouterr().err


def one(path: Path, mtz, rows=None, **options):
    rows = mad.observe(mad.truth(), 0, n_images=10, n_per_image=50) if rows is None else rows
    return read_mtz_datasets(mad.write(path, rows, mtz, **options))


def with_datasets(*datasets):
    """File of 10 batches shared out among data sets (names, wavelength, batches, options)."""
    mtz = mad.empty_mtz()
    for names, wavelength, batches, options in datasets:
        mad.add_dataset(mtz, names, wavelength, batches, **options)
    return mtz


HALVES = (range(1, 6), range(6, 11))


@pytest.mark.parametrize(
    ("kind", "datasets", "expected"),
    [
        (
            "sweeps of one name and wavelength are one data set",
            [(("p", "x", "d"), 0.9793, HALVES[0], {}), (("p", "x", "d"), 0.97932, HALVES[1], {})],
            {"a": 0.97931},
        ),
        (
            "crystals are apart though their wavelengths agree",
            [(("p", "native", "d"), 1.0, HALVES[0], {}), (("p", "Hg", "d"), 1.0, HALVES[1], {})],
            {"a_native_d": 1.0, "a_Hg_d": 1.0},
        ),
        (
            "wavelengths are apart though their names agree",
            [(("p", "x", "d"), 0.9793, HALVES[0], {}), (("p", "x", "d"), 0.9795, HALVES[1], {})],
            {"a_WAVE1": 0.9793, "a_WAVE2": 0.9795},
        ),
        (
            "wavelengths of the batches where the data set has none",
            [
                (
                    ("p", "x", "d"),
                    0.0,
                    range(1, 11),
                    {"batch_wavelength": np.repeat([0.98, 1.02], 5)},
                )
            ],
            {"a_WAVE1": 0.98, "a_WAVE2": 1.02},
        ),
        (
            "each frame has its own energy",
            [
                (
                    ("p", "x", "d"),
                    1.0,
                    range(1, 11),
                    {"batch_wavelength": 1 + 2e-3 * np.sin(np.arange(10))},
                )
            ],
            {"a": 1.0},
        ),
        (
            "each still has a data set of its own",
            [(("p", "x", f"d{k}"), 1 + 2e-3 * np.sin(k), [k], {}) for k in range(1, 11)],
            {"a": 1.0},
        ),
        (
            "the batches contradict the data set",
            [(("p", "x", "d"), 0.9793, range(1, 11), {"batch_wavelength": 1.5})],
            {"a": 0.9793},
        ),
        ("no headers of batches", [(("p", "x", "d"), 0.9793, (), {})], {"a": 0.9793}),
        ("no wavelength at all", [(("p", "x", "d"), 0.0, range(1, 11), {})], {"a": None}),
    ],
)
def test_which_batches_belong_together(kind, datasets, expected, tmp_path):
    found = {
        d.name: d.labels.wavelength for d in one(tmp_path / "a.mtz", with_datasets(*datasets))
    }
    assert found.keys() == expected.keys(), kind
    for name, wavelength in expected.items():
        tolerance = 2e-3 if "each" in kind else 1e-5
        assert found[name] == pytest.approx(wavelength, abs=tolerance), kind


def test_images_of_each_data_set_are_counted_from_0(tmp_path):
    mtz = with_datasets(
        (("p", "x", "a"), 0.98, HALVES[0], {}), (("p", "x", "b"), 1.0, HALVES[1], {})
    )
    parts = one(tmp_path / "a.mtz", mtz)
    assert [part.n_images for part in parts] == [5, 5]
    assert [set(p.metadata["BATCH"]) for p in parts] == [set(half) for half in HALVES]
    assert sum(len(part) for part in parts) == 500


def test_headers_that_name_the_base_mean_the_only_data_set(tmp_path):
    mtz = with_datasets((("p", "x", "d"), 0.9793, range(1, 11), {}))
    for batch in mtz.batches:
        batch.dataset_id = 0
    (data,) = one(tmp_path / "a.mtz", mtz)
    assert tuple(data.labels.names) == ("p", "x", "d")
    assert data.labels.wavelength == pytest.approx(0.9793)


def test_two_wavelengths_without_headers_are_refused(tmp_path):
    """All columns in one data set, as CCP4's programs write them, do not say whose a row is."""
    mtz = with_datasets((("p", "x", "a"), 0.98, (), {}), (("p", "x", "b"), 1.0, (), {}))
    reason = r"a 0\.98000 A, b 1\.00000 A.*no batch headers"
    with pytest.raises(UserError, match=reason):
        one(tmp_path / "a.mtz", mtz)
    read = gemmi.read_mtz_file(str(tmp_path / "a.mtz"))
    for column in read.columns:
        column.dataset_id = 0
    read.write_to_file(str(tmp_path / "b.mtz"))
    with pytest.raises(UserError, match=reason):
        read_mtz_datasets(tmp_path / "b.mtz")
    for column in read.columns:
        column.dataset_id = read.datasets[1 + (column.label in ("I", "SIGI"))].id
    read.write_to_file(str(tmp_path / "c.mtz"))
    (data,) = read_mtz_datasets(tmp_path / "c.mtz")  # each has columns of its own
    assert data.labels.names.dataset == "b"


def test_batches_without_headers_belong_to_their_neighbours(tmp_path, caplog):
    """Not to the data set of the columns, whose anomalous signal is another."""
    known = [k for k in range(1, 11) if k not in (3, 8)]
    names = [("p", "x", "a"), ("p", "x", "b")]
    shared = [[k for k in known if k in half] for half in HALVES]
    mtz = with_datasets((names[0], 0.98, shared[0], {}), (names[1], 1.02, shared[1], {}))
    found = one(tmp_path / "a.mtz", mtz)
    batches = {d.name: sorted(set(d.metadata["BATCH"].astype(int))) for d in found}
    assert batches == {"a_a": [1, 2, 3, 4, 5], "a_b": [6, 7, 8, 9, 10]}
    assert "2 batches without headers" in caplog.text


@pytest.mark.parametrize("lost", [1, 5, 6, 10])
def test_batches_between_data_sets_without_headers_are_refused(lost, tmp_path):
    shared = [[k for k in half if k != lost] for half in HALVES]
    mtz = with_datasets(
        (("p", "x", "a"), 0.98, shared[0], {}), (("p", "x", "b"), 1.02, shared[1], {})
    )
    with pytest.raises(UserError, match=f"batch {lost} has no header"):
        one(tmp_path / "a.mtz", mtz)


def test_the_cell_is_that_of_the_data_set(tmp_path):
    cell = gemmi.UnitCell(40.2, 50.3, 60.4, 90, 90, 90)
    mtz = with_datasets((("p", "x", "d"), 0.98, range(1, 11), {"cell": cell}))
    (data,) = one(tmp_path / "a.mtz", mtz)
    assert data.cell.parameters == pytest.approx(cell.parameters, abs=1e-3)


LARGER = gemmi.UnitCell(40, 50, 63.6, 90, 90, 90)


def test_crystal_forms_in_data_sets_are_refused(tmp_path):
    mtz = with_datasets(
        (("p", "x", "a"), 1.0, HALVES[0], {}), (("p", "y", "b"), 1.0, HALVES[1], {"cell": LARGER})
    )
    with pytest.raises(UserError, match=r"mixes crystal forms .*60\.00.*63\.60"):
        one(tmp_path / "a.mtz", mtz)


@pytest.mark.parametrize(
    ("lengths", "is_refused"),
    [
        (np.repeat([60.0, 63.6], 5), True),
        (np.repeat([60.0, 61.2], 5), False),
        (60.0 + 0.4 * np.sin(np.arange(10)), False),
    ],
)
def test_crystal_forms_in_batches(lengths, is_refused, tmp_path):
    mtz = with_datasets((("p", "x", "a"), 1.0, range(1, 11), {}))
    for batch, length in zip(mtz.batches, lengths, strict=True):
        for k, value in enumerate((40, 50, length, 90, 90, 90)):
            batch.floats[k] = float(value)
    if is_refused:
        with pytest.raises(UserError, match=r"60\.00 .*5 batches.*63\.60 .*5 batches"):
            one(tmp_path / "a.mtz", mtz)
        return
    assert len(one(tmp_path / "a.mtz", mtz)) == 1


@pytest.mark.parametrize("rows_at_a_time", [10_000_000, 1000])
def test_a_store_holds_one_data_set_and_its_labels(tmp_path, rows_at_a_time):
    from braggflux.merge.io.stores.store_conversion import convert_to_store
    from braggflux.merge.io.stores.unmerged_store import UnmergedStore

    mad_file, target = two_wavelengths(tmp_path / "mad.mtz"), tmp_path / "mad.h5"
    with pytest.raises(UserError, match=r"2 data sets \(.*PEAK, .*HREM\)"):
        convert_to_store(mad_file, target, rows_at_a_time=rows_at_a_time)
    assert not target.exists()
    mtz = with_datasets((("p", "x", "d"), 0.9793, range(1, 21), {}))
    path = mad.write(tmp_path / "a.mtz", mad.observe(mad.truth(), 0), mtz)
    convert_to_store(path, tmp_path / "a.h5", rows_at_a_time=rows_at_a_time)
    with UnmergedStore(tmp_path / "a.h5") as store:
        assert tuple(store.labels.names) == ("p", "x", "d")
        assert store.labels.title == "title of the file"
        assert store.labels.wavelength == pytest.approx(0.9793)
