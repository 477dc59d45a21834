"""Rows that must not be merged: the result is that of the same data without them."""

from __future__ import annotations

import logging

import gemmi
import numpy as np
import pytest
from simulated_unmerged import observed, write_mtz

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.resolution_limit import end_of_data, largest_inv_d2, n_strays
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.merge.io.stores.store_conversion import convert_to_store
from braggflux.merge.io.stores.unmerged_store import UnmergedStore
from braggflux.merge.stream.batches import ObservationStream
from braggflux.pipelines import cli

FORM = {"cell": (40, 50, 60, 90, 90, 90), "space_group": "P 21 21 21"}
FAST = ("--epochs", "4", "--set", "network_width=0", "--set", "held_out=0")


@pytest.fixture(scope="module")
def rows():
    """Indices and columns of good data to 4 A; `dict` so that a test can add rows."""
    cell, group = gemmi.UnitCell(*FORM["cell"]), gemmi.SpaceGroup(FORM["space_group"])
    return observed(ReciprocalAsu(cell, group, 4.0, False), np.random.default_rng(3), 10, 200)


def with_more(rows, hkl, **values):
    """Append rows with the given indices, all else as in the first rows but for ``values``."""
    old, columns = rows
    n = len(hkl)
    added = {
        label: (kind, np.concatenate([v, np.broadcast_to(values.get(label, v[:n]), n)]))
        for label, (kind, v) in columns.items()
    }
    return np.concatenate([old, hkl]), added


def merged(path, out, *options):
    assert cli.main(["merge", str(path), "--out", str(out), *FAST, *options]) == 0
    return read_merged_mtz(out / "merged.mtz").table


def warnings(caplog):
    return " ".join(r.message for r in caplog.records if r.levelno >= logging.WARNING)


def assert_same(one, two):
    np.testing.assert_array_equal(one.miller_index, two.miller_index)
    np.testing.assert_array_equal(one.f, two.f)
    np.testing.assert_array_equal(one.sigma_f, two.sigma_f)
    np.testing.assert_array_equal(one.n_plus, two.n_plus)


STRAYS = {
    "one at 0.6 A": [[60, 20, 30]],
    "one at 0.15 A": [[250, 80, 40]],
    "three at 2.9, 1.1 and 0.2 A": [[8, 14, 8], [30, 20, 20], [140, 150, 150]],
}


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_index_changes_nothing(name, rows, tmp_path, caplog):
    good = merged(write_mtz(tmp_path / "a.mtz", *rows, **FORM), tmp_path / "good")
    assert "lie alone" not in warnings(caplog)
    stray = with_more(rows, np.array(STRAYS[name]))
    with_stray = merged(write_mtz(tmp_path / "b.mtz", *stray, **FORM), tmp_path / "stray")
    assert_same(good, with_stray)
    assert f"{len(STRAYS[name])} of {len(stray[0])} observations lie alone" in warnings(caplog)
    shells = [(tmp_path / n / "statistics.csv").read_text() for n in ("good", "stray")]
    assert shells[0] == shells[1]


def test_stray_indices_and_copies_on_the_way_through_a_store(rows, tmp_path, caplog):
    """Converted copies are gone, and the store read batch by batch ends where the data do."""
    path = write_mtz(tmp_path / "a.mtz", *repeated(rows, slice(None)), **FORM)
    convert_to_store(path, tmp_path / "a.h5")
    with UnmergedStore(tmp_path / "a.h5") as store:
        assert len(store) == len(rows[0])
    stray = with_more(rows, np.array(STRAYS["one at 0.15 A"]))
    convert_to_store(write_mtz(tmp_path / "b.mtz", *stray, **FORM), tmp_path / "b.h5")
    config = MergeConfig(stills=True, stream_above=0)
    with UnmergedStore(tmp_path / "b.h5") as store:
        stream = ObservationStream([store], config)
    assert stream.unique.asus[0].d_min == pytest.approx(4.0, abs=0.02)
    assert stream.n_obs.sum() <= len(rows[0])
    assert "1 of 2001 observations lie alone" in warnings(caplog)


def test_a_given_limit_decides(rows, tmp_path, caplog):
    stray = with_more(rows, np.array([[12, 14, 18]]))  # 2.0 A
    path = write_mtz(tmp_path / "a.mtz", *stray, **FORM)
    table = merged(path, tmp_path / "all", "--d-min", "1.5")
    assert (table.miller_index == [12, 14, 18]).all(1).any()
    assert "lie alone" not in warnings(caplog)


def test_ends_of_real_data_stay():
    """A full sphere, one that fades out as a detector's corners do, and one shell apart."""
    rng = np.random.default_rng(0)
    full = rng.uniform(0, 1, 20_000) ** (2 / 3)
    fading = np.concatenate([full, (1 + 0.7 * (1 - rng.uniform(0, 1, 3000) ** 0.5)) ** (2 / 3)])
    weak = rng.exponential(0.1, 20_000) ** (2 / 3)  # what a cut at 3 sigma leaves at high angle
    apart = np.concatenate([full, rng.uniform(1.3, 1.4, 100) ** (2 / 3)])
    for values in (full, fading, weak, apart, full[:30]):
        assert n_strays(largest_inv_d2([values], len(values)), len(values)) == 0
    pieces = np.array_split(np.concatenate([full, [40.0, 2.0]]), 7)
    assert n_strays(largest_inv_d2(pieces, 20_002), 20_002) == 2
    assert end_of_data(pieces, 20_002, None, "x") == pytest.approx(1.0, abs=1e-3)
    assert end_of_data(pieces, 20_002, 0.1, "x") == pytest.approx(40.0**-0.5, abs=1e-5)


