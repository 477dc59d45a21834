"""report.html: one self-contained page, rebuilt from the files of a run or merge directory alone.

The page holds its scripts, styles and numbers itself and asks no network for anything. All text is
escaped by the template; numbers for the drawings stand in JSON that cannot end its own element.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from braggflux.integrator.atomic import replacing
from braggflux.pipelines.config import schema
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.report import merge_folder
from braggflux.pipelines.report.comparisons import comparison_tables
from braggflux.pipelines.report.epochs import published_table, write_published_table
from braggflux.pipelines.report.figures import maps, registry
from braggflux.pipelines.report.gallery import examples
from braggflux.pipelines.report.sources import DataSource, NoDataError
from braggflux.pipelines.report.table_one import formatted, score, table_one
from braggflux.pipelines.report.verdict import summary, verdict
from braggflux.pipelines.workspace import provenance
from braggflux.pipelines.workspace.outputs import holds_merge
from braggflux.pipelines.workspace.records.readers import read_table
from braggflux.pipelines.workspace.rundir import RunDirectory

HERE = Path(__file__).parent
#: Where `braggflux view RUN_DIR` shows a reflection, by its row in intensities.h5.
VIEWER = "http://127.0.0.1:8750/reflection/"
#: Statistics that the page tabulates by shell: heading and decimals.
SHELL_COLUMNS = {
    "n_obs": ("observations", 0),
    "n_unique": ("unique", 0),
    "completeness": ("compl.", 3),
    "redundancy": ("redund.", 1),
    "i_over_sigma": ("I/σ", 1),
    "r_pim": ("R_pim", 3),
    "cc_half": ("CC1/2", 3),
    "cc_anom": ("CCanom", 3),
    "z_spread": ("spread of z", 2),
}


def write_report(run: RunDirectory) -> Path:
    """Write report.html of a run from what its directory holds; what it lacks has a reason.

    Returns
    -------
    Path
        The page.
    """
    for own in run.data_sets():
        write_published_table(own)
    return _write(run.report, _of_run(run))


def write_merge_report(
    folder: Path, model: Path | None = None, reference: Path | None = None
) -> Path:
    """Write report.html of a merge.

    Parameters
    ----------
    folder : Path
    model, reference : Path, optional
        Atomic model for maps; merged MTZ of DIALS to stand beside, with its scaled.refl in the
        same folder for the rest of Table 1.
    """
    page, sources = merge_folder.describe(folder, model, reference)
    return _write(folder / "report.html", page | _of_sources(sources))


def write_report_of(
    folder: Path, model: Path | None = None, reference: Path | None = None
) -> Path:
    """Write report.html of whatever the folder is, a run or a merge."""
    if holds_merge(folder):
        return write_merge_report(folder, model, reference)
    return write_report(RunDirectory.open(folder))


def _write(path: Path, page: dict[str, Any]) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["as_json"] = as_json
    page = page | {"file": _file, "has_3d": any(d["space"] for d in page["data_sets"])}
    text = environment.get_template("report.html.j2").render(
        **page, written=provenance.now(), sections=registry.SECTIONS, viewer=VIEWER
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def as_json(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _file(name: str) -> str:
    """Text of a style sheet or script of ours, as it is."""
    return (HERE / name).read_text(encoding="utf-8")


def _of_run(run: RunDirectory) -> dict[str, Any]:
    """Everything that the page of a run shows."""
    record, config = run.read_provenance(), run.read_config()
    notes = record["notes"]
    sources = [
        DataSource(own, own.dataset, False, config.model, config.reference, notes)
        for own in run.data_sets()
    ]
    compared = read_table(run.compare_file, ("comparison", "bin", "metric", "subject", "value"))
    head = {
        "title": run.path.absolute().name,
        "kind": "run",
        "sessions": record["sessions"],
        "inputs": record["inputs"],
        "changes": schema.difference(config, RunConfig()),
        "facts": [
            ("coupling", config.training.coupling),
            ("epochs", str(_last_epoch(run))),
            ("seed", str(config.training.seed)),
            ("time", elapsed(record["sessions"])),
        ],
        "comparisons": comparison_tables(compared),
        "boxes": examples(run.shoebox_examples),
        "dials_reports": _dials_reports(run),
    }
    return head | _of_sources(sources)


def _last_epoch(run: RunDirectory) -> int:
    metrics = run.read_metrics()
    return metrics[-1]["epoch"] if metrics else 0


def _of_sources(sources: Sequence[DataSource]) -> dict[str, Any]:
    return {"data_sets": [_of_data_set(source, k) for k, source in enumerate(sources)]}


def _of_data_set(source: DataSource, number: int) -> dict[str, Any]:
    """Verdict, tables and figures of one data set."""
    findings = verdict(source)
    return {
        "number": number,
        "name": source.name,
        "crystal": _crystal(source),
        "summary": summary(findings),
        "findings": findings,
        "peaks": _peaks(source),
        "figures": registry.drawn(source),
        "space": _or_none(source, maps.three_dimensions),
        **_tables(source),
    }


def _or_none(source: DataSource, make: Any) -> Any:
    try:
        return make(source)
    except NoDataError:
        return None


def _crystal(source: DataSource) -> list[tuple[str, str]]:
    try:
        merged = source.merged
    except NoDataError:
        return []
    cell = " ".join(f"{x:.2f}" for x in merged.cell.parameters)
    facts = [
        ("space group", merged.space_group.xhm()),
        ("cell", f"{cell} Å, °"),
        ("resolution", f"{source.asu.d_min:.2f} Å"),
    ]
    if merged.wavelength:
        facts.append(("wavelength", f"{merged.wavelength:.4f} Å"))
    return facts


def _peaks(source: DataSource) -> dict[str, Any]:
    """Table of peak heights: by epoch of a run, of the one result of a merge."""
    if not source.is_merge:
        header, rows, notes = published_table(source.files)
        return {"header": header, "rows": rows, "notes": notes}
    try:
        sites = source.once(maps.strongest_sites)
    except NoDataError as reason:
        return {"header": [], "rows": [], "notes": [str(reason)]}
    programs = list(sites[0][1])
    rows = [[s.label, *(f"{h[p]:.2f}" for p in programs)] for s, h in sites[:12]]
    return {"header": ["site", *programs], "rows": rows, "notes": []}


def _tables(source: DataSource) -> dict[str, Any]:
    """Table 1 and the table of shells."""
    try:
        scores = source.once(score)
    except NoDataError as reason:
        return {"table_one": None, "basis": "", "shells": [], "table_reason": str(reason)}
    header, rows = table_one(scores)
    shells = []
    for program, of_program in scores.rows.items():
        body = [
            [_shell_name(row), *(formatted(row.get(k), n) for k, (_, n) in SHELL_COLUMNS.items())]
            for row in of_program
        ]
        shells.append({"program": program, "rows": body})
    return {
        "table_one": {"header": header, "rows": rows},
        "basis": scores.basis,
        "both": len(scores.rows) > 1,
        "table_reason": scores.reason,
        "shells": shells,
        "shell_header": ["resolution [Å]", *(title for title, _ in SHELL_COLUMNS.values())],
    }


def _shell_name(row: dict[str, Any]) -> str:
    if row["shell"] == "overall":
        return "overall"
    return f"{float(row['d_max']):.2f}–{float(row['d_min']):.2f}"


def elapsed(sessions: Sequence[dict[str, Any]]) -> str:
    """Time that the sessions took together, in words."""
    seconds = sum(
        (datetime.fromisoformat(s["ended"]) - datetime.fromisoformat(s["started"])).total_seconds()
        for s in sessions
        if s.get("ended")
    )
    if not seconds:
        return "not ended yet"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _dials_reports(run: RunDirectory) -> list[str]:
    """Paths of DIALS' own reports, relative to the page."""
    return [f"{run.dials.name}/{path.name}" for path in sorted(run.dials.glob("*.html"))]
