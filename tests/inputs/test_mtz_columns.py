"""MTZ files whose columns are not as most programs write them: the same observations come out."""

from __future__ import annotations

from pathlib import Path

import mad_files as mad
import numpy as np
import pytest

from braggflux.integrator.crystal.symmetry import to_asu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.formats.mtz_observations import read_mtz
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines import cli

FAST = ("--epochs", "5", "--set", "network_width=8", "--anomalous")
ROWS = mad.observe(mad.truth(), 0)


def write(path: Path, rows=ROWS, valm=None, **options) -> Path:
    mtz = mad.empty_mtz()
    mad.add_dataset(mtz, ("p", "x", "d"), mad.PEAK, range(1, 21))
    if valm is not None:
        mtz.valm = valm
    return mad.write(path, rows, mtz, **options)


def table_of(path: Path) -> set[tuple]:
    data = read_mtz(path)
    columns = [data.intensity, data.sigma, *(data.metadata[n] for n in ("BATCH", "XDET", "ROT"))]
    rows = np.column_stack([data.miller_index, *np.round(columns, 3)])
    return set(map(tuple, rows.tolist()))


ORDERS = ["M/ISYM", "BATCH", "I", "SIGI", "H", "K", "L", "XDET", "YDET", "ROT"]


@pytest.mark.parametrize(
    ("kind", "rows", "options"),
    [
        ("M_ISYM", ROWS, {"isym": "M_ISYM"}),
        ("M_ISYM of another type", ROWS, {"isym": "M_ISYM", "types": {"M_ISYM": "I"}}),
        ("no M/ISYM", ROWS, {"isym": None}),
        ("no M/ISYM that says anything", ROWS.but(**{"M/ISYM": np.zeros(6000)}), {"isym": None}),
        (
            "indices behind",
            ROWS,
            {"order": ["I", "SIGI", "H", "K", "L", *ORDERS[7:], "BATCH", "M/ISYM"]},
        ),
        ("indices in the midst", ROWS, {"order": ORDERS}),
        (
            "as cctbx.xfel writes them",
            ROWS.but(M_ISYM=np.zeros(6000)),
            {"isym": None, "order": ["I", "SIGI", "H", "K", "L", "M_ISYM", "BATCH", *ORDERS[7:]]},
        ),
        ("BATCH of type I", ROWS, {"types": {"BATCH": "I"}}),
        ("BATCH of type R", ROWS, {"types": {"BATCH": "R"}}),
        ("rows in another order", ROWS.take(np.random.default_rng(1).permutation(6000)), {}),
    ],
)
def test_the_same_observations(kind, rows, options, tmp_path):
    assert table_of(write(tmp_path / "a.mtz", rows, **options)) == table_of(
        write(tmp_path / "b.mtz")
    )


@pytest.mark.slow
def test_zeros_in_m_isym_do_not_swap_the_mates(tmp_path):
    """The rows are those of a right file: so are F(+) and F(-), to the last digit."""
    zeros = ROWS.but(**{"M/ISYM": np.zeros(len(ROWS.hkl))})
    write(tmp_path / "right.mtz")
    write(tmp_path / "zeros.mtz", zeros, isym=None)
    tables = []
    for name in ("right", "zeros"):
        argv = ["merge", str(tmp_path / f"{name}.mtz"), "--out", str(tmp_path / name), *FAST]
        assert cli.main(argv) == 0
        tables.append(read_merged_mtz(tmp_path / name / "merged.mtz").table)
        path = tmp_path / name / "merged.mtz"
        assert mad.bijvoet_correlation(path, mad.truth()) > 0.8
    np.testing.assert_allclose(tables[0].f_plus, tables[1].f_plus, rtol=1e-3)
    np.testing.assert_allclose(tables[0].f_minus, tables[1].f_minus, rtol=1e-3)


def test_m_isym_beyond_the_operations_is_refused(tmp_path):
    rows = ROWS.but(**{"M/ISYM": np.full(len(ROWS.hkl), 13)})
    path = write(tmp_path / "a.mtz", rows, isym=None)
    with pytest.raises(UserError, match="operation 7 and the file lists 4"):
        read_mtz(path)


@pytest.mark.parametrize("empty", [np.nan, 0.0])
def test_an_empty_profile_fitted_intensity_is_passed_over(empty, tmp_path):
    rows = ROWS.but(IPR=np.full(6000, empty), SIGIPR=np.full(6000, empty))
    assert table_of(write(tmp_path / "a.mtz", rows)) == table_of(write(tmp_path / "b.mtz"))


def gap(column: str, share: float, value: float) -> tuple[mad.Rows, np.ndarray]:
    """Rows with ``value`` in a random share of a column, and which."""
    lacks = np.random.default_rng(3).random(len(ROWS.hkl)) < share
    whole = ROWS.columns.get(column, np.full(len(ROWS.hkl), 1.1))
    return ROWS.but(**{column: np.where(lacks, value, whole)}), lacks


