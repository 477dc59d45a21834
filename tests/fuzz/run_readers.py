"""A run directory of which one file is damaged, read as `view`, `report` and `--resume` do."""

from __future__ import annotations

import json
import shutil
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import possible
import seeds
from edits import Edit, byte_edits, edited_bytes, edited_text, pick, text_edits
from readers import Paths, Reader, n_edits

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulated_run import write_run

from braggflux.pipelines.config.schema import load_mapping
from braggflux.pipelines.report.gallery import examples
from braggflux.pipelines.report.html import elapsed
from braggflux.pipelines.workspace.image_statistics import read_image_statistics
from braggflux.pipelines.workspace.outputs import IMAGES, holds_merge
from braggflux.pipelines.workspace.records.readers import MergeRecord, read_json, read_table
from braggflux.pipelines.workspace.rundir import RunDirectory

TEXTS = {
    "config.yaml": "training:\n  epochs: 3\n  seed: 4\nmerge:\n  anomalous: true\n",
    "provenance.json": "",
    "metrics.jsonl": "".join(
        json.dumps({"epoch": k, "wall_s": 2.5, "lr": None, "reasons": {"lr": "none"}}) + "\n"
        for k in range(3)
    ),
    "stage_times.csv": "epoch,stage,wall_s,cpu_s\n0,extraction,1.5,1.2\n1,training,3.5,3.2\n",
    "peaks.csv": "epoch,chain,seqid,residue,atom,peak_sigma,difference,peak_sigma_own\n"
    "DIALS,A,6,CYS,SG,5.6,own,5.6\n1,A,6,CYS,SG,,shared,5.1\n2,A,6,CYS,SG,6.6,shared,5.2\n",
    "statistics.csv": "shell,d_max,d_min,n_obs,cc_half,reason\n0,50,5,2851,.99,\n"
    "overall,50,2,9851,,too few\n",
    "compare.csv": "comparison,bin,metric,subject,value,n,reason\n"
    "observations,<= 1,cc,ours vs DIALS,0.95,1381,\n",
    "images.csv": "dataset,image,n_obs,scale,b_factor,r,i_over_sigma,chi2\n"
    ",1,20,1.1,,0.1,9,1\n,2,20,1.2,2,0.1,8,1\n",
    "merge.json": "",
    "latest": "epoch_0002.pt\n",
}


class RunOnDisk(Reader):
    """Run directory: records, tables and examples."""

    name, seed = "run-directory", "shoebox_examples.npz"

    @cached_property
    def path(self) -> Path:
        folder = seeds.folder() / "run-seed"
        run = write_run(folder, 40).path
        record = json.loads((run / "provenance.json").read_text())
        record["inputs"] = {"expt": {"path": "a.expt", "size": 7, "sha256": "0" * 64}}
        git = {"commit": "0" * 40, "has_uncommitted_changes": False}
        record["sessions"][0] |= {"argv": ["braggflux", "run"], "host": "vm", "git": git}
        made = record["sessions"][0] | {"inputs": record["inputs"]}
        texts = TEXTS | {"provenance.json": json.dumps(record), "merge.json": json.dumps(made)}
        for name, text in texts.items():
            (run / name).write_text(text)
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "epoch_0002.pt").touch()
        boxes = np.random.default_rng(0).poisson(3.0, (4, 3, 7, 7))
        arrays = {"counts": boxes, "rate": 3.0 + 0.0 * boxes, "row": np.arange(4)}
        np.savez(run / self.seed, **arrays, kind=np.array(["sample"] * 4), d=np.ones(4))
        return run / self.seed

    def edits(self, rng: np.random.Generator) -> list[Edit]:
        if rng.random() < 0.15:
            return [[self.seed, byte_edits(rng, self.path.stat().st_size, n_edits(rng))]]
        name = pick(rng, list(TEXTS))
        if rng.random() < 0.2:
            size = self.path.with_name(name).stat().st_size
            return [[name, "bytes", byte_edits(rng, size, n_edits(rng))]]
        return [[name, "text", text_edits(rng, n_edits(rng))]]

    def damaged(self, edits: list[Edit]) -> bytes:
        raise NotImplementedError

    def write(self, edits: list[Edit], folder: Path) -> Paths:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.path.parent, run)
        for name, *how, changes in edits:
            path = run / name
            if how == ["text"]:
                path.write_bytes(edited_text(path.read_text(), changes).encode())
            else:
                path.write_bytes(edited_bytes(path.read_bytes(), changes))
        return [run]

    def read(self, paths: Paths) -> list[str]:
        run = RunDirectory.open(paths[0])
        wrong = possible.settings({"epochs": run.read_config().training.epochs})
        holds_merge(run.path)
        record = run.read_provenance()
        elapsed(record["sessions"])
        read_json(run.path / "merge.json", MergeRecord)
        load_mapping(run.config_file)
        run.latest_checkpoint()
        wrong += [f"epoch {r['epoch']}" for r in run.read_metrics() if not r["epoch"] >= 0]
        times = [row[name] for row in run.read_stage_times() for name in ("wall_s", "cpu_s")]
        heights = [row["peak_sigma"] or 0.0 for row in run.read_peaks()]
        wrong += possible.finite({"times": times, "heights": heights})
        for path in (run.statistics_file, run.compare_file):
            rows = read_table(path)
            numbers = [float(row.get(k) or 0) for row in rows for k in ("d_max", "value", "n")]
            wrong += possible.finite({path.name: numbers})
        statistics = read_image_statistics(run.path / IMAGES)
        if statistics is not None and statistics.image.dtype.kind != "i":
            wrong.append("images without number")
        json.dumps(examples(run.shoebox_examples), default=str)
        return wrong
