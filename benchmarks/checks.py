"""What checksums and checks cost: CPU time of an extraction with them and without, in turn.

    python benchmarks/checks.py [--data ../shared/data/hewl_nai] [--pairs 5] [--d-min 1.6]

Without them: no Fletcher-32 in the store, which HDF5 writes itself; no look into packed frames
before they are decoded; no process that opens the frames first. Both cut the same boxes, by one
process each. The figure is the median of the ratios of the pairs; the first pair is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WITH = "import sys; from braggflux.pipelines.cli import main; sys.exit(main())"
WITHOUT = """
import h5py
from braggflux.integrator.io import images, shoebox_store
from braggflux.integrator.io.hdf5 import checked, frames, nxmx
checked.CHECKSUM.clear()
shoebox_store.GZIP.pop("fletcher32")
images.opened_apart = lambda *_: None
frames.require_decodable = nxmx.require_decodable = lambda *_: None
class Plain(h5py.File):
    def __init__(self, path, **options):
        super().__init__(path, "w", **options)
    def require_written(self):
        pass
    finish = abandon = h5py.File.close
from braggflux.integrator.io import new_hdf5
new_hdf5.NewFile = Plain
"""


def cpu_seconds(program: str, arguments: list[str]) -> float:
    """User and system time of a program and all that it starts."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-c", program, *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(log.read().decode()[-2000:])
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/hewl_nai"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--d-min", default="1.6")
    given = parser.parse_args()
    files = [str(given.data / name) for name in ("refined.expt", "refined.refl")]
    found: dict[str, list[float]] = {"with": [], "without": []}
    sizes: dict[str, int] = {}
    for number in range(given.pairs + 1):
        for name in ("with", "without") if number % 2 else ("without", "with"):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "s.h5"
                options = ["--d-min", given.d_min, "--processes", "1", "--out", str(out)]
                program = WITH if name == "with" else WITHOUT + WITH
                seconds = cpu_seconds(program, ["extract", *files, *options])
                sizes[name] = out.stat().st_size
            if number:
                found[name].append(seconds)
    ratios = [a / b for a, b in zip(found["with"], found["without"], strict=True)]
    for name, values in found.items():
        times = " ".join(f"{value:.2f}" for value in values)
        print(f"{name:8}{statistics.median(values):7.2f} CPU s ({times}), {sizes[name]} bytes")
    print(
        f"ratio   {statistics.median(ratios):7.4f} ({min(ratios):.4f} to {max(ratios):.4f}), "
        f"{len(ratios)} pairs"
    )


if __name__ == "__main__":
    main()
