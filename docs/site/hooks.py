"""What the site adds to the pages of `docs/`: pages generated from the code, links, formulas.

Called by MkDocs (`mkdocs.yml`), which imports this file by its path. Commands, options and error
messages are read from the program itself, so that these pages cannot disagree with it. Formulas
become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import html
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import reference_pages

#: Pages that are kept elsewhere in the tree.
COPIES = {
    "reference/integrator.md": "integrator/README.md",
    "reference/merge.md": "merge/README.md",
    "reference/fixtures.md": "fixtures/README.md",
    "reference/changelog.md": "CHANGELOG.md",
    "reference/contributing.md": "CONTRIBUTING.md",
}
PLACE = {source: page for page, source in COPIES.items()} | {"README.md": "index.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and those kept elsewhere."""
    pages = {name: (ROOT / source).read_text(encoding="utf-8") for name, source in COPIES.items()}
    pages["reference/commands.md"] = reference_pages.commands_page()
    pages["reference/options.md"] = reference_pages.options_page()
    pages["reference/errors.md"] = reference_pages.errors_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make links of documents that are named as code, like `docs/theory.md`."""
    here = posixpath.dirname(page.file.src_uri)
    known = {file.src_uri for file in files}

    def link(match: re.Match[str]) -> str:
        name = match[1]
        target = PLACE.get(name, name.removeprefix("docs/"))
        if target not in known or target == page.file.src_uri:
            return match[0]
        return f"[`{name}`]({posixpath.relpath(target, here or '.')})"

    return re.sub(r"(?<![\[`])`([\w./]+\.md)`(?!`)", link, markdown)


def on_page_content(content: str, **_: Any) -> str:
    r"""Turn `\(...\)` and `\[...\]`, as Arithmatex leaves them, into MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match["open"] == "[" else "inline"
        return match["tag"] + convert(html.unescape(match["tex"]), display=display)

    pattern = (
        r'(?P<tag><(?:span|div) class="arithmatex">)\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]](?=</)'
    )
    return re.sub(pattern, formula, content, flags=re.DOTALL)
