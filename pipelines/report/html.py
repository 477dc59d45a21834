"""report.html: one self-contained page, rebuilt from the files of a run directory alone."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from braggflux.integrator.atomic import replacing
from braggflux.integrator.errors import UserError
from braggflux.pipelines.config import schema
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.report import figures, plots
from braggflux.pipelines.report.epochs import published_table, write_published_table
from braggflux.pipelines.workspace import provenance
from braggflux.pipelines.workspace.rundir import RunDirectory, read_rows

#: Statistics that the page tabulates, with their heading.
SHELL_COLUMNS = {
    "n_obs": "observations",
    "n_unique": "unique",
    "completeness": "compl.",
    "redundancy": "redund.",
    "i_over_sigma": "I/sigma",
    "r_pim": "R_pim",
    "cc_half": "CC1/2",
    "cc_anom": "CCanom",
    "z_spread": "z spread",
}


def write_report(run: RunDirectory) -> Path:
    """Write report.html from what the run directory holds; what it lacks is named with a reason.

    Returns
    -------
    Path
        The page.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(**collect(run))
    for own in run.data_sets():
        write_published_table(own)
    with replacing(run.report) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run.report


def collect(run: RunDirectory) -> dict[str, Any]:
    """Gather everything that the page shows."""
    metrics = run.read_metrics()
    comparison = read_rows(run.compare_file)
    record = run.read_provenance()
    config = run.read_config()
    return {
        "title": run.path.absolute().name,
        "session": record["sessions"][-1],
        "n_sessions": len(record["sessions"]),
        "inputs": record["inputs"],
        "notes": record["notes"],
        "changes": schema.difference(config, RunConfig()),
        "written": provenance.now(),
        "figures": figures.drawn(run),
        "data_sets": [_of_data_set(own) for own in run.data_sets()],
        "last_epoch": _last_epoch(metrics),
        "comparisons": _comparisons(comparison),
        "shoeboxes": _shoeboxes(run.shoebox_examples),
    }


def _of_data_set(own: RunDirectory) -> dict[str, Any]:
    """Peaks and statistics of one data set; its name is empty where there is one."""
    header, rows, notes = published_table(own)
    return {
        "name": own.dataset,
        "peaks": {"header": header, "rows": rows, "notes": notes},
        "figures": figures.drawn(own),
        "statistics": _shell_table(read_rows(own.statistics_file)),
    }


def _last_epoch(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """Numbers of the last row; peak heights have their own table."""
    if not metrics:
        return {}
    reasons = metrics[-1].get("reasons", {})
    shown = {}
    for key, value in metrics[-1].items():
        if key == "reasons" or key.startswith("peak_sigma"):
            continue
        missing = f"missing: {reasons.get(key, 'not computed')}"
        shown[key] = missing if value is None else _entry(np.asarray(value))
    return shown


def _shell_table(rows: list[dict[str, str]]) -> dict[str, Any]:
    header = ["resolution [A]", *SHELL_COLUMNS.values()]
    body = [
        [_shell_name(row), *(_short(row.get(column)) for column in SHELL_COLUMNS)] for row in rows
    ]
    return {"header": header, "rows": body}


def _shell_name(row: dict[str, str]) -> str:
    if row["shell"] == "overall":
        return "overall"
    return f"{float(row['d_max']):.2f} - {float(row['d_min']):.2f}"


def _comparisons(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """One table, and a figure where bars say more, for each comparison of compare.csv."""
    shown = {
        "merged against the truth by resolution [A]": ("cc Bijvoet", "R F"),
        "observations against true photons": ("rms error", "spread of z"),
        "observations against true photons, not cut by an edge or gap": (
            *("rms error", "spread of z"),
        ),
        "error by distance to the next spot [pixels]": ("rms error / bound", "spread of z"),
        "error by place on the detector: resolution [A]": ("rms error / bound", "spread of z"),
        "observations by I/sigma of DIALS": ("cc", "median ratio", "sigma ratio"),
        "merged by resolution [A]": ("cc I", "cc Bijvoet"),
    }
    tables = []
    for title in dict.fromkeys(row["comparison"] for row in rows):
        entries = [row for row in rows if row["comparison"] == title]
        columns = list(dict.fromkeys((r["metric"], r["subject"]) for r in entries))
        values = {(r["bin"], r["metric"], r["subject"]): r["value"] for r in entries}
        body = [
            [name, *(_short(values.get((name, *column))) for column in columns)]
            for name in dict.fromkeys(r["bin"] for r in entries)
        ]
        tables.append(
            {
                "title": title,
                "header": ["", *(f"{metric} ({subject})" for metric, subject in columns)],
                "rows": body,
                "reasons": list(dict.fromkeys(r["reason"] for r in entries if r["reason"])),
                "figure": plots.comparison_by_bin(rows, title, shown.get(title, ())),
            }
        )
    return tables


def _shoeboxes(path: Path) -> list[dict[str, Any]]:
    """Picture and words for each sample box; every further (n,) or (n, 3) array is shown."""
    if not path.is_file():
        return []
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to go without it") from error
    counts, rate = arrays.pop("counts"), arrays.pop("rate", None)
    is_valid = arrays.pop("is_valid", np.ones(counts.shape, bool)).astype(bool)
    boxes = []
    for i in itertools.islice(range(len(counts)), plots.MAX_SHOEBOXES):
        expected = None if rate is None else rate[i]
        words = {name.replace("_", " "): _entry(values[i]) for name, values in arrays.items()}
        boxes.append({"figure": plots.shoebox(counts[i], expected, is_valid[i]), "words": words})
    return boxes


def _entry(value: Any) -> str:
    return " ".join(f"{x:.4g}" if x.dtype.kind == "f" else str(x) for x in np.atleast_1d(value))


def _short(text: str | None) -> str:
    """Four digits of a number, a dash for what is missing."""
    if not text:
        return "-"
    number = float(text)
    return str(int(number)) if number.is_integer() and abs(number) > 1 else f"{number:.4g}"
