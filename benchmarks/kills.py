"""Kill a command with -9 at random moments, go on, and compare the end with an undisturbed one.

    python benchmarks/kills.py --command run --kills 50 --seed 0 --out DIR

Frames are simulated (preset ``tiny``) into DIR. A command is killed at a moment that is uniform
over the length of the undisturbed one, given again, killed again, and so on until it ends before
its moment; what it has then made is compared, and the next one starts in an empty folder. Only
commands that were alive when the signal came count as kills. ``run`` and ``process`` (in DIALS'
steps too: the whole process group dies) go on with ``--resume``; ``merge`` is given again, since a
killed one has no result, or one that ``report`` completes.

An end is *equal* where all columns of all MTZ files are equal bit for bit, tables and mmCIF word
for word, metrics but for times, and the folder holds the same files as after the undisturbed
command. The exit code is 1 where any is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gemmi
import numpy as np

#: Compared word for word, where there is one.
TEXTS = ("*peaks*.csv", "statistics.csv", "compare.csv", "table1.*", "images.csv", "latest")
EPOCHS = ("--epochs", "2")
#: A command that is killed more often than this ends undisturbed.
MOST_KILLS = 8
#: Last stage that a folder has come to, by a file of it; from the last to the first.
STAGES = {
    "run": (
        ("report.html", "after the report"),
        ("merged.mtz", "last files and report"),
        ("checkpoints/epoch_0002.pt", "final files"),
        ("checkpoints/epoch_0000.pt", "training"),
        ("shoeboxes.h5", "models and epoch 0"),
        ("config.yaml", "extraction"),
        ("dials/merge.done.json", "begin of the run"),
        ("dials/scale.done.json", "dials.merge"),
        ("dials/integrate.done.json", "dials.scale"),
        ("dials/refine.done.json", "dials.integrate"),
        ("dials/index.done.json", "dials.refine"),
        ("dials/find_spots.done.json", "dials.index"),
        ("dials/import.done.json", "dials.find_spots"),
        ("dials/log.import", "dials.import"),
        ("", "start"),
    ),
    "merge": (
        ("report.html", "after the report"),
        ("merged.mtz", "Table 1 and report"),
        (".unfinished/merged.mtz", "files"),
        (".unfinished", "fit"),
        ("", "start"),
    ),
}
STAGES["process"] = STAGES["run"]


def command(name: str, frames: Path, out: Path) -> list[str]:
    """Arguments of the command under test; ``merge`` takes the undisturbed run's photons."""
    of_run = ["--model", str(frames / "model.pdb"), *EPOCHS, "--out", str(out)]
    if name == "run":
        [expt], [refl] = frames.glob("*.expt"), frames.glob("*.refl")
        return ["run", str(expt), str(refl), *of_run]
    if name == "process":
        [master] = frames.glob("*_master.h5")
        return ["process", str(master), "--space-group", "P43212", "--nproc", "1", *of_run]
    photons = frames.parent / "photons" / "intensities.h5"
    return ["merge", str(photons), "--anomalous", "--epochs", "30", "--out", str(out)]


def again(name: str, frames: Path, out: Path) -> list[str]:
    """Arguments that go on with a killed one."""
    if name != "merge":
        return [*command(name, frames, out), "--resume"]
    # a killed one has no result, or a whole one that at worst lacks its report and Table 1
    unfinished = {"run.log", ".lock", ".unfinished"}
    has_result = out.is_dir() and {path.name for path in out.iterdir()} - unfinished
    return ["report", str(out)] if has_result else command(name, frames, out)


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the command as the leader of a process group of its own."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "braggflux.pipelines.cli", *arguments],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def finished(arguments: list[str], log: Path) -> float:
    """Run to the end; return its seconds."""
    began = time.monotonic()
    if code := start(arguments, log).wait():
        raise SystemExit(f"exit code {code}: braggflux {' '.join(arguments)}; see {log}")
    return time.monotonic() - began


class Moments:
    """Random moments, uniform over the length of a command.

    Parameters
    ----------
    seconds : float
        That it takes undisturbed.
    rng : numpy.random.Generator
    """

    def __init__(self, seconds: float, rng: np.random.Generator) -> None:
        self.seconds, self._rng = seconds, rng

    def draw(self) -> float:
        """Return seconds after the start."""
        return float(self._rng.uniform(0.0, self.seconds))

    def ended(self, seconds: float) -> None:
        """Learn that the command takes no longer now: other programs may have slowed it."""
        self.seconds = min(self.seconds, seconds)


