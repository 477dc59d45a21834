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
#: A function's name with a thin space behind it.
FUNCTION = r'<mi>\1</mi><mspace width="0.17em"/>'
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
    pattern = (
        r'(?P<tag><(?:span|div) class="arithmatex">)\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]](?=</)'
    )
    return re.sub(
        pattern,
        lambda m: m["tag"] + mathml(html.unescape(m["tex"]), display=m["open"] == "["),
        content,
        flags=re.DOTALL,
    )


def mathml(tex: str, *, display: bool = False) -> str:
    """Convert a formula, mending what the converter leaves to be wished.

    Sized fences become ones that stretch, relations are operators, and names of functions stand
    apart from their arguments.
    """
    tex = re.sub(r"\\[bB]ig+l?(?=[(\[|]|\\langle)", r"\\left", tex) if paired(tex) else tex
    tex = re.sub(r"\\[bB]ig+r?(?=[)\]|]|\\rangle)", r"\\right", tex) if r"\left" in tex else tex
    tex = re.sub(r"\\[bB]ig+[lrm]?(?![a-z])", "", tex)
    text = convert(tex, display="block" if display else "inline")
    text = text.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    text = text.replace("<mi>:</mi>", "<mo>:</mo>")
    return re.sub(r"<mi>(log|exp)</mi>(?=<m(?:i|sub|sup|row|over|frac))", FUNCTION, text)


def paired(tex: str) -> bool:
    """Whether a formula has as many opening sized fences as closing ones."""
    opening = re.findall(r"\\[bB]ig+l?(?:[(\[]|\\langle)", tex)
    return len(opening) == len(re.findall(r"\\[bB]ig+r?(?:[)\]]|\\rangle)", tex))
