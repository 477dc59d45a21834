"""Reflection tables against DIALS itself, both ways, and damaged files."""

import os
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest

from braggflux.integrator.crystal.geometry import Beam, Experiment
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    match_experiments,
    read_reflections,
    write_reflections,
)

DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")


@pytest.fixture(scope="module")
def flex(dials):
    if DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(DEBIAN_BUILD))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that DIALS imports
        from dials.array_family import flex
    return flex


def as_numpy(column) -> np.ndarray:
    """A flex column as NumPy, without the package under test."""
    kind = type(column).__name__
    if kind in ("miller_index", "vec3_double", "vec2_double", "int6", "mat3_double"):
        return np.array([list(row) for row in column])
    return column.as_numpy_array()


def assert_same(ours: ReflectionTable, theirs, *, skipped=()) -> None:
    assert set(ours.columns) | set(skipped) == set(theirs.keys())
    assert len(ours) == len(theirs)
    identifiers = theirs.experiment_identifiers()
    assert ours.identifiers == {k: identifiers[k] for k in identifiers.keys()}
    for name, column in ours.columns.items():
        np.testing.assert_array_equal(
            column.reshape(len(ours), -1), as_numpy(theirs[name]).reshape(len(ours), -1), name
        )


@pytest.mark.parametrize("name", ["hewl_nai/refined.refl", "small/stills.refl"])
def test_dials_files_round_trip(flex, shared, tmp_path, name):
    path = shared / "data" / name
    table = read_reflections(path)
    assert_same(table, flex.reflection_table.from_file(str(path)))

    write_reflections(tmp_path / "ours.refl", table)
    assert_same(table, flex.reflection_table.from_file(str(tmp_path / "ours.refl")))
    assert (tmp_path / "ours.refl").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["ours.refl"]


def every_type() -> ReflectionTable:
    rng = np.random.default_rng(3)
    return ReflectionTable(
        {
            "miller_index": rng.integers(-30, 30, (7, 3)),
            "bbox": rng.integers(-5, 500, (7, 6)),
            "flags": rng.integers(0, 2**31, 7),
            "panel": np.arange(7),
            "id": np.array([0, 0, 0, 2, 2, 2, -1]),
            "count": np.array([0, 1, 2**64 - 1, 3, 4, 5, 6], dtype=np.uint64),
            "d": rng.random(7).astype(np.float32),
            "entering": rng.random(7) > 0.5,
            "s1": rng.normal(size=(7, 3)),
            "px": rng.normal(size=(7, 2)),
            "covariance": rng.normal(size=(7, 3, 3)),
        },
        identifiers={0: "first", 2: "third"},
    )


def test_every_column_type_reaches_dials_and_comes_back(flex, tmp_path):
    table = every_type()
    write_reflections(tmp_path / "ours.refl", table)
    theirs = flex.reflection_table.from_file(str(tmp_path / "ours.refl"))
    assert_same(table, theirs)
    kinds = {name: type(theirs[name]).__name__ for name in ("flags", "panel", "id", "d")}
    assert kinds == {"flags": "size_t", "panel": "size_t", "id": "int", "d": "double"}

    theirs.as_file(str(tmp_path / "theirs.refl"))
    back = read_reflections(tmp_path / "theirs.refl")
    assert_same(back, theirs)
    assert back["miller_index"].dtype == np.int32
    assert back["flags"].dtype == np.uint64


def test_shoeboxes_and_strings_are_skipped_and_named_in_the_log(flex, tmp_path, caplog):
    theirs = flex.reflection_table()
    theirs["note"] = flex.std_string(["a", "b"])
    theirs["id"] = flex.int([0, 0])
    theirs["shoebox"] = flex.shoebox(flex.size_t([0, 0]), flex.int6([(0, 2, 0, 2, 0, 1)] * 2))
    theirs["shoebox"].allocate()
    theirs.as_file(str(tmp_path / "spots.refl"))
    with caplog.at_level("INFO"):
        table = read_reflections(tmp_path / "spots.refl")
    assert set(table.columns) == {"id"}
    assert "column shoebox" in caplog.text
    assert "column note" in caplog.text


