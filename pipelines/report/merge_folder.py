"""A folder of `braggflux merge` as sources of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braggflux.integrator.errors import UserError
from braggflux.pipelines.config.schema import load_mapping
from braggflux.pipelines.report.sources import DataSource
from braggflux.pipelines.workspace.file_sums import check_sums
from braggflux.pipelines.workspace.outputs import PROVENANCE
from braggflux.pipelines.workspace.records.readers import MergeRecord, read_json
from braggflux.pipelines.workspace.rundir import RunDirectory


def describe(
    folder: Path, model: Path | None, reference: Path | None
) -> tuple[dict[str, Any], list[DataSource]]:
    """Head of the page and the data sets.

    Raises
    ------
    UserError
        A file that was given does not exist.
    """
    for option, path in (("--model", model), ("--reference", reference)):
        if path is not None and not path.is_file():
            raise UserError(f"{option} {path} does not exist")
    record = read_json(folder / PROVENANCE, MergeRecord)
    check_sums(folder, record)
    config = load_mapping(folder / "config.yaml")
    found = sorted({*folder.glob("merged.mtz"), *folder.glob("*_merged.mtz")})
    if not found:
        raise UserError(f"{folder} holds no merged.mtz; give the merge again, in another --out")
    stems = [path.name.removesuffix("merged.mtz").removesuffix("_") for path in found]
    is_still, model = bool(config.get("stills")), model or _model(record)
    sources = [
        DataSource(RunDirectory(folder, stem), stem, True, model, reference, is_still=is_still)
        for stem in stems
    ]
    head = {
        "title": folder.absolute().name,
        "kind": "merge",
        "sessions": [record],
        "inputs": record["inputs"],
        "changes": {},
        "facts": [
            ("data", _kind(config)),
            ("seed", str(config.get("seed"))),
            ("time", _elapsed(record)),
        ],
        "comparisons": [],
        "boxes": None,
        "dials_reports": [],
    }
    return head, sources


def _model(record: dict[str, Any]) -> Path | None:
    """Coordinates among the inputs: --prior-model."""
    for file in record["inputs"].values():
        path = Path(file["path"])
        if path.suffix.lower() in {".pdb", ".cif", ".ent"} and path.is_file():
            return path
    return None


def _kind(config: dict[str, Any]) -> str:
    geometry = "stills" if config.get("stills") else "Laue" if config.get("laue") else "rotation"
    return f"{geometry}, {'Bijvoet mates apart' if config.get('anomalous') else 'mates together'}"


def _elapsed(record: dict[str, Any]) -> str:
    from datetime import datetime

    if not record.get("ended"):
        return "not ended yet"
    begun, ended = (datetime.fromisoformat(record[k]) for k in ("started", "ended"))
    minutes, seconds = divmod(int((ended - begun).total_seconds()), 60)
    return f"{minutes} min {seconds} s"
