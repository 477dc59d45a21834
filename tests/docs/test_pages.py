"""README is short, links lead somewhere, quoted messages are the program's own."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import reference_pages  # of docs/site
import yaml

from braggflux.integrator.io import intensity_file, shoebox_store
from braggflux.integrator.model import saved_integrator
from braggflux.merge.io.stores import unmerged_store
from braggflux.merge.model import saved_scale
from braggflux.pipelines.config import schema
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.report.verdict import LEVELS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MAX_WORDS = 700
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
#: Pages that the site makes (`docs/site/hooks.py`).
MADE = {"commands", "options", "errors", "integrator", "merge", "fixtures"} | {
    "changelog",
    "contributing",
}


def test_readme_is_short():
    """As `wc -w` counts."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MAX_WORDS


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["title"] == project["name"]


def slug(title: str) -> str:
    """Anchor of a heading, as Python-Markdown and GitHub make it."""
    title = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def anchors(page: Path) -> set[str]:
    return {slug(t) for t in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        made = path.parent == ROOT / "docs" / "reference" and path.stem in MADE
        if target.startswith("https://") or made:
            continue
        if not path.is_file() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One: a `b`\n[x](page.md#one-a-b) [x](page.md#two) [x](none.md) [x](#one-a-b)"
    )
    assert broken_links(page) == ["page.md#two", "none.md"]


def navigation(entries: list) -> set[str]:
    """Files of the navigation of the site."""
    found: set[str] = set()
    for entry in entries:
        for value in entry.values():
            found |= {value} if isinstance(value, str) else navigation(value)
    return found


def test_every_page_is_in_the_navigation():
    nav = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    there = {str(p.relative_to(ROOT / "docs")) for p in PAGES if p.is_relative_to(ROOT / "docs")}
    assert nav == there | {f"reference/{name}.md" for name in MADE}


@cache
def texts_of_the_code() -> list[str]:
    """Every text of the program, with `...` for what it fills in, formats of the log too."""
    found = []
    for package in reference_pages.PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
                    text = " ".join(reference_pages.literal(node).split()).replace("%%", "%")
                    found.append(re.sub(r"%[-.\d]*[sdgf]", "...", text))
    return found


def is_said(quote: str) -> bool:
    """Whether a text of the program has the pieces between the `...` of a quote in their order."""
    pieces = [re.escape(piece.strip()) for piece in quote.split("...")]
    pattern = re.compile(r".*?\.\.\..*?".join(pieces))
    return any(pattern.search(text) for text in texts_of_the_code())


def quoted(page: str) -> list[str]:
    """Messages of the first cells of tables "you see", "line"."""
    tables = re.findall(
        r"^\| (?:you see|line) \|.*\n.*\n((?:\|.*\n)+)", (ROOT / page).read_text("utf-8"), re.M
    )
    cells = [line.split(" | ")[0] for table in tables for line in table.splitlines()]
    return [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/good_run.md"])
def test_quoted_messages_are_those_of_the_program(page):
    quotes = quoted(page)
    assert len(quotes) >= 5
    assert not [quote for quote in quotes if not is_said(quote)]


def test_a_message_that_nobody_says_is_found():
    assert is_said("no image file ...; copy it there or correct the path")
    assert not is_said("no image file ...; buy a new one")


def level(text: str) -> float:
    """Read a level like "at least 95 %" or "± 0.25"."""
    number = float(re.search(r"[\d.]+(?= %|$)|[\d.]+", text.replace("1 ±", "±"))[0])
    return number / 100 if "%" in text else number


def test_levels_are_those_of_the_verdict():
    """Of docs/report.md, those that the verdict has in its table."""
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    for judged in LEVELS:
        row = re.search(rf"^\| {judged.subject} \|[^|]*\|([^|]*)\|([^|]*)\|", page, re.MULTILINE)
        assert row, judged.subject
        assert (level(row[1]), level(row[2])) == (judged.good, judged.fair), judged.subject
        assert ("at least" in row[1]) == (judged.good > judged.fair)


def test_versions_of_formats_are_those_that_are_written():
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    for module in (intensity_file, shoebox_store, unmerged_store, saved_scale, saved_integrator):
        row = re.search(rf"^\|[^|]*\| `{module.FORMAT}`[^|]*\| (\d+) \|", page, re.MULTILINE)
        assert row, module.FORMAT
        assert int(row[1]) == module.VERSION, module.FORMAT


def test_generated_pages_have_what_the_program_has():
    commands = reference_pages.commands_page()
    assert "## braggflux run\n" in commands
    assert "| `--coupling " in commands
    options = reference_pages.options_page()
    kind, text = schema.find_option(RunConfig, "training.epochs")
    assert f"| `training.epochs` | {text} | {schema.type_name(kind)} | `6` |" in options
    assert "| `half_set_repeats` |" in options
    errors = reference_pages.errors_page()
    assert "- DIALS is not installed (no dials.import on the PATH); ..." in errors
    assert errors.count("\n- ") > 200
