"""Examples of README and of the pages run as they stand: blocks below the line `<!-- run -->`.

Pages share a folder, in this order, as a reader would go through them; a command that stands on
several pages is run once. Commands run in this process, which saves importing torch for each.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest

from braggflux.integrator.errors import UserError
from braggflux.pipelines import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/tutorial.md", "docs/howto/stills.md")
MARK = re.compile(r"^<!-- run -->$", re.MULTILINE)
BLOCK = re.compile(r"^<!-- run -->\n```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the examples of a page that are to be run."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> list[str]:
    """Lines of a block, continued ones joined, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


def undocumented(columns: Iterable[str]) -> set[str]:
    """Columns that the pages on files do not name."""
    pages = [ROOT / "docs" / name for name in ("tables.md", "files.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    return {name for name in columns if not re.search(rf"[`|,] ?{re.escape(name)}[`, ]", text)}


def test_the_pages_with_examples_are_those_that_run():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    marks = {p: len(MARK.findall(p.read_text(encoding="utf-8"))) for p in pages}
    assert {str(p.relative_to(ROOT)) for p, n in marks.items() if n} == set(PAGES)
    assert all(n == len(blocks(p)) for p, n in marks.items())


def test_a_column_without_a_word_is_found():
    assert undocumented(["z_spread", "wall_s", "z_sprad"]) == {"z_sprad"}


def test_lines_are_joined_and_comments_left_out():
    assert commands("# what\na \\\n    --b c\n\nd\n") == ["a --b c", "d"]


IMAGES = "merged/images.csv"
#: History, and pages that the site makes of them.
LOGS = ("experiments", "CHANGELOG")
LINE = re.compile(r"^(?: {4})?(braggflux (?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)
OPEN = ("...", "[", "DIR", "IMAGES", "COMMAND", "$D", "$N")


def shown(page: Path) -> list[str]:
    """Whole commands of the code blocks of a page, those to be filled in left out."""
    found = (c for text in LINE.findall(page.read_text("utf-8")) for c in commands(text))
    return [command for command in found if not any(word in command for word in OPEN)]


def test_commands_of_the_pages_have_flags_that_there_are():
    pages = [
        p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if not p.name.startswith(LOGS)
    ]
    parser = cli.build_parser()
    for page in pages:
        for command in shown(page):
            words = shlex.split(command, comments=True)[1:]
            if words and words != ["--version"]:
                cli._parse(parser, words)
    assert sum(len(shown(page)) for page in pages) > 40
    with pytest.raises(UserError, match="--colour"):
        cli._parse(parser, ["peaks", "a.mtz", "b.pdb", "--colour", "red"])


@pytest.mark.slow
def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done: set[str] = set()
    for page in PAGES:
        for language, text in blocks(ROOT / page):
            if language == "python":
                exec(compile(text, page, "exec", dont_inherit=True), {"__name__": "example"})
                continue
            for command in commands(text):
                program, *arguments = shlex.split(command)
                assert program == "braggflux", f"{page}: only this program is run: {command}"
                if command not in done:
                    assert cli.main(arguments) == 0, (
                        f"{page}: {command}\n{capsys.readouterr().err}"
                    )
                done.add(command)
    for made in ("run/report.html", "anomalous.ccp4", "merged/report.html"):
        assert (tmp_path / made).stat().st_size > 10_000, made
    made = [path.name for folder in ("run", "merged") for path in (tmp_path / folder).iterdir()]
    assert not undocumented(f"{name}/" if "." not in name else name for name in made) - {"latest/"}
    for name in ("run/statistics.csv", "run/peaks.csv", "merged/correlation.csv", IMAGES):
        header = (tmp_path / name).read_text(encoding="utf-8").splitlines()[0]
        assert not undocumented(header.split(",")), name
    last = json.loads(
        (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    )
    assert not undocumented(key for key in last if not key.startswith("peak_sigma"))
    assert not undocumented(json.loads((tmp_path / "merged/metrics.json").read_text("utf-8")))
    heights = capsys.readouterr().out  # of the run, then of the stills
    assert heights.count("chain,seqid,residue,atom,peak_sigma") == 2
    assert len(re.findall(r"^A,204,IOD,I,\d", heights, re.MULTILINE)) == 2
