"""Table 1 and mmCIF of every data set of a run or a merge."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import gemmi

from braggflux.integrator.atomic import replacing
from braggflux.merge.io.formats.unmerged_mtz import load_mtz
from braggflux.pipelines.deposition.mmcif import METHOD, METHOD_OF_MERGE, deposition_text
from braggflux.pipelines.deposition.table_one_files import (
    HEADING,
    csv_table,
    latex_table,
    text_table,
)
from braggflux.pipelines.report import merge_folder
from braggflux.pipelines.report.sources import OURS, DataSource, NoDataError
from braggflux.pipelines.report.table_one import score
from braggflux.pipelines.workspace.outputs import holds_merge
from braggflux.pipelines.workspace.provenance import package_version
from braggflux.pipelines.workspace.rundir import RunDirectory

#: Observations that go into the mmCIF, 60 bytes each.
MOST_UNMERGED = 2_000_000

logger = logging.getLogger(__name__)


def write_deposition(folder: Path, reference: Path | None = None) -> list[Path]:
    """Write table1.txt, .csv, .tex and deposition.cif of each data set.

    Parameters
    ----------
    folder : Path
        Of a run or a merge.
    reference : Path, optional
        Merged MTZ of DIALS for a merge, which knows none; its scaled.refl beside it is used.

    Returns
    -------
    list of Path
        What was written.
    """
    written: list[Path] = []
    for source in _sources(folder, reference):
        try:
            written += _write(source)
        except NoDataError as reason:
            logger.warning("no Table 1 and no mmCIF: %s", reason)
    return written


def show_table_one(written: Iterable[Path]) -> None:
    """Print each Table 1 among files that :func:`write_deposition` has written."""
    for path in written:
        if path.name.endswith("table1.txt"):
            table, _, _ = path.read_text(encoding="utf-8").partition(f"\n\n{HEADING}\n")
            sys.stdout.write(f"{table}\n\n")


def _sources(folder: Path, reference: Path | None) -> Iterator[DataSource]:
    if holds_merge(folder):
        yield from merge_folder.describe(folder, None, reference)[1]
        return
    run = RunDirectory.open(folder)
    config, notes = run.read_config(), run.read_provenance()["notes"]
    for own in run.data_sets():
        yield DataSource(own, own.dataset, False, config.model, config.reference, notes)


def _write(source: DataSource) -> list[Path]:
    files, scores = source.files, score(source)
    texts = {
        f"{files.stem}table1.txt": text_table(source, scores),
        f"{files.stem}table1.csv": csv_table(source, scores),
        f"{files.stem}table1.tex": latex_table(source, scores),
    }
    if files.merged.is_file():
        texts[f"{files.stem}deposition.cif"] = deposition_text(
            load_mtz(files.merged),
            _unmerged(files),
            scores.rows[OURS],
            _software(source),
            METHOD_OF_MERGE if source.is_merge else METHOD,
        )
    for name, text in texts.items():
        with replacing(files.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [files.path / name for name in texts]


def _unmerged(files: RunDirectory) -> gemmi.Mtz | None:
    """Scaled observations, unless there are none or too many for a text file."""
    if not files.unmerged.is_file():
        return None
    mtz = load_mtz(files.unmerged)
    if mtz.nreflections <= MOST_UNMERGED:
        return mtz
    logger.info(
        "deposition.cif holds the merged reflections alone: %d observations are more than %d; "
        "`gemmi mtz2cif merged.mtz unmerged.mtz sf.cif` writes both",
        *(mtz.nreflections, MOST_UNMERGED),
    )
    return None


def _software(source: DataSource) -> Sequence[tuple[str, str | None, str]]:
    """Programs with their part, in the words of the PDB."""
    ours = package_version()
    merged = ("braggflux", ours, "data scaling")
    if source.is_merge:
        return (merged,)
    return (("DIALS", _dials_version(source), "data reduction"),
            ("braggflux", ours, "data reduction"), merged)  # fmt: skip


def _dials_version(source: DataSource) -> str | None:
    """Version in the head of a log of DIALS, where `process` ran it."""
    for path in sorted(source.files.dials.glob("dials.*.log")):
        head = path.read_text(encoding="utf-8", errors="replace")[:500]
        if found := re.search(r"^DIALS (\d\S*)", head, re.MULTILINE):
            return found[1]
    return None
