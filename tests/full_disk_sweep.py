"""Write every kind of file on a disk that is too small, at many sizes; a program of its own.

    python full_disk_sweep.py limit|disk FOLDER

``limit`` bounds the size of files (RLIMIT_FSIZE), which every system can; ``disk`` fills the
file system of FOLDER, to be one of a few MB in memory. What came of each is printed as JSON. The
exit code is that of the interpreter: HDF5 must not crash when the program ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gemmi
import numpy as np
import small_files

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.integrator.io import shoebox_store
from braggflux.integrator.io.arrays import write_arrays
from braggflux.merge.io.mtz import merged_table, write_merged_mtz
from braggflux.pipelines.workspace.lock import LOCK, one_writer
from braggflux.pipelines.workspace.rundir import write_rows, write_text

CELL, SPACE_GROUP = gemmi.UnitCell(42.0, 42.0, 58.0, 90, 90, 90), gemmi.SpaceGroup("P 43 21 2")
N_SIZES = 8


def write_mtz(path: Path) -> None:
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 5.0, True)
    one = np.ones(len(asu))
    table = merged_table(asu, f=one, sigma_f=one, i=one, sigma_i=one, n_obs=one.astype(int))
    write_merged_mtz(path, table, CELL, SPACE_GROUP, 1.0)


def write_lock(path: Path) -> None:
    with one_writer(path.parent):
        text = path.with_name(LOCK).read_text()
    write_text(path, text)


WRITERS: dict[str, Callable[[Path], None]] = {
    "shoeboxes.h5": small_files.write_shoeboxes,
    "intensities.h5": small_files.write_counts,
    "unmerged.h5": small_files.write_unmerged,
    "scale_model.pt": small_files.write_parameters,
    "merged.mtz": write_mtz,
    "examples.npz": lambda path: write_arrays(path, {"a": np.arange(9999.0), "b": np.ones(3)}),
    "peaks.csv": lambda path: write_rows(path, [{"a": i, "b": "x"} for i in range(3000)], "ab"),
    "report.html": lambda path: write_text(path, "<p>word</p>\n" * 1000),
    "locked.txt": write_lock,
}


@contextlib.contextmanager
def limited(folder: Path, size: int) -> Iterator[None]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@contextlib.contextmanager
def filled(folder: Path, size: int) -> Iterator[None]:
    """Leave ``size`` bytes, in pages."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - size, 1))
    try:
        yield
    finally:
        ballast.unlink()


def outcome(write: Callable[[Path], None], path: Path) -> str:
    try:
        write(path)
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    shoebox_store.require_room = lambda *_: None  # the look before saw room
    small = {"limit": limited, "disk": filled}[sys.argv[1]]
    folder = Path(sys.argv[2])
    found = []
    for name, write in WRITERS.items():
        path = folder / name
        write(path)
        whole = path.stat().st_size
        for size in np.linspace(0, whole, N_SIZES, endpoint=False).astype(int).tolist():
            path.unlink(missing_ok=True)
            with small(folder, size):
                message = outcome(write, path)
                left = sorted({p.name for p in folder.iterdir()} - {"ballast"})
            found.append({"file": name, "size": size, "message": message, "left": left})
        write(path)  # there is room again
        found[-1]["again"] = path.stat().st_size == whole
        path.unlink()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
