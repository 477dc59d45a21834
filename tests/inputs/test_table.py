"""`docs/inputs.md` names the tests that hold its rows: each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS.parent / "docs" / "inputs.md"
N_COLUMNS = 5


def rows() -> list[list[str]]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] != "kind"]


def named_tests(cell: str) -> list[tuple[str, str]]:
    """Give (file, name) of each test of a row; the name is empty for a whole file."""
    found = []
    for part in cell.split("; "):
        file, *names = re.findall(r"`([^`]+)`", part)
        found += [(file, name) for name in names] or [(file, "")]
    return found


def defined(path: Path) -> set[str]:
    names = {""}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [m.name for m in node.body if isinstance(m, ast.FunctionDef)]
            names |= {f"{node.name}::{name}" for name in methods}
    return names


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_every_row_names_tests_that_exist(row):
    assert len(row) == N_COLUMNS
    assert all(cell.strip() for cell in row)
    for file, name in named_tests(row[-1]):
        assert (TESTS / file).is_file(), file
        assert name in defined(TESTS / file), f"{file}: {name}"


def test_a_wrong_name_is_found():
    assert named_tests("`a.py`: `test_b`, `C::test_d`; `e.py`") == [
        ("a.py", "test_b"),
        ("a.py", "C::test_d"),
        ("e.py", ""),
    ]
    assert "test_that_is_nowhere" not in defined(Path(__file__))
