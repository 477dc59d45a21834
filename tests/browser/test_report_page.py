"""The report in a real browser: no script error, every figure drawn, nothing out of the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_data import merged_table

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.merge.io.mtz import read_merged_mtz, write_merged_mtz
from braggflux.merge.output.statistics import write_statistics_csv
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.maps.anomalous_peaks import AnomalousModel
from braggflux.pipelines.maps.atomic_model import read_model, structure_factors
from braggflux.pipelines.report.html import VIEWER, write_report
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.rundir import RunDirectory

MODEL = Path(__file__).resolve().parents[2] / "fixtures" / "reference" / "9b7c.pdb"
D_MIN = 3.2
VIEWS = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
#: Elements that reach out of the window; what scrolls or is clipped inside a plot does not count.
OUTSIDE = """() => [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && e.offsetWidth > 0)
    .map(e => e.tagName + '.' + e.className)"""
#: Text cells whose text is wider than they are.
CLIPPED = """() => [...document.querySelectorAll('th, td, li, p, dd, h1, h2, h3, h4')]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
    .map(e => e.tagName + ': ' + e.textContent.slice(0, 40))"""


def merged_file(path: Path, noise: float, seed: int) -> None:
    """Amplitudes of the model with its iodides' anomalous scattering, and an error."""
    structure = read_model(MODEL)
    cell, group = structure.cell, structure.find_spacegroup()
    asu = ReciprocalAsu(cell, group, D_MIN, anomalous=False)
    hkl, f = structure_factors(structure, D_MIN * 0.999)
    known = {tuple(h): v for h, v in zip(hkl.tolist(), f, strict=True)}
    value = np.array([known[tuple(h)] for h in asu.miller_index.tolist()])
    change = np.zeros(len(asu), complex)
    for atom in (a for chain in structure[0] for r in chain if r.name == "IOD" for a in r):
        at = cell.fractionalize(atom.pos)
        for op in group.operations():
            x = np.array(op.apply_to_xyz(at.tolist()))
            change += 3.5 * atom.occ * np.exp(2j * np.pi * (asu.miller_index @ x))
    rng = np.random.default_rng(seed)
    sigma = np.full(len(asu), noise * np.abs(value).mean())
    mates = [np.abs(value + s * 1j * change) + sigma * rng.normal(size=len(asu)) for s in (1, -1)]
    plus, minus = (np.maximum(m, 0.1) for m in mates)
    minus[asu.is_centric] = np.nan
    table = merged_table(asu.miller_index, plus**2, 2 * plus * sigma, minus**2)
    write_merged_mtz(path, table, cell, group, 1.03752, history=["test"])


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    """Page of a run with merged data of both programs, a model, statistics and shoeboxes."""
    folder = tmp_path_factory.mktemp("page")
    merged_file(folder / "dials.mtz", 0.04, seed=1)
    config = RunConfig(out=folder / "run", model=MODEL, reference=folder / "dials.mtz")
    run = RunDirectory.create(config)
    merged_file(run.merged, 0.02, seed=2)
    merged = read_merged_mtz(run.merged)
    model = AnomalousModel(MODEL, merged.cell, merged.space_group, D_MIN * 0.999)
    run.write_peaks("DIALS", model.score(read_merged_mtz(folder / "dials.mtz").table))
    for epoch in (1, 2):
        run.write_peaks(epoch, model.score(merged.table))
        run.append_metrics({"epoch": epoch, "merge_elbo": -4.0, "merge_nll": 3.0, "cc_half": 0.99})
    shells = {"cc_half": 0.99, "cc_anom": 0.5, "r_merge": 0.03, "completeness": 1.0}
    rows = [{"shell": i, "d_max": 9.0 - i, "d_min": 8.0 - i} | shells for i in range(4)]
    write_statistics_csv(run.statistics_file, [*rows, rows[0] | {"shell": "overall"}])
    rng = np.random.default_rng(0)
    boxes = {"counts": rng.poisson(2.0, (3, 3, 9, 9)), "rate": np.full((3, 3, 9, 9), 2.0)}
    kinds = {"kind": np.array(["sample", "mates", "dials"]), "row": np.array([5, 7, 11])}
    np.savez(run.shoebox_examples, **boxes, **kinds, resolution=np.array([2.0, 3.0, np.nan]))
    write_report(run)
    log.detach_files()
    return run.report


def opened(browser: Any, page_file: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """Open the page and wait until it says that all is drawn; any complaint is an error."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_offline(True)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type in {"error", "warning"} else None)
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:"))
            else errors.append(f"fetched {r.url}"))  # fmt: skip
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    return page, errors


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_every_figure_is_drawn_and_nothing_overflows(browser, page_file, width, scheme):
    page, errors = opened(browser, page_file, width, scheme)
    places = page.locator("[data-panel]")
    assert places.count() > 12
    undrawn = page.evaluate("""() => [...document.querySelectorAll('[data-panel]')]
        .filter(e => !e.querySelector('svg.main-svg') || e.getBoundingClientRect().height < 100)
        .map(e => e.ariaLabel)""")
    assert undrawn == []
    assert page.locator("canvas[data-drawn]").count() == 9
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for details in page.locator("details").all():
        details.evaluate("e => { e.open = true; }")
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(CLIPPED) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
    assert errors == []
    page.context.close()


@pytest.mark.slow
def test_first_screen_and_links(browser, page_file):
    page, errors = opened(browser, page_file, 1280, "light")
    first = page.locator("main > section").first.inner_text()
    assert "Verdict" in first
    assert "IOD 20" in first
    assert "Table 1" in first
    assert page.locator(f'a[href="{VIEWER}11"]').count() == 1
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    page.get_by_role("button", name="three dimensions").first.click()
    page.wait_for_selector(".space[data-drawn] canvas")
    assert errors == []
    page.context.close()


@pytest.mark.slow
def test_printed_page_is_light(browser, page_file):
    page, _ = opened(browser, page_file, 1280, "dark")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    page.emulate_media(media="print")
    for place, name in (("body", "backgroundColor"), ("section", "backgroundColor")):
        shown = page.evaluate(f"getComputedStyle(document.querySelector('{place}')).{name}")
        assert shown == "rgb(255, 255, 255)"
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert sum(map(int, ink[4:-1].split(","))) < 200
    page.context.close()