def test_rows_with_the_index_0_0_0_are_no_reflections(rows, tmp_path):
    good = merged(write_mtz(tmp_path / "a.mtz", *rows, **FORM), tmp_path / "good")
    more = with_more(rows, np.zeros((3, 3), int))
    assert_same(good, merged(write_mtz(tmp_path / "b.mtz", *more, **FORM), tmp_path / "more"))


def repeated(rows, chosen, **changes):
    hkl, columns = rows
    again = {k: (kind, np.concatenate([v, v[chosen]])) for k, (kind, v) in columns.items()}
    for label, change in changes.items():
        kind, values = again[label]
        values = values.copy()
        values[len(hkl) :] = change(values[len(hkl) :])
        again[label] = kind, values
    return np.concatenate([hkl, hkl[chosen]]), again


def without_places(rows):
    hkl, columns = rows
    return hkl, {k: v for k, v in columns.items() if k not in "XY"}


COPIES = {
    "a row": lambda r: repeated(r, np.arange(1)),
    "every other row": lambda r: repeated(r, np.arange(0, len(r[0]), 2)),
    "all rows, three times": lambda r: repeated(repeated(r, slice(None)), slice(None)),
    "all rows under other batch numbers": lambda r: repeated(
        r, slice(None), BATCH=lambda b: b + 1000
    ),
    "places rounded": lambda r: repeated(r, slice(None), X=np.round, Y=np.round),
}


@pytest.mark.slow
@pytest.mark.parametrize("has_places", [True, False])
@pytest.mark.parametrize("name", COPIES)
def test_copies_count_once(name, has_places, rows, tmp_path, caplog):
    rows = rows if has_places else without_places(rows)
    if not has_places and name == "places rounded":
        return
    good = merged(write_mtz(tmp_path / "a.mtz", *rows, **FORM), tmp_path / "good")
    more = COPIES[name](rows)
    assert_same(good, merged(write_mtz(tmp_path / "b.mtz", *more, **FORM), tmp_path / "more"))
    n_copies = len(more[0]) - len(rows[0])
    assert f"{n_copies} of {len(more[0])} observations are copies of others" in warnings(caplog)


def test_spots_integrated_twice(rows, tmp_path, caplog, capsys):
    """The same places, other intensities: a few are an accident, many are refused."""
    rng = np.random.default_rng(1)

    def again(n):
        return repeated(rows, slice(n), I=lambda i: i * 1.02, X=lambda x: x + rng.normal(0, 0.1))

    good = merged(write_mtz(tmp_path / "a.mtz", *rows, **FORM), tmp_path / "good")
    assert_same(good, merged(write_mtz(tmp_path / "b.mtz", *again(4), **FORM), tmp_path / "few"))
    assert "4 observations measure a spot again" in warnings(caplog)
    path = write_mtz(tmp_path / "c.mtz", *again(None), **FORM)
    assert cli.main(["merge", str(path), "--out", str(tmp_path / "many"), *FAST]) == 2
    assert "the spots were integrated twice" in capsys.readouterr().err
    assert not (tmp_path / "many").exists()


def test_one_index_at_two_places_is_two_reflections_on_the_sphere(rows, tmp_path, caplog):
    """Near the rotation axis a reflection enters and leaves on one image."""
    more = repeated(rows, slice(300), X=lambda x: x + 40.0, I=lambda i: i + 5.0)
    table = merged(write_mtz(tmp_path / "a.mtz", *more, **FORM), tmp_path / "out")
    assert table.n_plus.sum() == len(more[0])
    assert "again" not in warnings(caplog)


@pytest.fixture(scope="module")
def laue(rows):
    hkl, columns = rows
    wavelength = np.random.default_rng(8).uniform(1.02, 1.18, len(hkl))
    return hkl, columns | {"LAMBDA": ("R", wavelength)}


LAUE = ("--laue",)
WAVELENGTHS = {
    "zeros": (0.0, "2 observations without a wavelength and 0 far"),
    "NaN": (np.nan, "2 observations without the wavelength are left out"),
    "negative": (-1.1, "2 observations without a wavelength and 0 far"),
    "ten times too long": (11.0, "0 observations without a wavelength and 2 far"),
    "half": (0.55, "0 observations without a wavelength and 2 far"),
    "energies in eV": (12400.0, "0 observations without a wavelength and 2 far"),
}


@pytest.mark.parametrize("name", WAVELENGTHS)
def test_impossible_wavelengths_do_not_widen_the_spectrum(name, laue, tmp_path, caplog):
    value, said = WAVELENGTHS[name]
    good = merged(write_mtz(tmp_path / "a.mtz", *laue, **FORM), tmp_path / "good", *LAUE)
    more = with_more(laue, laue[0][[5, 900]], LAMBDA=value)
    path = write_mtz(tmp_path / "b.mtz", *more, **FORM)
    assert_same(good, merged(path, tmp_path / "more", *LAUE))
    assert said in warnings(caplog)


def test_laue_data_mostly_without_wavelengths(laue, tmp_path, capsys):
    hkl, columns = laue
    wavelength = np.where(np.arange(len(hkl)) % 3 == 0, columns["LAMBDA"][1], 0.0)
    path = write_mtz(tmp_path / "a.mtz", hkl, columns | {"LAMBDA": ("R", wavelength)}, **FORM)
    assert cli.main(["merge", str(path), "--out", str(tmp_path / "out"), "--laue"]) == 2
    assert "have no wavelength above 0" in capsys.readouterr().err
