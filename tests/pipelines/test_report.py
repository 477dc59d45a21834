"""report.html and the terminal tables."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pytest

from braggflux.merge.output.statistics import write_statistics_csv
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.maps.anomalous_peaks import COUPLED, SitePeak
from braggflux.pipelines.report import terminal
from braggflux.pipelines.report.epochs import published_table, show_peaks
from braggflux.pipelines.report.html import write_report
from braggflux.pipelines.report.terminal import peaks_table, plain_table
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.records.readers import read_rows
from braggflux.pipelines.workspace.rundir import RunDirectory


@pytest.fixture
def run(tmp_path):
    yield RunDirectory.create(RunConfig(out=tmp_path / "run"))
    log.detach_files()


def sites(scale: float) -> list[SitePeak]:
    iodides = [
        SitePeak("A", str(204 + i), "IOD", "I", scale * h) for i, h in enumerate((20, 15, 18))
    ]
    return [SitePeak("A", str(i), "CYS", "SG", scale * (4 + i % 3)) for i in range(1, 9)] + iodides


def fill(run: RunDirectory) -> None:
    run.write_peaks("DIALS", sites(1.0))
    for epoch in (1, 2, 3):
        run.write_peaks(epoch, sites(0.3 * epoch))
        run.append_metrics({"epoch": epoch, "elbo": -10.0 / epoch, "nll": 9.0, "kl_profile": 1.0})
    rows = [
        {"shell": i, "d_max": 5.0 - i, "d_min": 4.0 - i, "cc_half": 0.99, "cc_anom": 0.5 - 0.1 * i}
        for i in range(3)
    ]
    write_statistics_csv(run.statistics_file, [*rows, rows[0] | {"shell": "overall"}])
    rng = np.random.default_rng(0)
    shape = (2, 3, 7, 7)
    np.savez(
        run.shoebox_examples,
        counts=rng.poisson(2.0, shape),
        rate=np.full(shape, 2.0),
        is_valid=rng.random(shape) > 0.2,
        miller_index=np.array([[1, 2, 3], [-4, 5, 6]]),
        posterior_mean=np.array([12.345, 6.0]),
    )


class Page(html.parser.HTMLParser):
    """Elements of a page, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open_tags: list[str] = []
        self.panels = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in {"img", "script", "link"}:
            self.fetched += [attributes[k] for k in ("src", "href") if k in attributes]
        self.panels += "data-panel" in attributes
        if tag not in {"img", "meta", "link", "input"}:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


def numbers(text: str) -> dict:
    """What the scripts of a page draw."""
    return json.loads(re.search(r'id="numbers">(.*?)</script>', text).group(1))


def test_page_is_whole_and_self_contained(run):
    fill(run)
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open_tags == []
    assert page.fetched == []
    data = numbers(text)
    assert len(data["panels"]) == page.panels > 5
    assert [set(box) for box in data["boxes"]] == [{"counts", "model", "residual"}] * 2
    assert "-4 5 6" in text
    assert "12.35" in text or "12.34" in text
    assert len(text) < 4_000_000


def test_nothing_in_a_name_can_become_markup(run):
    evil = "</script><script>alert(1)</script>"
    run.write_peaks(1, [SitePeak(evil, "1", "IOD", "I", 9.0)])
    run.note("reference", evil)
    text = write_report(run).read_text(encoding="utf-8")
    assert evil not in text
    assert text.count("<script") == 3  # numbers, plotly, ours
    assert evil in numbers(text)["panels"][0]["traces"][0]["name"]


def test_page_shows_the_numbers_of_the_tables(run):
    fill(run)
    text = write_report(run).read_text(encoding="utf-8")
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", text)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert ["epoch", "IOD 204", "IOD 205", "IOD 206", "CYS SG, mean of 8"] in cells
    assert ["3", "18.00", "13.50", "16.20", "4.61"] in cells
    assert ["DIALS", "20.00", "15.00", "18.00", "5.12"] in cells


def test_page_of_a_run_that_has_only_begun(run):
    run.note("reference", "dials.merge failed: Sorry: <nothing> left")
    text = write_report(run).read_text(encoding="utf-8")
    assert Page(text).open_tags == []
    assert "no DIALS row: dials.merge failed: Sorry: &lt;nothing&gt; left" in text
    for reason in ("no epoch has ended yet", "statistics.csv is not there yet"):
        assert reason in text


