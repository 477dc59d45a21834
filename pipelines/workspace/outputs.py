"""Guards of outputs: never over an earlier result, the same rule for every command.

A file or folder that holds a result is refused at the start. Only ``--resume`` (run, process) goes
on with what is there; what was interrupted before it had a result counts for nothing. `compare`
and `report` rewrite their own tables of the run that they are given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from braggflux.integrator.errors import UserError
from braggflux.pipelines.workspace.records.readers import read_json

#: How a result was made, and whether its making has ended.
PROVENANCE = "provenance.json"
#: Folder, in that of the result, of the files of a merge that has not ended.
UNFINISHED = ".unfinished"
#: Scale, B, R and I/sigma of each image of a merge in memory.
IMAGES = "images.csv"
#: What `merge` writes, whatever the data sets are called.
MERGE_RESULTS = (
    *("config.yaml", PROVENANCE, "merged.mtz", "*_merged.mtz"),
    *("half_sets.mtz", "*_half_sets.mtz", "unmerged.mtz", "*_unmerged.mtz"),
    "statistics.csv",
    *("metrics.json", "scale_model.pt", "indexing.csv", IMAGES, "report.html"),
    *("table1.*", "*_table1.*", "deposition.cif", "*_deposition.cif"),
)
#: What `simulate` writes, whatever the preset.
SIMULATE_RESULTS = ("*_master.h5", "stills.h5", "truth.*", "truth_images.npz", "model.pdb")


def require_free_file(path: Path) -> None:
    """Refuse a file that is there, and a folder that is not.

    Raises
    ------
    UserError
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} is there already; choose another --out, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.absolute().parent}; make it")


def require_free_folder(path: Path, results: Iterable[str]) -> None:
    """Refuse a folder with one of the files ``results`` (patterns).

    Raises
    ------
    UserError
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; --out must name a folder")
    for pattern in results:
        for found in sorted(path.glob(pattern)):
            raise UserError(
                f"{path} holds an earlier result ({found.name}); choose another --out, or remove "
                "it"
            )


def holds_merge(folder: Path) -> bool:
    """Whether the folder is one of `merge`; the record of a run lists its sessions."""
    return "ended" in _provenance(folder)


def move_results(unfinished: Path, folder: Path) -> None:
    """Move the files of a merge that has ended to their places, its record last.

    Killed in between, it is done again by :func:`complete_merge`.
    """
    record = unfinished / PROVENANCE
    for file in sorted(unfinished.iterdir(), key=lambda path: path == record):
        os.replace(file, folder / file.name)
    unfinished.rmdir()


def complete_merge(folder: Path) -> None:
    """Move the files of a merge that was killed while it moved them."""
    unfinished = folder / UNFINISHED
    if _provenance(unfinished).get("ended"):
        move_results(unfinished, folder)


def _provenance(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE
    return read_json(path) if path.is_file() else {}
