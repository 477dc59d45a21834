"""Search, filters and order against the plain table."""

from __future__ import annotations

import gemmi
import h5py
import numpy as np
import pytest
from simulated_run import BOX, SPACE_GROUP, write_run

from braggflux.integrator.crystal.symmetry import to_asu
from braggflux.integrator.errors import UserError
from braggflux.pipelines.view.columns import IntensityColumns
from braggflux.pipelines.view.query import ORDERS, PAGE, Query, Search, flag_words

N = 500


@pytest.fixture(scope="module")
def columns(tmp_path_factory) -> IntensityColumns:
    return IntensityColumns(write_run(tmp_path_factory.mktemp("query"), N).intensities, BOX)


@pytest.fixture(scope="module")
def search(columns) -> Search:
    return Search(columns)


def all_rows(search: Search, deviations=None, **query: str) -> np.ndarray:
    """Rows of all pages."""
    found, page = [], 1
    while True:
        rows, n, _ = search.rows(Query.of(query | {"page": str(page)}), deviations)
        found.append(rows)
        if len(np.concatenate(found)) >= n:
            return np.concatenate(found)
        page += 1


def test_columns_are_read_when_asked_for(columns):
    fresh = IntensityColumns(columns.path, BOX)
    assert len(fresh) == N
    assert not fresh._columns
    assert fresh["d"].shape == (N,)
    assert set(fresh._columns) == {"d"}


def test_without_a_filter_all_are_listed_once(search):
    rows = all_rows(search)
    assert np.array_equal(rows, np.arange(N))
    page, n, number = search.rows(Query(page="999"))
    assert (n, number) == (N, N // PAGE)
    assert np.array_equal(page, np.arange(N - PAGE, N))


@pytest.mark.parametrize("order", [name for name in ORDERS if name not in {"index", "z"}])
def test_orders(search, columns, order):
    values = ORDERS[order](columns, None)
    up = all_rows(search, order=order)
    assert sorted(up) == list(range(N))
    assert np.all(np.diff(values[up]) >= 0)
    assert np.array_equal(all_rows(search, order=order, down="1"), up[::-1])


def test_an_index_and_its_equivalents(search, columns):
    hkl = columns["miller_index"]
    text = " ".join(map(str, hkl[7]))
    assert set(all_rows(search, hkl=text)) == set(np.flatnonzero((hkl == hkl[7]).all(1)))
    asu = to_asu(hkl, gemmi.SpaceGroup(SPACE_GROUP)).miller_index
    same = set(np.flatnonzero((asu == asu[7]).all(1)))
    assert set(all_rows(search, hkl=text, equivalents="1")) == same
    assert set(columns.equivalents(7).tolist()) == same
    some = set(np.flatnonzero((hkl[:, 0] == 5) & (hkl[:, 2] == -3)))
    assert set(all_rows(search, hkl="5,*,-3")) == some


def test_filters_are_met_together(search, columns):
    rows = all_rows(search, d_from="4", d_to="2", flag="4", image="100")
    frame = 99
    first = columns["corner"][:, 0]
    keep = (columns["d"] >= 2) & (columns["d"] <= 4) & (columns["flags"] == 4)
    keep &= (first <= frame) & (frame < first + BOX)
    assert 0 < keep.sum() < N
    assert set(rows) == set(np.flatnonzero(keep))
    assert set(all_rows(search, flag="none")) == set(np.flatnonzero(columns["flags"] == 0))
    assert set(all_rows(search, d_to="2.0")) == set(np.flatnonzero(columns["d"] >= 2))
    assert set(all_rows(search, d_from="2.0")) == set(np.flatnonzero(columns["d"] <= 2))


def test_deviations_come_from_the_model(columns):
    search = Search(columns)
    with pytest.raises(UserError, match="z needs the model"):
        search.rows(Query(order="z"))
    z = np.linspace(-5, 4, N)
    z[10] = np.nan
    best = all_rows(search, z, order="z", down="1")
    assert best[0] == 0
    assert best[-1] == 10
    assert set(all_rows(search, z, z="3")) == set(np.flatnonzero(np.abs(z) >= 3))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"hkl": "1 2"}, "three numbers"),
        ({"hkl": "1 2 x"}, "three numbers"),
        ({"hkl": "1 2 9999999"}, "three numbers"),
        ({"d_from": "nan"}, "resolution must be a number, got 'nan'"),
        ({"image": "1.5"}, "image must be a whole number"),
        ({"flag": "1e400"}, "flag must be a whole number"),
        ({"page": "-"}, "page must be a whole number"),
        ({"order": "__class__"}, "order must be one of row, index"),
    ],
)
def test_a_filter_that_cannot_be_read(search, query, message):
    with pytest.raises(UserError, match=message):
        search.rows(Query.of(query))


def test_flags_in_words():
    assert flag_words(0) == ""
    assert flag_words(1 | 16) == "cut by an edge, defect"


def test_frames_of_a_spot(columns):
    rows = columns.on_frame(0, 50)
    first = columns["corner"][:, 0]
    assert set(rows) == set(np.flatnonzero((first <= 50) & (50 < first + BOX)))
    assert not len(columns.on_frame(0, 50, panel=1))


def test_an_old_file_is_refused(columns, tmp_path):
    path = tmp_path / "intensities.h5"
    path.write_bytes(columns.path.read_bytes())
    with h5py.File(path, "r+") as handle:
        handle.attrs["version"] = 2
    with pytest.raises(UserError, match=r"version 2, which does not say where the boxes"):
        IntensityColumns(path)
    with h5py.File(path, "r+") as handle:
        handle.attrs["version"] = 99
    with pytest.raises(UserError, match=r"is no intensity file of version 2 to 4"):
        IntensityColumns(path)
