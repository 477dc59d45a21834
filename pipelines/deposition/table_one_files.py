"""Table 1 for a paper: as text, CSV and LaTeX, of what the report's scorer says."""

from __future__ import annotations

import csv
import io
import textwrap

from braggflux.merge.output.statistics import Row
from braggflux.pipelines.report.sources import DataSource
from braggflux.pipelines.report.table_one import ENTRIES, Scores, formatted
from braggflux.pipelines.workspace.provenance import package_version

#: Characters of a name and of a number: 80 with two programs.
NAME_WIDTH, WIDTH = 26, 9
#: Place of a row in the statistics, by the name of its column.
PLACES = {"overall": -1, "inner": 0, "outer": -2}
#: What each row of the table is, in the order of the table.
DEFINITIONS = {
    "n_obs": "scaled observations in the statistics; outliers are left out",
    "n_unique": "Bijvoet mates count as one",
    "redundancy": "observations / unique reflections",
    "completeness": "unique / possible reflections, systematic absences not among them",
    "i_over_sigma": "mean of I / sigma(I) of merged intensities, I weighted by 1 / sigma^2",
    "r_merge": "sum |I_i - <I>| / sum I_i, reflections seen at least twice, mates together",
    "r_meas": "R_merge with (n / (n - 1))^(1/2) for n observations (Diederichs & Karplus 1997)",
    "r_pim": "R_merge with (1 / (n - 1))^(1/2) (Weiss 2001)",
    "cc_half": "correlation of random halves of the observations (Karplus & Diederichs 2012)",
    "anomalous_completeness": "acentrics with both mates / possible acentrics",
    "anomalous_redundancy": "observations / unique reflections, mates apart",
    "cc_anom": "correlation of the Bijvoet differences of the same halves, acentrics",
}
#: Heading in the text; what stands above it is the table.
HEADING = "Definitions"
LIMITS = {"d_max": "Low resolution [A]", "d_min": "High resolution [A]"}
TEX_NAMES = {
    "Mean I/σ(I)": r"$\langle I/\sigma(I)\rangle$",
    "R_merge": r"$R_\mathrm{merge}$",
    "R_meas": r"$R_\mathrm{meas}$",
    "R_pim": r"$R_\mathrm{pim}$",
    "CC1/2": r"CC$_{1/2}$",
    "CCanom": r"CC$_\mathrm{anom}$",
}


def text_table(source: DataSource, scores: Scores) -> str:
    """Table 1 in at most 80 columns of ASCII, with definitions."""
    programs = list(scores.rows)
    lines = [f"Table 1. Data collection and merging. braggflux {package_version()}", ""]
    lines += [f"{name:<{NAME_WIDTH}} {value}" for name, value in crystal(source)]
    heads = "".join(f"{name:^{WIDTH * len(PLACES)}}" for name in programs)
    lines += ["", f"{'':<{NAME_WIDTH}}{heads}".rstrip()]
    for name, values in (("", list(PLACES) * len(programs)), *_rows(scores)):
        cells = "".join(f"{v:>{WIDTH}}" for v in values)
        lines.append(f"{_ascii(name):<{NAME_WIDTH}}{_ascii(cells)}")
    notes = [f"From {scores.basis}."]
    if scores.reason:
        notes.append(f"DIALS: {scores.reason.removeprefix('DIALS ')}.")
    notes += ["Inner and outer: first and last of ten shells of equal volume.", "", HEADING]
    titles = {key: title for key, title, _ in ENTRIES}
    notes += [f"{_ascii(titles[key])}: {text}" for key, text in DEFINITIONS.items()]
    return "\n".join([*lines, "", *map(_folded, notes)]) + "\n"


def csv_table(source: DataSource, scores: Scores) -> str:
    """Table 1 with full precision: quantity, name, one column for each program and place."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [f"{program} {place}" for program in scores.rows for place in PLACES]
    writer.writerow(["quantity", "name", *columns, "definition"])
    for name, value in crystal(source):
        writer.writerow([_ascii(name), "", value, *[""] * len(columns)])
    for key, title in (*LIMITS.items(), *((key, title) for key, title, _ in ENTRIES)):
        values = [_raw(row.get(key)) for row in _placed(scores)]
        title = title.replace(" [%]", "")  # shares of one here
        writer.writerow([key, _ascii(title), *values, DEFINITIONS.get(key, "")])
    return file.getvalue()


def latex_table(source: DataSource, scores: Scores) -> str:
    r"""Table 1 as a LaTeX tabular; needs ``\usepackage{booktabs}``."""
    programs, n = list(scores.rows), len(PLACES)
    heads = "".join(rf" & \multicolumn{{{n}}}{{c}}{{{_tex(name)}}}" for name in programs)
    places = "".join(f" & {place.capitalize()}" for _ in programs for place in PLACES)
    width = n * len(programs)
    lines = [
        f"% braggflux {package_version()}; \\usepackage{{booktabs}}",
        rf"\begin{{tabular}}{{l{'r' * width}}}",
        r"\toprule",
        *(
            rf"{_tex(name)} & \multicolumn{{{width}}}{{l}}{{{_tex(value)}}} \\"
            for name, value in crystal(source)
        ),
        r"\midrule",
        rf"{heads} \\",
        rf"{places} \\",
        r"\midrule",
        *(
            rf"{_tex(name)} & {' & '.join(_tex(v) for v in values)} \\"
            for name, values in _rows(scores)
        ),
        r"\bottomrule",
        r"\end{tabular}",
        *(f"% {_ascii(title)}: {DEFINITIONS[key]}" for key, title, _ in ENTRIES),
    ]
    return "\n".join(lines) + "\n"


def crystal(source: DataSource) -> list[tuple[str, str]]:
    """Space group, cell and wavelength."""
    merged = source.merged
    a, b, c, *angles = merged.cell.parameters
    facts = [
        ("Space group", merged.space_group.xhm()),
        ("a, b, c [A]", f"{a:.3f} {b:.3f} {c:.3f}"),
        ("alpha, beta, gamma [deg]", " ".join(f"{angle:.2f}" for angle in angles)),
    ]
    if merged.wavelength:
        facts.append(("Wavelength [A]", f"{merged.wavelength:.5f}"))
    return facts


def _placed(scores: Scores) -> list[Row]:
    return [rows[at] for rows in scores.rows.values() for at in PLACES.values()]


def _rows(scores: Scores) -> list[tuple[str, list[str]]]:
    """Name and printed values of each row."""
    rows = []
    for key, title, decimals in (*((key, title, 2) for key, title in LIMITS.items()), *ENTRIES):
        factor = 100 if title.endswith("[%]") else 1
        rows.append((title, [formatted(r.get(key), decimals, factor) for r in _placed(scores)]))
    return rows


def _raw(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _ascii(text: str) -> str:
    for character, plain in {"σ": "sig", "Å": "A", "–": "-"}.items():
        text = text.replace(character, plain)
    return text


def _tex(text: str) -> str:
    if text in TEX_NAMES:
        return TEX_NAMES[text]
    for character, escaped in {"%": r"\%", "_": r"\_", "–": "--", "Å": r"\AA{}"}.items():
        text = text.replace(character, escaped)
    return text.replace("[A]", r"[\AA]")


def _folded(line: str) -> str:
    return textwrap.fill(line, 79, subsequent_indent="  ")
