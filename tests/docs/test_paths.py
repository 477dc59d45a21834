"""Paths that the documents name exist; the logs of experiments are history and name old ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"))
    if not page.name.startswith("experiments") and page.name != "CHANGELOG.md"
)
FOLDERS = ("integrator", "merge", "pipelines", "fixtures", "tests", "docs", "benchmarks")
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".j2")


def named_paths(page: Path) -> set[str]:
    """Paths of the source tree between backticks, with a folder or of the page's own folder."""
    words = re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8"))
    is_of_a_package = page.name == "README.md" and page.parent != ROOT
    return {
        word
        for word in words
        if not word.startswith(("../", ".", "/"))
        and (word.split("/")[0] in FOLDERS or word.endswith(SUFFIXES))
        and ("/" in word or word.endswith(".md") or is_of_a_package)
    }


def is_there(path: str, page: Path) -> bool:
    folders = [ROOT, page.parent, *([ROOT / "tests"] if page.name == "inputs.md" else [])]
    return any((folder / path).exists() for folder in folders)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page):
    missing = sorted(path for path in named_paths(page) if not is_there(path, page))
    assert not missing


def table_rows(page: Path) -> list[tuple[list[str], list[str]]]:
    """Names and files of each row of a table "symbol, code, where"."""
    text = page.read_text(encoding="utf-8")
    tables = re.findall(r"^\| symbol \| code \| where \|\n.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [line.strip("| ").split(" | ") for table in tables for line in table.splitlines()]
    return [tuple(re.findall(r"`([^`]+)`", cell) for cell in row[1:3]) for row in cells]


def source(path: str, page: Path) -> str:
    place = next(p for p in (ROOT / path, page.parent / path) if p.exists())
    files = place.rglob("*.py") if place.is_dir() else [place]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


SYMBOLS = [page for page in PAGES if table_rows(page)]


@pytest.mark.parametrize("page", SYMBOLS, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_the_code_are_where_the_tables_say(page):
    wrong = []
    for names, paths in table_rows(page):
        text = "".join(source(path, page) for path in paths)
        words = {part for name in names for part in name.split(".") if part}
        wrong += [(w, paths) for w in sorted(words) if not re.search(rf"\b{w}\b", text)]
    assert not wrong


def test_the_tables_are_found():
    found = {str(page.relative_to(ROOT)): len(table_rows(page)) for page in SYMBOLS}
    assert found.keys() == {"docs/merging.md", "integrator/README.md", "merge/README.md"}
    assert all(n >= 7 for n in found.values())
    assert (["Merger.loss", "elbo"], ["merge/model/merger.py", "merge/model/objective.py"]) in (
        table_rows(ROOT / "merge" / "README.md")
    )


def test_a_missing_path_is_found(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(
        "`merge/rows.py` `merge/none.py` `none.py` `merge/scale/` `merged.mtz` `../shared/tools` "
        "`--epochs` `run.log` `docs/none.md`"
    )
    found = named_paths(page)
    assert found == {"merge/rows.py", "merge/none.py", "none.py", "merge/scale/", "docs/none.md"}
    assert [p for p in sorted(found) if is_there(p, page)] == ["merge/rows.py", "merge/scale/"]
    assert "docs/theory.md" in named_paths(ROOT / "docs" / "limits.md")
    assert len(PAGES) >= 10
