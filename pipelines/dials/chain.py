"""An installed DIALS as subprocesses: geometry before the run, and the conventional reference.

Each step runs in one folder, writes its output to ``log.<step>`` and, when it has succeeded, a
stamp ``<step>.done.json`` with its arguments and the state of its inputs. A step whose stamp still
holds is not repeated. DIALS programs return 0 in some cases without having written anything, so
success means that the expected files are there.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braggflux.integrator.atomic import FULL, remove_leftovers, replacing, why_not_written
from braggflux.integrator.errors import UserError
from braggflux.pipelines.config.run import DialsConfig
from braggflux.pipelines.workspace import log
from braggflux.pipelines.workspace.records.readers import read_json

logger = logging.getLogger(__name__)

INSTALL_HINT = (
    "install it with `apt install dials` (Debian, Ubuntu) or "
    "`mamba install -c conda-forge dials`, or run DIALS elsewhere and give its refined.expt and "
    "refined.refl to `braggflux run`"
)


#: A program that fails where less is free, in bytes, has filled the disk.
LEAST_ROOM = 1_000_000
#: Why a step may take minutes, by its name.
HINTS = {
    "index": "still searching; a space group or cell that the crystal does not have is the usual "
    "reason, and Ctrl-C ends it",
}


class StepError(UserError):
    """A DIALS step failed; the message ends with where its log is."""


@dataclass(frozen=True)
class Reference:
    """Files that DIALS made of the same frames; a missing one is None, with the ``reason``."""

    integrated: Path | None = None
    merged: Path | None = None
    reason: str = ""


class DialsChain:
    """DIALS steps of one data set.

    Parameters
    ----------
    folder : Path
        Where DIALS works; made when missing.
    config : DialsConfig
    d_min : float, optional
        Resolution limit of the reference [A].

    Raises
    ------
    UserError
        DIALS is not installed.
    """

    def __init__(self, folder: Path, config: DialsConfig, d_min: float | None = None) -> None:
        if shutil.which("dials.import") is None:
            raise UserError(
                f"DIALS is not installed (no dials.import on the PATH); {INSTALL_HINT}"
            )
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        self.config = config
        self.d_min = d_min

    def imported(self) -> Path:
        """Import the images; return imported.expt."""
        images = [str(path.absolute()) for path in self.config.images]
        self.step("import", images, ["imported.expt"], extra=self.config.import_args)
        return self.folder / "imported.expt"

    def geometry(self) -> tuple[Path, Path]:
        """Import, find spots, index and refine; return refined.expt and refined.refl."""
        config, nproc = self.config, f"nproc={self._nproc}"
        self.imported()
        self.step(
            "find_spots",
            ["imported.expt"],
            ["strong.refl"],
            parameters=[nproc],
            extra=config.find_spots_args,
        )
        known = []
        if config.space_group:
            known.append(f"space_group={config.space_group}")
        if config.unit_cell:
            known.append(f"unit_cell={','.join(f'{x:g}' for x in config.unit_cell)}")
        self.step(
            "index",
            ["imported.expt", "strong.refl"],
            ["indexed.expt", "indexed.refl"],
            parameters=[f"indexing.{nproc}", *known],
            extra=config.index_args,
        )
        self.step(
            "refine",
            ["indexed.expt", "indexed.refl"],
            ["refined.expt", "refined.refl"],
            extra=config.refine_args,
        )
        return self.folder / "refined.expt", self.folder / "refined.refl"

    def reference(self) -> Reference:
        """Integrate, scale (anomalous) and merge; what DIALS refuses is missing with a reason."""
        config = self.config
        limit = [] if self.d_min is None else [f"d_min={self.d_min:g}"]
        integrated = merged = None
        reason = ""
        try:
            self.step(
                "integrate",
                ["refined.expt", "refined.refl"],
                ["integrated.expt", "integrated.refl"],
                parameters=[f"nproc={self._nproc}", *(f"prediction.{x}" for x in limit)],
                extra=config.integrate_args,
            )
            integrated = self.folder / "integrated.refl"
            self.step(
                "scale",
                ["integrated.expt", "integrated.refl"],
                ["scaled.expt", "scaled.refl"],
                parameters=["anomalous=True", *limit],
                extra=config.scale_args,
            )
            self.step(
                "merge",
                ["scaled.expt", "scaled.refl"],
                ["merged.mtz"],
                parameters=["anomalous=True"],
                extra=config.merge_args,
            )
            merged = self.folder / "merged.mtz"
        except StepError as error:
            reason = str(error)
            logger.warning("no DIALS reference: %s", reason)
        return Reference(integrated, merged, reason)

    def step(
        self,
        name: str,
        inputs: list[str],
        outputs: list[str],
        *,
        parameters: list[str] | None = None,
        extra: tuple[str, ...] = (),
    ) -> None:
        """Run ``dials.<name>`` unless its stamp still holds.

        Parameters
        ----------
        name : str
        inputs : list of str
            Files, absolute or in the folder.
        outputs : list of str
            Files in the folder that the step must write.
        parameters : list of str, optional
            Our PHIL parameters.
        extra : tuple of str
            The user's, last, so that they win; each may hold several words.

        Raises
        ------
        UserError
            The disk is full.
        StepError
            With DIALS' last meaningful line and the path of its log.
        """
        words = [word for text in extra for word in shlex.split(text)]
        command = [f"dials.{name}", *inputs, *(parameters or []), *words]
        stamp = {"command": _without_nproc(command), "inputs": self._state(inputs)}
        stamp_file = self.folder / f"{name}.done.json"
        if self._is_done(stamp_file, stamp, outputs):
            logger.info("%s: done before, kept", command[0])
            return
        stamp_file.unlink(missing_ok=True)
        for output in outputs:
            (self.folder / output).unlink(missing_ok=True)
        logger.info("%s ...", command[0])
        began = time.monotonic()
        log_file = self.folder / f"log.{name}"
        with log.running(command[0], log_file, HINTS.get(name, "")):
            status = self._execute(command, log_file)
        seconds = time.monotonic() - began
        missing = [output for output in outputs if not (self.folder / output).is_file()]
        if status != 0 or missing:
            self._check_room(command[0], log_file)
            raise StepError(f"{command[0]} failed: {last_message(log_file)}; see {log_file}")
        logger.info("%s: %.0f s", command[0], seconds)
        with replacing(stamp_file) as temporary:
            temporary.write_text(json.dumps(stamp | {"seconds": round(seconds, 1)}, indent=1))

    def _check_room(self, program: str, log_file: Path) -> None:
        """Tell a step that failed for want of room: the rest of the run would fail too.

        The log of the program may lack its last words, for the same reason.
        """
        text = log_file.read_text(errors="replace")
        said = next((number for number in FULL if os.strerror(number) in text), None)
        if said is None and shutil.disk_usage(self.folder).free < LEAST_ROOM:
            said = errno.ENOSPC
        if said is not None:
            reason = why_not_written(OSError(said, os.strerror(said)), log_file)
            raise UserError(f"{program} failed in {self.folder}: {reason}")

    @property
    def _nproc(self) -> int:
        return self.config.nproc or os.cpu_count() or 1

    def _execute(self, command: list[str], log_file: Path) -> int:
        environment = os.environ | {"HDF5_PLUGIN_PATH": _plugin_path()}
        with log_file.open("w") as stream:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
            try:
                return process.wait()
            finally:
                if process.poll() is None:  # interrupted: leave no program behind
                    process.terminate()
                    process.wait()

    def _state(self, inputs: list[str]) -> list[list[Any]]:
        """Name, size and modification time of input files; missing ones have neither."""
        state = []
        for name in inputs:
            path = self.folder / name
            found = path.stat() if path.is_file() else None
            state.append([name, found and found.st_size, found and found.st_mtime_ns])
        return state

    def _is_done(self, stamp_file: Path, stamp: dict[str, Any], outputs: list[str]) -> bool:
        try:
            before = read_json(stamp_file)
        except UserError:  # none, or damaged: the step is done again
            return False
        return all(before.get(key) == value for key, value in stamp.items()) and all(
            (self.folder / output).is_file() for output in outputs
        )


def last_message(log_file: Path) -> str:
    """Return the line of a DIALS log that says best why the program stopped."""
    lines = [line.strip() for line in log_file.read_text(errors="replace").splitlines()]
    for i, line in enumerate(lines):
        if line.startswith("Unable to handle the following arguments"):
            return " ".join(lines[i : i + 2])
    for line in reversed(lines):
        if line.startswith("Sorry:") or ("Error: " in line and not line.startswith("File ")):
            return line.split("sourceforge.net: ")[-1]
    told = [line for line in lines if line and not set(line) <= set("-=+| ")]
    return told[-1] if told else "it said nothing"


def _without_nproc(command: list[str]) -> list[str]:
    """Drop the number of processes: it does not change the result."""
    return [word for word in command if "nproc=" not in word]


def _plugin_path() -> str:
    """Folder of the HDF5 filters that detectors use (bitshuffle-LZ4, Zstandard)."""
    import hdf5plugin

    return hdf5plugin.PLUGINS_PATH