def test_page_is_the_same_when_rebuilt(run):
    fill(run)
    first, second = (write_report(run).read_text(encoding="utf-8") for _ in range(2))
    written = r"Page written [^<]*"
    assert re.sub(written, "", first) == re.sub(written, "", second)


def test_peaks_table_groups_sites(run):
    run.write_peaks(
        1, [SitePeak("A", "204", "IOD", "I", 3.0), SitePeak("B", "204", "IOD", "I", 5)]
    )
    header, rows, notes = peaks_table(run)
    assert header == ["epoch", "IOD A204", "IOD B204"]
    assert rows == [["1", "3.00", "5.00"]]
    assert notes == []


def test_tables_say_which_differences_they_used(run, capsys):
    run.write_peaks("DIALS", [SitePeak("A", "204", "IOD", "I", 9.0)])
    run.write_peaks(1, [SitePeak("A", "204", "IOD", "I", 17.0, "", COUPLED, 16.0)])
    header, rows, notes = peaks_table(run)
    assert (header, rows) == (["epoch", "IOD 204"], [["1", "17.00"], ["DIALS", "9.00"]])
    said = "heights in the map of DANO, the coupled difference, unweighted; DIALS: of F(+) - F(-)"
    assert notes[0].startswith(said)
    assert notes[1] == "epoch 1 by F(+) - F(-), weighted: IOD 204 16.00"
    show_peaks(run)
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in write_report(run).read_text(encoding="utf-8")


def test_peak_without_height_is_a_dash(run):
    run.write_peaks(1, [SitePeak("A", "204", "IOD", "I", None, "too few pairs")])
    assert peaks_table(run)[1] == [["1", "-"]]


def test_peaks_on_the_terminal_end_with_the_reference(run, capsys):
    fill(run)
    show_peaks(run)
    table, notes = capsys.readouterr().out.split("\n\n", 1)
    lines = table.splitlines()
    assert lines[1].split()[:3] == ["epoch", "IOD", "204"]
    assert lines[-1].split() == ["DIALS", "20.00", "15.00", "18.00", "5.12"]
    assert notes.strip().startswith("- epoch 3 over DIALS [%]: IOD 204 -10.0, IOD 205 -10.0")


def test_published_table_is_odd_epochs_the_last_and_the_gain(run):
    run.write_peaks("DIALS", sites(1.0))
    for epoch in range(7):
        run.write_peaks(epoch, sites(0.2 * epoch))
    _, rows, notes = published_table(run)
    assert [row[0] for row in rows] == ["1", "3", "5", "6", "DIALS"]
    assert notes[-1].startswith("epoch 6 over DIALS [%]: IOD 204 +20.0")
    write_report(run)
    written = read_rows(run.peaks_by_epoch)
    assert [row["epoch"] for row in written] == ["1", "3", "5", "6", "DIALS", "gain [%]"]
    assert written[-1]["IOD 206"] == "+20.0"
    assert float(written[0]["IOD 204"]) == 4.0


def test_published_table_without_a_reference_has_no_gain(run):
    run.write_peaks(1, [SitePeak("A", "204", "IOD", "I", None, "too few pairs")])
    assert published_table(run)[1] == [["1", "-"]]
    write_report(run)
    assert read_rows(run.peaks_by_epoch) == [{"epoch": "1", "IOD 204": ""}]


def test_without_a_model_the_reason_is_said(run, capsys):
    run.note("peaks", "they need the phases of a model, and none was given (--model)")
    show_peaks(run)
    assert capsys.readouterr().out.startswith("no peaks: they need the phases of a model")


def test_plain_table_is_aligned():
    lines = plain_table("t", ["a", "long"], [["x", "1"], ["yyy", "22"]])
    assert lines == ["t", "a    long", "---  ----", "x       1", "yyy    22"]


def test_terminal_gets_a_frame_with_the_same_cells(run, capsys, monkeypatch):
    fill(run)
    monkeypatch.setattr(terminal.sys.stdout, "isatty", lambda: True, raising=False)
    show_peaks(run)
    out = capsys.readouterr().out
    assert "18.00" in out
    assert "━" in out