def killed(arguments: list[str], log: Path, moments: Moments) -> bool:
    """Run until a random moment and kill; False where the command ended before."""
    process = start(arguments, log)
    try:
        code = process.wait(moments.draw())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    if code:
        raise SystemExit(f"exit code {code}: braggflux {' '.join(arguments)}; see {log}")
    return False


def stage(name: str, out: Path) -> str:
    """Name the last stage that the folder has come to; one gone on with may be at an earlier."""
    return next(text for file, text in STAGES[name] if (out / file).exists() or not file)


def difference(folder: Path, other: Path) -> str:
    """Name what differs between two results; empty where nothing does."""
    listed = [{p.relative_to(d).as_posix() for p in d.rglob("*")} for d in (folder, other)]
    if listed[0] != listed[1]:
        return f"files: {', '.join(sorted(listed[0] ^ listed[1]))}"
    for path in sorted(folder.rglob("*.mtz")):
        name = path.relative_to(folder)
        a, b = (np.array(gemmi.read_mtz_file(str(d / name))) for d in (folder, other))
        if a.shape != b.shape or not np.array_equal(a, b, equal_nan=True):
            return str(name)
    for path in (p for pattern in TEXTS for p in sorted(folder.glob(pattern))):
        if path.read_bytes() != (other / path.name).read_bytes():
            return path.name
    if any(a != b for a, b in zip(metrics(folder), metrics(other), strict=True)):
        return "metrics"
    return ""


def metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Numbers of each epoch but for times."""
    for path in sorted(folder.glob("metrics.json*")):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for line in lines:
            yield {k: v for k, v in json.loads(line).items() if k != "wall_s"}


def run_through(
    name: str, frames: Path, whole: Path, moments: Moments, n: int
) -> tuple[list[str], str]:
    """Kill at most ``n`` times, go on to the end.

    Returns
    -------
    stages : list of str
        In which each kill came.
    found : str
        What differs from the undisturbed result, or failed.
    """
    out, log = whole.with_name(f"{name}-killed"), whole.with_name(f"{name}-killed.log")
    shutil.rmtree(out, ignore_errors=True)
    stages: list[str] = []
    arguments = command(name, frames, out)
    most, began = min(n, MOST_KILLS), time.monotonic()
    try:
        while len(stages) < most and killed(arguments, log, moments):
            stages.append(stage(name, out))
            arguments = again(name, frames, out)
        if not stages:
            moments.ended(time.monotonic() - began)
        if len(stages) == most:
            finished(arguments, log)
    except SystemExit as failed:
        return stages, str(failed)
    return stages, difference(whole, out)


def main() -> None:
    """Parse, prepare, kill, count."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--command", choices=("run", "process", "merge"), default="run")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    out, name = given.out.absolute(), given.command
    out.mkdir(parents=True, exist_ok=True)
    frames, whole, log = out / "frames", out / f"{name}-whole", out / f"{name}.log"
    if not (frames / "model.pdb").is_file():
        finished(["simulate", "--preset", "tiny", "--out", str(frames)], log)
    if name == "merge" and not (out / "photons").is_dir():
        finished(command("run", frames, out / "photons"), log)
    shutil.rmtree(whole, ignore_errors=True)
    rng = np.random.default_rng(given.seed)
    moments = Moments(finished(command(name, frames, whole), log), rng)
    counted: Counter[str] = Counter()
    n_ends = n_wrong = 0
    while counted.total() < given.kills:
        stages, found = run_through(name, frames, whole, moments, given.kills - counted.total())
        counted.update(stages)
        n_ends, n_wrong = n_ends + 1, n_wrong + bool(found)
        print(f"end {n_ends}, killed in {', '.join(stages)}: {found or 'equal'}", flush=True)
        if found and not stages:
            break  # it fails without a kill
    print(
        f"{name}: {moments.seconds:.0f} s undisturbed, {counted.total()} kills, {n_ends} ends: "
        f"{n_ends - n_wrong} equal, {n_wrong} not; kills in each stage: {dict(counted)}"
    )
    sys.exit(bool(n_wrong))


if __name__ == "__main__":
    main()
