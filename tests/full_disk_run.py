"""`braggflux run` on a disk that is too small, at many sizes, and --resume; a program of its own.

    python full_disk_run.py FOLDER [SHARE ...]

FOLDER is to be on a file system of some 64 MB in memory, which is filled so that the run finds
these shares (12 of them) of the room that it needs. What came of each is printed as JSON: the line
that the run ended with, what it left under temporary names (under any before its first
checkpoint), and whether --resume, once there is room, ends like a run that was not disturbed. The
exit code is that of the interpreter: HDF5 must not crash when it ends.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import gemmi
import numpy as np
from full_disk_sweep import filled

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.io.intensity_file import read_intensities
from braggflux.pipelines import cli
from braggflux.pipelines.workspace.rundir import RunDirectory

SHORT = ["--epochs", "2", "--set", "training.merge_steps=5", "--set", "training.batch_size=1024"]


def told(command: list[str]) -> tuple[int, str]:
    """Exit code of a command, and its lines of error."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        code = cli.main(command)
    lines = [line for line in stderr.getvalue().splitlines() if "braggflux: error: " in line]
    return code, "\n".join(lines).replace("braggflux: error: ", "")


def result(folder: Path) -> list[object]:
    """What must not depend on where a run was cut."""
    run = RunDirectory.open(folder)
    merged = gemmi.read_mtz_file(str(run.merged))
    photons = read_intensities(run.intensities)
    return [
        np.asarray(merged.array).tobytes(),
        photons.background.numpy().tobytes(),
        run.peaks_file.read_bytes(),
        run.statistics_file.read_bytes(),
        [{k: v for k, v in row.items() if k != "wall_s"} for row in run.read_metrics()],
        sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")),
    ]


def main() -> None:
    disk, shares = Path(sys.argv[1]), [float(share) for share in sys.argv[2:]]
    shares = shares or [((k + 0.5) / 12) ** 2 for k in range(12)]  # small files come first
    out, found = disk / "run", []
    with tempfile.TemporaryDirectory() as elsewhere:
        files = simulate(Path(elsewhere) / "frames", preset="tiny", seed=0)
        command = ["run", str(files.expt), str(files.refl), "--model", str(files.model)]
        command += ["--out", str(out), *SHORT]
        assert told(command)[0] == 0
        expected = result(out)
        whole = sum(path.stat().st_blocks * 512 for path in out.rglob("*"))
        for size in (int(share * whole) for share in shares):
            shutil.rmtree(out, ignore_errors=True)
            with filled(disk, size):
                code, message = told(command)
                names = [path.name for path in out.rglob("*")]
            has_begun = "latest" in names
            left = [name for name in names if not has_begun or name.startswith(".")]
            again = told([*command, "--resume"])
            found.append(
                {
                    "size": size,
                    "code": code,
                    "message": message,
                    "left": left,
                    "again": again,
                    "is_equal": again[0] == 0 and result(out) == expected,
                }
            )
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
