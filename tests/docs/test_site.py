"""The site of the documents: no warning when built, nothing fetched, readable in a browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (1280, 400)
PAGES = ("index.html", "theory.html", "results.html", "reference/options.html")
FETCHED = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"')


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_fetch_nothing_and_have_their_formulas(site):
    pages = {str(p.relative_to(site)): p.read_text("utf-8") for p in site.rglob("*.html")}
    assert len(pages) > 30
    assert not {name for name, text in pages.items() if FETCHED.search(text)}
    assert FETCHED.search('<script src="https://a.b/c.js">')
    theory = pages["theory.html"]
    assert theory.count("<math") > 100
    formulas = [
        f for text in pages.values() for f in re.findall(r"<math.*?</math>", text, re.DOTALL)
    ]
    assert not [formula for formula in formulas if "\\" in formula]  # TeX that was not understood
    assert 'href="experiments.html"><code>docs/experiments.md</code>' in pages["results.html"]
    assert not list(site.rglob("*.py"))


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_in_a_browser(site, browser, width):
    """No page is wider than the window, asks the network, or has an error of a script."""
    page = browser.new_page(viewport={"width": width, "height": 1000})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url),
    )
    for name in PAGES:
        page.goto((site / name).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
    assert not wrong
    if width == max(WIDTHS):
        page.fill("input[name=query]", "double-Wilson")
        page.wait_for_selector(".md-search-result__item")
    page.close()