MISSING = [(np.nan, None), (np.inf, None), (-999.0, -999.0), (1e-33, 1e-33)]


@pytest.mark.parametrize(
    ("column", "value", "valm"),
    [(c, *m) for c in ("XDET", "ROT", "I", "SIGI", "WAVELENGTH") for m in MISSING]
    + [("BATCH", *m) for m in MISSING[:2]],
)
def test_rows_without_a_number_are_left_out(column, value, valm, tmp_path):
    rows, lacks = gap(column, 0.03, value)
    found = table_of(write(tmp_path / "a.mtz", rows, valm))
    assert found == table_of(write(tmp_path / "b.mtz", ROWS.take(~lacks)))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_column_that_many_rows_lack_is_left_out(share, tmp_path):
    rows, _ = gap("YDET", share, np.nan)
    data = read_mtz(write(tmp_path / "a.mtz", rows))
    assert len(data) == len(ROWS.hkl)
    assert data.metadata.keys() == {"BATCH", "ROT"}  # half a position is none


def test_gaps_in_a_column_that_nothing_reads_cost_nothing(tmp_path, capsys):
    rows = ROWS.but(CHISQ=np.where(np.arange(6000) % 3, 1.0, np.nan))
    path = write(tmp_path / "a.mtz", rows)
    assert len(read_mtz(path)) == 6000
    argv = ["merge", str(path), "--out", str(tmp_path / "out"), *FAST, "--metadata", "dHKL,CHISQ"]
    assert cli.main(argv) == 2
    assert "CHISQ is missing in 2000 of 6000" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("column", "share"), [("XDET", 0.03), ("XDET", 0.5), ("ROT", 0.03)])
def test_amplitudes_are_finite_and_right(column, share, tmp_path):
    rows, _ = gap(column, share, np.nan)
    path = write(tmp_path / "a.mtz", rows)
    assert cli.main(["merge", str(path), "--out", str(tmp_path / "out"), *FAST]) == 0
    merged = tmp_path / "out" / "merged.mtz"
    table = read_merged_mtz(merged).table
    assert np.isfinite(table.f).all()
    assert np.isfinite(table.i_mean).all()
    assert mad.bijvoet_correlation(merged, mad.truth()) > 0.8


@pytest.mark.parametrize("isym", [None, "zeros"])
def test_mates_that_the_file_does_not_tell_apart_are_not_made_up(isym, tmp_path, capsys):
    """Indices in the asymmetric unit and nothing that says where they were observed."""
    reduced = to_asu(ROWS.hkl, mad.GROUP).miller_index
    columns = ROWS.columns | ({"M/ISYM": np.zeros(len(reduced))} if isym else {})
    path = write(tmp_path / "a.mtz", mad.Rows(reduced, columns), isym=None)
    argv = ["merge", str(path), "--out", str(tmp_path / "out"), *FAST]
    assert cli.main(argv) == 2
    assert "do not tell the Friedel mates apart" in capsys.readouterr().err
    assert cli.main(argv[:-1]) == 0  # without --anomalous


@pytest.mark.parametrize(("width", "is_said"), [(1.0, True), (0.05, False)])
def test_one_batch_number_for_a_sweep_is_said(width, is_said, tmp_path, caplog):
    rows = ROWS.but(BATCH=np.ones(6000), ROT=ROWS.columns["ROT"] * width)
    with caplog.at_level("WARNING"):
        read_mtz(write(tmp_path / "a.mtz", rows))
    assert ("all observations have one BATCH" in caplog.text) == is_said


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_few_rows_without_m_isym_are_left_out(value, tmp_path, caplog):
    """Which mate they are of is not known; half the rows are too many."""
    reduced = to_asu(ROWS.hkl, mad.GROUP)
    isym = reduced.isym.astype(float)
    isym[:60] = value
    columns = ROWS.columns | {"M/ISYM": isym}
    path = write(tmp_path / "few.mtz", mad.Rows(reduced.miller_index, columns), isym=None)
    assert table_of(path) == table_of(write(tmp_path / "b.mtz", ROWS.take(np.arange(60, 6000))))
    assert "0 or missing in 60 of 6000 rows" in caplog.text
    isym[::2] = value
    path = write(tmp_path / "many.mtz", mad.Rows(reduced.miller_index, columns), isym=None)
    with pytest.raises(UserError, match="3030 of 6000 rows"):
        read_mtz(path)


def test_rows_without_an_index_are_left_out(tmp_path, caplog):
    """K of NaN is not 0."""
    reduced = to_asu(ROWS.hkl, mad.GROUP)
    rows = mad.Rows(reduced.miller_index.astype(float), ROWS.columns | {"M/ISYM": reduced.isym})
    rows.hkl[:30, 1] = np.nan
    path = write(tmp_path / "a.mtz", rows, isym=None)
    assert table_of(path) == table_of(write(tmp_path / "b.mtz", ROWS.take(np.arange(30, 6000))))
    assert "30 rows without index" in caplog.text
