"""Cost of the extraction of shoeboxes beside that of decompressing the frames.

    python benchmarks/extraction.py [--frames 16,48,96] [--data ../shared/data/e16] [--dials]

Each number is of a process of its own, on frames that are repeated by a virtual data set: user
and system time, wall time on one core and on two, and the largest resident memory. ``ratio`` is
the CPU time of ``braggflux extract`` over that of reading all frames with h5py and hdf5plugin.
``per frame`` is the slope between this row and the one before: what a longer scan adds. With
``--dials``, ``dials.integrate nproc=1`` runs on the frames of the first row. It fits profiles to
strong spots with shoeboxes: ``dials.find_spots`` and ``dials.index`` make them first, of frames
that are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import hdf5plugin

READ_ALL = """
import sys, h5py, hdf5plugin
with h5py.File(sys.argv[1]) as file:
    frames = file["entry/data/data"]
    for i in range(len(frames)):
        frames[i]
"""
COLUMNS = (
    *("frames", "decompression CPU s", "extract CPU s", "ratio", "per frame", "ratio per frame"),
    *("wall 1 core s", "wall 2 cores s", "times faster", "memory MB"),
)


@dataclass(frozen=True)
class Cost:
    """What a process took: CPU and wall time [s], largest resident memory [MB]."""

    cpu: float
    wall: float
    memory: float


def measured(command: list[str], cores: set[int]) -> Cost:
    """Run a command on some cores."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    is_dials = command[0].startswith("dials.")
    if is_dials:
        environment["HDF5_PLUGIN_PATH"] = hdf5plugin.PLUGINS_PATH
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder if is_dials else None,  # it leaves its logs where it is run
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(command)}:\n{log.read().decode()[-2000:]}")
    wall = time.perf_counter() - start
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024 / 1e6)


def repeated(data: Path, n_frames: int, out: Path) -> Path:
    """Make a scan of ``n_frames`` of the frames in a folder, repeated; return its .expt."""
    (master,) = data.glob("*_master.h5")
    copy = out / master.name
    shutil.copyfile(master, copy)
    copy.chmod(0o644)
    with h5py.File(copy, "r+") as file:
        link = file["entry/data"].get("data", getlink=True)
        with h5py.File(data / link.filename) as source:
            frames = source[link.path]
            layout = h5py.VirtualLayout((n_frames, *frames.shape[1:]), frames.dtype)
            for first in range(0, n_frames, len(frames)):
                part = min(len(frames), n_frames - first)
                layout[first : first + part] = h5py.VirtualSource(frames)[:part]
        del file["entry/data/data"]
        file["entry/data"].create_virtual_dataset("data", layout)
    expt = json.loads((data / "refined.expt").read_text())
    scan, images = expt["scan"][0], expt["imageset"][0]
    first = scan["image_range"][0]
    scan["image_range"] = [first, first + n_frames - 1]
    scan["exposure_time"] = scan["epochs"] = [0.0] * n_frames
    images["template"], images["single_file_indices"] = str(copy), list(range(n_frames))
    for name in ("A_at_scan_points", "B_covariance"):
        expt["crystal"][0].pop(name, None)
    path = out / "repeated.expt"
    path.write_text(json.dumps(expt))
    return path


def strong_spots(data: Path, out: Path, cores: set[int]) -> str:
    """Find strong spots with their shoeboxes, and index them with the crystal that is known."""
    (images,) = data.glob("*_master.h5")
    with h5py.File(images) as file:
        expt = str(repeated(data, len(file["entry/data/data"]), out))
    names = {k: str(out / f"{k}.refl") for k in ("strong", "indexed")}
    measured(["dials.find_spots", expt, "nproc=1", f"output.reflections={names['strong']}"], cores)
    index = ["dials.index", expt, names["strong"], f"output.experiments={out}/indexed.expt"]
    measured([*index, f"output.reflections={names['indexed']}"], cores)
    return names["indexed"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/e16"))
    parser.add_argument("--frames", default="16,48,96")
    parser.add_argument("--d-min", default="1.8")
    parser.add_argument("--dials", action="store_true")
    parser.add_argument("--one-core", action="store_true", help="leave the run on two cores out")
    args = parser.parse_args()
    two = set(sorted(os.sched_getaffinity(0))[:2])
    one = {min(two)}
    refl = str(args.data.resolve() / "refined.refl")
    braggflux = str(Path(sys.executable).with_name("braggflux"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + "---|" * len(COLUMNS))
        before = None
        strong = strong_spots(args.data.resolve(), out, one) if args.dials else ""
        for n in map(int, args.frames.split(",")):
            expt = str(repeated(args.data.resolve(), n, out))
            (master,) = out.glob("*_master.h5")
            store = out / "boxes.h5"
            command = [
                braggflux,
                "extract",
                expt,
                refl,
                "--out",
                str(store),
                "--d-min",
                args.d_min,
            ]
            floor = measured([sys.executable, "-c", READ_ALL, str(master)], one)
            alone = measured(command, one)
            store.unlink()
            both = alone
            if not args.one_core:
                both = measured(command, two)
                store.unlink()
            slope = ["", ""]
            if before is not None:
                more = n - before[0]
                added = (alone.cpu - before[2].cpu) / more
                slope = [f"{added:.3f}", f"{added / ((floor.cpu - before[1].cpu) / more):.2f}"]
            before = n, floor, alone
            print(
                f"| {n} | {floor.cpu:.2f} | {alone.cpu:.2f} | {alone.cpu / floor.cpu:.1f} "
                f"| {slope[0]} | {slope[1]} | {alone.wall:.1f} | {both.wall:.1f} "
                f"| {alone.wall / both.wall:.2f} | {max(alone.memory, both.memory):.0f} |",
                flush=True,
            )
            if strong and n == int(args.frames.split(",")[0]):
                options = ["nproc=1", f"prediction.d_min={args.d_min}"]
                options += [
                    f"output.{x}={out}/i.{end}"
                    for x, end in (("reflections", "refl"), ("experiments", "expt"))
                ]
                integrate = ["dials.integrate", expt, strong, *options]
                dials = measured(integrate, one)
                print(
                    f"dials.integrate on {n} frames: {dials.cpu:.1f} CPU s, {dials.wall:.1f} s, "
                    f"{dials.memory:.0f} MB, {dials.cpu / alone.cpu:.1f} times extract",
                    flush=True,
                )


if __name__ == "__main__":
    main()
