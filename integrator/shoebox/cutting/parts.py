"""A scan cut in parts by several processes, and put together as if by one.

Each process takes a range of the frames of all sweeps: the boxes that begin there, and the sums of
its frames. It writes them to a file of its own, shaped like the store; rows that are not its own
take no room there. Whole chunks of these files are then copied as they are.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from braggflux.integrator.atomic import require_room
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.hdf5.checked import CHECKSUM, writing_checked
from braggflux.integrator.io.hdf5.filters import bitshuffle
from braggflux.integrator.io.shoebox_store import PACKED_BYTES, ShoeboxWriter
from braggflux.integrator.processes import ALONE, Processes
from braggflux.integrator.shoebox.cutting.sweep_cutter import SweepCutter
from braggflux.integrator.shoebox.extent import SpotExtent
from braggflux.integrator.shoebox.mask import MaskSettings
from braggflux.integrator.shoebox.sweep import Frames, Sweep, highest_count
from braggflux.integrator.workers import run_workers

Tick = Callable[[], None]
Reopen = Callable[[Sweep], Frames]


@dataclass(frozen=True)
class Cutting:
    """What is cut, and how.

    Parameters
    ----------
    sweeps : sequence of Sweep
    extent : SpotExtent
    settings : MaskSettings
    find_defects : bool
    """

    sweeps: Sequence[Sweep]
    extent: SpotExtent
    settings: MaskSettings
    find_defects: bool

    @property
    def n_rows(self) -> int:
        """Boxes of all sweeps."""
        return sum(len(sweep.prediction) for sweep in self.sweeps)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Smallest integer that holds the photons of every trusted value."""
        fits = highest_count(self.sweeps) <= np.iinfo(np.uint16).max
        return np.dtype(np.uint16 if fits else np.int32)

    def cutter(
        self, number: int, writer: ShoeboxWriter, frames: range | None = None
    ) -> SweepCutter:
        """Make what cuts the boxes of a sweep, or of a range of its frames."""
        first_row = sum(len(sweep.prediction) for sweep in self.sweeps[:number])
        how = self.extent, self.settings, writer, first_row, self.find_defects, frames
        return SweepCutter(self.sweeps[number], *how)

    def share(self, processes: Processes) -> list[tuple[int, range]]:
        """Sweeps and ranges of their frames that one of several processes takes."""
        lengths = [sweep.frames.n_images for sweep in self.sweeps]
        own = processes.share(sum(lengths))
        found = []
        for number, (n, end) in enumerate(zip(lengths, accumulate(lengths), strict=True)):
            first = end - n
            frames = range(max(own.start - first, 0), min(own.stop - first, n))
            if frames:
                found.append((number, frames))
        return found

    def reopened(self, reopen: Reopen) -> Cutting:
        """Give the same with frames that are opened anew: two processes share no open file."""
        sweeps = [replace(sweep, frames=reopen(sweep)) for sweep in self.sweeps]
        return replace(self, sweeps=sweeps)


def write_part(path: Path, cutting: Cutting, processes: Processes, tick: Tick) -> None:
    """Cut what one of several processes shall cut, and write it."""
    with writing_checked(path) as handle:
        writer = ShoeboxWriter(handle, cutting.n_rows, cutting.extent.box, cutting.dtype)
        for number, frames in cutting.share(processes):
            with closing(cutting.cutter(number, writer, frames)) as cutter:
                cutter.cut(tick)
                group = handle.create_group(f"sweep_{number}")
                for name, values in cutter.part().items():
                    packed = bitshuffle() if values.size else {}
                    group.create_dataset(name, data=values, **packed, **CHECKSUM)
                group.attrs["frames"] = frames.start, frames.stop
                group.attrs["rows"] = cutter.rows.start, cutter.rows.stop


def add_part(path: Path, number: int, cutter: SweepCutter, writer: ShoeboxWriter) -> None:
    """Take over what a part holds of a sweep."""
    with h5py.File(path) as handle:
        group = handle.get(f"sweep_{number}")
        if group is None:
            return
        first, rows = cutter.first_row, slice(*map(int, group.attrs["rows"]))
        cutter.add_part(
            range(*map(int, group.attrs["frames"])),
            rows,
            {name: column[()] for name, column in group.items()},
        )
        writer.copy_boxes(handle, slice(first + rows.start, first + rows.stop))


@dataclass(frozen=True)
class Workforce:
    """Who cuts.

    Parameters
    ----------
    n_workers : int
        Processes to start on this machine.
    processes : Processes
        Those that ``torchrun`` has started, all of which see the store's folder; if there are
        several, they cut and no workers are started.
    reopen : callable, optional
        Opens the frames of a sweep anew for a worker.
    """

    n_workers: int = 1
    processes: Processes = ALONE
    reopen: Reopen = lambda sweep: sweep.frames

    @contextmanager
    def parts(self, cutting: Cutting, store: Path, tick: Tick) -> Iterator[list[Path]]:
        """Cut in parts; their files, which last for the block, or none where one process cuts."""
        here = self.processes
        n = self.n_workers if here.is_alone else here.size
        if n == 1:
            yield []
            return
        with ExitStack() as stack:
            folder = here.from_first(lambda: stack.enter_context(_folder(cutting, store)))
            files = [folder / f"{k}.h5" for k in range(n)]
            if here.is_alone:
                self._fork(cutting, files, tick)
            else:
                write_part(files[here.rank], cutting, here, tick)
                here.wait()
            yield files

    def _fork(self, cutting: Cutting, files: Sequence[Path], tick: Tick) -> None:
        def work(k: int, tick: Tick) -> None:
            write_part(files[k], cutting.reopened(self.reopen), Processes(k, len(files)), tick)

        run_workers(len(files), work, tick)


@contextmanager
def _folder(cutting: Cutting, store: Path) -> Iterator[Path]:
    """Folder beside the store for the files of the parts."""
    needed = 2 * cutting.n_rows * math.prod(cutting.extent.box) * PACKED_BYTES
    require_room(store, needed, f"{cutting.n_rows} shoeboxes, twice where several processes cut,")
    try:
        folder = Path(tempfile.mkdtemp(dir=store.parent, prefix=f".{store.name}."))
    except OSError as error:
        raise UserError(
            f"cannot write {store}: {error.strerror or error}; choose a writable folder"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
