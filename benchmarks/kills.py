"""Kill a command with -9 at random moments, go on, and compare the end with an undisturbed one.

    python benchmarks/kills.py --command run --kills 50 --seed 0 --out DIR

Frames are simulated (preset ``tiny``) into DIR. ``run`` and ``process`` (in DIALS' steps too, the
whole process group dies) go on with ``--resume``; ``merge`` is given again, since a killed one has
no result, or one that ``report`` completes. An end is *equal* where the columns of merged.mtz and
half_sets.mtz are equal bit for bit and peaks.csv and statistics.csv word for word, and nothing
else lies in the folder than after the undisturbed command. The exit code is 1 where any is not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gemmi
import numpy as np

TABLES = ("peaks.csv", "statistics.csv")
REFLECTIONS = ("merged.mtz", "half_sets.mtz")
EPOCHS = ("--epochs", "2")


def command(name: str, frames: Path, out: Path) -> list[str]:
    """Arguments of the command under test; ``merge`` takes the undisturbed run's photons."""
    of_run = ["--model", str(frames / "model.pdb"), *EPOCHS, "--out", str(out)]
    if name == "run":
        [expt], [refl] = frames.glob("*.expt"), frames.glob("*.refl")
        return ["run", str(expt), str(refl), *of_run]
    if name == "process":
        [master] = frames.glob("*_master.h5")
        return ["process", str(master), "--space-group", "P43212", *of_run]
    photons = frames.parent / "photons" / "intensities.h5"
    return ["merge", str(photons), "--anomalous", "--epochs", "30", "--out", str(out)]


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


def difference(folder: Path, other: Path) -> str:
    """Name what differs between two results; empty where nothing does."""
    listed = [{p.relative_to(d).as_posix() for p in d.rglob("*")} for d in (folder, other)]
    if listed[0] != listed[1]:
        return f"files: {', '.join(sorted(listed[0] ^ listed[1]))}"
    for name in REFLECTIONS:
        a, b = (np.array(gemmi.read_mtz_file(str(d / name))) for d in (folder, other))
        if a.shape != b.shape or not np.array_equal(a, b, equal_nan=True):
            return name
    for name in TABLES:
        if (folder / name).is_file() and (folder / name).read_bytes() != (
            other / name
        ).read_bytes():
            return name
    return ""


def one_kill(name: str, frames: Path, whole: Path, moment: float) -> str:
    """Kill after ``moment`` seconds, go on; return what differs from the undisturbed result."""
    out, log = whole.with_name(f"{name}-killed"), whole.with_name(f"{name}-killed.log")
    shutil.rmtree(out, ignore_errors=True)
    arguments = command(name, frames, out)
    process = start(arguments, log)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if name == "merge":
        # a killed one has no result, or a whole one that at worst lacks its report and Table 1
        has_result = (out / "merged.mtz").is_file()
        finished(["report", str(out)] if has_result else arguments, log)
    else:
        finished([*arguments, "--resume"], log)
    return difference(whole, out)


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
    seconds = finished(command(name, frames, whole), log)
    rng = np.random.default_rng(given.seed)
    wrong = []
    for k, moment in enumerate(sorted(rng.uniform(0.0, seconds, given.kills))):
        if found := difference_of(name, frames, whole, moment):
            wrong.append(f"killed after {moment:.1f} s: {found}")
        print(f"{k + 1} of {given.kills}, after {moment:.1f} s: {found or 'equal'}", flush=True)
    n = given.kills
    print(
        f"{name}: {n} kills in {seconds:.0f} s of work, {n - len(wrong)} equal, {len(wrong)} not"
    )
    sys.exit(bool(wrong))


def difference_of(name: str, frames: Path, whole: Path, moment: float) -> str:
    """Say what differs, a failed command included."""
    try:
        return one_kill(name, frames, whole, moment)
    except SystemExit as failed:
        return str(failed)


if __name__ == "__main__":
    main()
