"""The run directory: fixed file names, atomic writes, resuming, and how it all was made.

::

    config.yaml  config.diff.yaml  provenance.json  run.log
    metrics.jsonl     one row per epoch
    stage_times.csv   epoch,stage,wall_s,cpu_s of every stage
    peaks.csv         epoch,chain,seqid,residue,atom,peak_sigma,difference,peak_sigma_own (the
                      reference has epoch DIALS)
    peaks_by_epoch.csv   epochs 1, 3, 5, ..., last, DIALS and the gain; sites across
    statistics.csv  compare.csv
    checkpoints/epoch_0007.pt  latest  mtz/epoch_0007.mtz
    merged.mtz  half_sets.mtz  unmerged.mtz  integrated.refl  integrated.expt
    table1.txt  table1.csv  table1.tex  deposition.cif
    intensities.h5  shoeboxes.h5  shoebox_examples.npz  integrator.pt  report.html
    dials/            files and logs of DIALS (`braggflux process`)

Of several data sets each has its own peaks, statistics, merged, half sets, unmerged and integrated
files, with its name before theirs: ``dark_merged.mtz``, ``mtz/dark_epoch_0007.mtz``.

Other programs depend on these names. Nothing in it is ever half written: files are written under
a temporary name and renamed.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from braggflux.integrator.atomic import remove_leftovers, replacing
from braggflux.integrator.errors import UserError, reading
from braggflux.pipelines.config import schema
from braggflux.pipelines.config.run import INTEGRATOR_FILE, RunConfig
from braggflux.pipelines.workspace import log, provenance
from braggflux.pipelines.workspace.file_sums import KEY, check_sums, sums_of
from braggflux.pipelines.workspace.lock import LOCK
from braggflux.pipelines.workspace.outputs import holds_merge
from braggflux.pipelines.workspace.records.readers import (
    REMEDY,
    RunRecord,
    read_json,
    read_metrics,
    read_table,
)
from braggflux.pipelines.workspace.stage_times import COLUMNS as STAGE_COLUMNS

if TYPE_CHECKING:
    from braggflux.pipelines.maps.anomalous_peaks import SitePeak

PEAK_COLUMNS = (
    *("epoch", "chain", "seqid", "residue", "atom"),
    *("peak_sigma", "difference", "peak_sigma_own"),
)
REFERENCE = "DIALS"
#: What `process` may leave in a run directory before training starts.
_PREPARED = {"dials", "run.log", LOCK}
#: A resumed run may differ in these: none changes what it computes (beyond rounding).
_FREE_ON_RESUME = {
    "out",
    "reference",
    "dials.nproc",
    "extraction.processes",
    "training.device",
    "training.checkpoint_every",
}


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """Replace a CSV file atomically; None becomes an empty field."""
    with replacing(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class RunDirectory:
    """Paths and records of one run.

    Parameters
    ----------
    path : Path
    dataset : str
        Data set whose files are meant, of a run of several.
    """

    def __init__(self, path: Path, dataset: str = "") -> None:
        self.path = Path(path)
        self.dataset = dataset
        stem = f"{dataset}_" if dataset else ""
        self.stem = stem
        self.config_file = self.path / "config.yaml"
        self.config_difference = self.path / "config.diff.yaml"
        self.provenance_file = self.path / "provenance.json"
        self.log_file = self.path / "run.log"
        self.metrics_file = self.path / "metrics.jsonl"
        self.peaks_file = self.path / f"{stem}peaks.csv"
        self.peaks_by_epoch = self.path / f"{stem}peaks_by_epoch.csv"
        self.statistics_file = self.path / f"{stem}statistics.csv"
        self.compare_file = self.path / "compare.csv"
        self.checkpoints = self.path / "checkpoints"
        self.latest_file = self.path / "latest"
        self.stage_times = self.path / "stage_times.csv"
        self.mtz_folder = self.path / "mtz"
        self.merged = self.path / f"{stem}merged.mtz"
        self.half_sets = self.path / f"{stem}half_sets.mtz"
        self.unmerged = self.path / f"{stem}unmerged.mtz"
        self.integrated_refl = self.path / f"{stem}integrated.refl"
        self.integrated_expt = self.path / f"{stem}integrated.expt"
        self.intensities = self.path / "intensities.h5"
        self.integrator = self.path / INTEGRATOR_FILE
        self.shoeboxes = self.path / "shoeboxes.h5"
        self.shoebox_examples = self.path / "shoebox_examples.npz"
        self.report = self.path / "report.html"
        self.dials = self.path / "dials"

    @classmethod
    def create(cls, config: RunConfig, *, resume: bool = False) -> Self:
        """Make the directory of ``config.out``, or open it again to go on.

        Raises
        ------
        UserError
            The folder holds something else, or a run and ``resume`` is false, or a run with
            another configuration or other input files. A run without a checkpoint yet counts for
            nothing: it is started again.
        """
        if config.out is None:
            raise UserError("out is not given; put it on the command line as --out DIR")
        run = cls(config.out.absolute())
        config = config.resolved()
        run.check_free(resume=resume)
        inputs = provenance.input_records(config.input_files())
        sessions: list[dict[str, Any]] = []
        if run.config_file.is_file() and run.provenance_file.is_file():
            record = run.read_provenance()
            check_sums(run.path, record)
            if change := run._change(config, inputs):
                if run.latest_file.is_file():
                    raise UserError(
                        f"--resume with {change}; undo the change or choose another --out"
                    )
                run._clear()
            else:
                sessions = record["sessions"]
                if record.pop(KEY, None):  # what follows changes the files
                    run._write_provenance(record)
        sessions.append(provenance.session_record())
        try:
            for folder in (run.path, run.checkpoints, run.mtz_folder):
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
            log.attach_file(run.log_file)
            run._write_config(config)
            run._write_provenance({"sessions": sessions, "inputs": inputs, "notes": {}})
        except (UserError, OSError):
            run.abandon()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run directory."""
        run = cls(path)
        if not run.config_file.is_file():
            raise UserError(f"{path} is not a run directory of braggflux: it has no config.yaml")
        if run.provenance_file.is_file():
            check_sums(run.path, run.read_provenance())
        return run

    def check_free(self, *, resume: bool) -> None:
        """Raise :class:`UserError` unless a run may start (or go on, with ``resume``) here."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; --out must name a folder")
        if not self.path.is_dir():
            return
        if holds_merge(self.path):
            raise UserError(f"{self.path} holds a result of merge; choose another --out")
        found = {p.name for p in self.path.iterdir()}
        if self.config_file.is_file():
            if self.latest_file.is_file() and not resume:
                raise UserError(
                    f"{self.path} already holds a run; add --resume to go on with it, "
                    "or choose another --out"
                )
        elif foreign := found - _PREPARED:
            raise UserError(
                f"{self.path} is not empty and not a run of braggflux "
                f"(it has {sorted(foreign)[0]}); choose another --out"
            )

    def read_config(self) -> RunConfig:
        """Read the configuration that the run was made with."""
        return RunConfig.load(self.config_file)

    def data_sets(self) -> list[RunDirectory]:
        """Return this directory once for each data set of the run."""
        names = [files.name for files in self.read_config().data_sets] or [""]
        return [RunDirectory(self.path, name) for name in names]

    def checkpoint(self, epoch: int) -> Path:
        """Path of the checkpoint after ``epoch``."""
        return self.checkpoints / f"epoch_{epoch:04d}.pt"

    def epoch_mtz(self, epoch: int) -> Path:
        """Path of the merged MTZ after ``epoch``."""
        return self.mtz_folder / f"{self.stem}epoch_{epoch:04d}.mtz"

    def mark_latest(self, epoch: int) -> None:
        """Name the checkpoint of ``epoch`` as the one to resume from."""
        write_text(self.latest_file, f"{self.checkpoint(epoch).name}\n")

    def latest_checkpoint(self) -> Path | None:
        """Checkpoint to resume from, or None before the first."""
        if not self.latest_file.is_file():
            return None
        with reading(self.latest_file, "write the name of a file of checkpoints into it"):
            path = self.checkpoints / self.latest_file.read_text(encoding="utf-8").strip()
            is_there = path.is_file()
        if not is_there:
            raise UserError(
                f"{self.latest_file} names {path.name}, which is not in {self.checkpoints}; "
                "write the name of a file that is there into it, or start anew in another --out"
            )
        return path

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add the row of one epoch; a number that is not finite becomes null with a reason."""
        reasons = dict(row.get("reasons", {}))
        clean: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                reasons.setdefault(key, f"not finite: {value}")
                value = None
            clean[key] = value
        if reasons:
            clean["reasons"] = reasons
        self._write_metrics([*self.read_metrics(), clean])

    def read_metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl in order of epoch."""
        return read_metrics(self.metrics_file)

    def write_stage_times(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace stage_times.csv."""
        write_rows(self.stage_times, list(rows), STAGE_COLUMNS)

    def read_stage_times(self) -> list[dict[str, Any]]:
        """Rows of stage_times.csv; those of an interrupted session stay."""
        numbers = ("wall_s", "cpu_s")
        return [
            row | {name: float(row[name]) for name in numbers}
            for row in read_table(self.stage_times, STAGE_COLUMNS)
        ]

    def write_peaks(self, epoch: int | str, peaks: Iterable[SitePeak]) -> None:
        """Set the rows of one epoch (or ``"DIALS"``) in peaks.csv; no height is an empty field."""
        rows = [r for r in self.read_peaks() if r["epoch"] != epoch]
        rows += [{"epoch": epoch} | {k: getattr(p, k) for k in PEAK_COLUMNS[1:]} for p in peaks]
        # The reference stays on top, whenever it was made.
        rows.sort(key=lambda r: -1 if r["epoch"] == REFERENCE else r["epoch"])
        write_rows(self.peaks_file, rows, PEAK_COLUMNS)

    def read_peaks(self) -> list[dict[str, Any]]:
        """Rows of peaks.csv: epoch int or ``"DIALS"``, heights float or None.

        Files of earlier versions have the heights of the own differences alone.
        """
        rows = []
        for row in read_table(self.peaks_file, PEAK_COLUMNS[:6]):
            row = {"difference": "own", "peak_sigma_own": row["peak_sigma"]} | row
            with reading(self.peaks_file, REMEDY):
                epoch = row["epoch"] if row["epoch"] == REFERENCE else int(row["epoch"])
            names = ("peak_sigma", "peak_sigma_own")
            heights = {name: float(row[name]) if row[name] else None for name in names}
            rows.append(row | heights | {"epoch": epoch})
        return rows

    def rewind(self, epoch: int) -> None:
        """Forget what was written after ``epoch`` (the checkpoint that a run resumes from)."""
        self._write_metrics([r for r in self.read_metrics() if r["epoch"] <= epoch])
        for own in self.data_sets():
            peaks = [r for r in own.read_peaks() if r["epoch"] == REFERENCE or r["epoch"] <= epoch]
            write_rows(own.peaks_file, peaks, PEAK_COLUMNS)
        for path in [*self.mtz_folder.glob("*epoch_*.mtz"), *self.checkpoints.glob("epoch_*.pt")]:
            if int(path.stem.rpartition("epoch_")[2]) > epoch:
                path.unlink()

    def read_provenance(self) -> dict[str, Any]:
        """Sessions, input digests and notes."""
        return read_json(self.provenance_file, RunRecord)

    def note(self, key: str, text: str) -> None:
        """Keep a remark, e.g. why the reference is missing; tables and the report show it."""
        record = self.read_provenance()
        record["notes"][key] = text
        self._write_provenance(record)

    def finish(self) -> None:
        """Record the end of this session."""
        record = self.read_provenance()
        record["sessions"][-1]["ended"] = provenance.now()
        record[KEY] = sums_of(self.path)
        self._write_provenance(record)

    def _change(self, config: RunConfig, inputs: dict[str, dict[str, Any]]) -> str:
        """Difference to the run that is here, in words; empty where there is none."""
        changed = set(schema.difference(config, self.read_config())) - _FREE_ON_RESUME
        if changed:
            names = ", ".join(sorted(changed))
            return f"another configuration than {self.config_file} ({names})"
        before = self.read_provenance()["inputs"]
        for name, record in inputs.items():
            if name in before and before[name]["sha256"] != record["sha256"]:
                return f"another input ({name} {record['path']} has changed since the run began)"
        return ""

    def abandon(self) -> None:
        """Leave nothing of a run that failed before its first checkpoint, but `process`' part."""
        if self.latest_file.is_file():
            return
        self._clear()
        for path in (self.config_file, self.config_difference, self.provenance_file):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.mtz_folder):
            shutil.rmtree(folder, ignore_errors=True)
        if {p.name for p in self.path.glob("*")} <= {self.log_file.name, LOCK}:
            self.log_file.unlink(missing_ok=True)  # the lock goes with its holder

    def _clear(self) -> None:
        """Remove what an earlier configuration has left before its first checkpoint."""
        records = [self.metrics_file, self.stage_times, self.shoeboxes, self.intensities]
        for kind in ("peaks.csv", "peaks_by_epoch.csv", "statistics.csv", "half_sets.mtz"):
            records += self.path.glob(f"*{kind}")
        for path in records:
            path.unlink(missing_ok=True)

    def _write_config(self, config: RunConfig) -> None:
        head = f"# braggflux {provenance.package_version()}"
        text = schema.annotated_yaml(config)
        write_text(self.config_file, f"{head}, every option of this run\n{text}")
        changes = schema.nest(schema.difference(config, RunConfig()))
        text = yaml.safe_dump(changes, sort_keys=False) if changes else "{}\n"
        write_text(self.config_difference, f"{head}, options that are not the default\n{text}")

    def _write_provenance(self, record: dict[str, Any]) -> None:
        write_text(self.provenance_file, json.dumps(record, indent=2) + "\n")

    def _write_metrics(self, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        write_text(self.metrics_file, "".join(lines))