def test_empty_table(flex, tmp_path):
    theirs = flex.reflection_table()
    theirs["s1"] = flex.vec3_double()
    theirs.as_file(str(tmp_path / "none.refl"))
    table = read_reflections(tmp_path / "none.refl")
    assert len(table) == 0
    assert table["s1"].shape == (0, 3)
    write_reflections(tmp_path / "again.refl", table)
    assert len(flex.reflection_table.from_file(str(tmp_path / "again.refl"))) == 0


def test_flags_equal_those_of_dials(flex):
    names = {name for name in vars(DialsFlag) if name.isupper()}
    for name in names:
        assert getattr(DialsFlag, name) == int(
            getattr(flex.reflection_table.flags, name.lower())
        ), name


def test_select_and_flags():
    table = every_type()
    picked = table.select(table["id"] == 2)
    assert len(picked) == 3
    assert picked["panel"].tolist() == [3, 4, 5]
    assert table.select([6, 0])["panel"].tolist() == [6, 0]
    table.columns["flags"] = np.array([0, 256, 512, 768, 32, 1, 4], dtype=np.uint64)
    expected = [False, True, True, True, False, False, False]
    assert table.has_flag(DialsFlag.INTEGRATED).tolist() == expected


def test_experiments_are_matched_by_identifier_then_by_number():
    beam = Beam(np.array([0.0, 0.0, 1.0]), 1.0)
    named = [Experiment(beam, (), identifier=name) for name in ("third", "first")]
    assert match_experiments(every_type(), named).tolist() == [1, 1, 1, 0, 0, 0, -1]
    anonymous = [Experiment(beam, ()) for _ in range(3)]
    assert match_experiments(every_type(), anonymous).tolist() == [0, 0, 0, 2, 2, 2, -1]
    with pytest.raises(UserError, match=r"experiment 2 \(third\).*not among the 1"):
        match_experiments(every_type(), named[1:])
    with pytest.raises(UserError, match="same DIALS step"):
        match_experiments(every_type(), anonymous[:2])


def test_missing_columns_are_named():
    table = ReflectionTable({"id": np.zeros(1, int)}, source="strong.refl")
    with pytest.raises(
        UserError, match=r"strong.refl lacks the columns s1, d \(prediction\)"
    ) as e:
        table.require(["id", "s1", "d"], "prediction")
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="lacks the column flags"):
        table.has_flag(1)


def test_columns_must_agree_in_length():
    with pytest.raises(ValueError, match="length"):
        ReflectionTable({"id": np.zeros(1, int), "d": np.zeros(2)})


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("x", np.zeros((2, 5))),
        ("x", np.zeros(2, complex)),
        ("note", np.array(["a", "b"])),
        ("id", np.array([2**40, 0])),
        ("flags", np.array([-1, 0])),
    ],
)
def test_what_dials_cannot_hold_is_refused(tmp_path, name, column):
    with pytest.raises(ValueError, match=f"column {name}"):
        write_reflections(tmp_path / "bad.refl", ReflectionTable({name: column}))
    assert not list(tmp_path.iterdir())


def packed(data, *, version=1, magic="dials::af::reflection_table", rows=2) -> bytes:
    return msgspec.msgpack.encode(
        [magic, version, {"identifiers": {}, "nrows": rows, "data": data}]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a DIALS reflection table"),
        (b"\x80\x04pickle of an old file", "not a DIALS reflection table"),
        (b"H K L F SIGF", "not a DIALS reflection table"),
        (packed({})[:-3], "truncated"),
        (packed({"d": ("double", (2, bytes(16)))})[:-5], "truncated"),
        (packed({}, magic="other"), "not a DIALS reflection table"),
        (packed({}, version=7), "version 7"),
        (packed({"d": ("double", (2, bytes(15)))}), "damaged"),
        (packed({"d": ("double", (3, bytes(24)))}), "damaged"),
        (packed({"d": ("double", (2, bytes(24)))}), "damaged"),
        (packed({"d": ("quaternion", (2, bytes(16)))}), "unknown type"),
        (packed({"d": "double"}), "damaged"),
    ],
)
def test_damaged_files_are_explained(tmp_path, content, message):
    path = tmp_path / "bad.refl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_reflections(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_unwritable_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        read_reflections(tmp_path / "none.refl")
    with pytest.raises(UserError, match="cannot write"):
        write_reflections(tmp_path / "none" / "x.refl", every_type())
