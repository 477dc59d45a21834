"""CPU time and memory of a run against the number of frames.

    python benchmarks/frames.py [--frames 30,60,120,240] [--figure cost.svg]

Simulates the preset tiny with so many frames each, runs one epoch on the CPU in a process of its
own, and prints the stages of ``stage_times.csv`` with the largest resident memory. Points on a
line through the origin, but for the start of the program, are a cost that grows linearly.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path

from extraction import measured

from braggflux.fixtures.simulate import simulate

STAGES = ("extraction", "training pass", "integration pass", "merge steps", "outputs")


def cost(n_frames: int, folder: Path) -> dict[str, float]:
    """CPU seconds of each stage of a run, of the whole command, and its memory [MB]."""
    files = simulate(folder / "frames", "tiny", 0, overrides={"scan.n_images": n_frames})
    command = [str(Path(sys.executable).with_name("braggflux")), "run", str(files.expt)]
    command += [str(files.refl), "--out", str(folder / "run"), "--epochs", "1", "--device", "cpu"]
    whole = measured(command, {0})
    return {
        "frames": n_frames,
        **of_stages(folder / "run" / "stage_times.csv"),
        "whole": whole.cpu,
        "memory": whole.memory,
    }


def of_stages(path: Path) -> dict[str, float]:
    """CPU seconds of each stage of the first epoch, and of the extraction."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["epoch"] != "0"]
    return {k: sum(float(r["cpu_s"]) for r in rows if r["stage"] == k) for k in STAGES}


def figure(rows: list[dict[str, float]], path: Path) -> None:
    """Draw time of each stage, and memory, against frames."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "frames"
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    frames = [row["frames"] for row in rows]
    for stage in STAGES:
        left.plot(frames, [row[stage] for row in rows], "o-", ms=3, label=stage)
    left.set(xlabel="frames", ylabel="CPU time [s]", xlim=0, ylim=0)
    left.legend(frameon=False, fontsize="small")
    right.plot(frames, [row["memory"] for row in rows], "ko-", ms=3)
    right.set(xlabel="frames", ylabel="largest memory [MB]", xlim=0, ylim=0)
    fig.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--frames", default="30,60,120,240")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    rows = []
    print("| frames | " + " | ".join(STAGES) + " | whole command | memory MB |")
    print("|" + "---|" * (len(STAGES) + 3))
    for n in map(int, args.frames.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(cost(n, Path(folder)))
        values = [f"{rows[-1][k]:.2f}" for k in (*STAGES, "whole")]
        print(f"| {n} | " + " | ".join(values) + f" | {rows[-1]['memory']:.0f} |", flush=True)
    if args.figure is not None:
        figure(rows, args.figure)


if __name__ == "__main__":
    main()
