"""The readers of the program, each with a valid file, ways to damage it, and checks of values."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import possible
import seeds
import yaml
from edits import (
    Edit,
    byte_edits,
    edited_bytes,
    edited_text,
    edited_tree,
    pick,
    text_edits,
    tree_edits,
)

from braggflux.integrator.io.dials import place_on_scans, read_experiments, read_reflections
from braggflux.integrator.io.dials.experiments import write_experiments
from braggflux.integrator.io.dials.sweeps import describe_experiment, sweeps_of
from braggflux.integrator.io.images import open_frames
from braggflux.integrator.prediction.diffraction import DiffractionGeometry
from braggflux.merge.io.read import read_table
from braggflux.merge.io.stores.store_conversion import convert_to_store
from braggflux.pipelines.config import schema
from braggflux.pipelines.config.run import RunConfig

Paths = list[Path]


def n_edits(rng: np.random.Generator) -> int:
    """Most damage is in one place."""
    return pick(rng, (1, 1, 1, 2, 3))


class Reader(ABC):
    """One format."""

    name: str
    #: Seed file that is damaged.
    seed: str

    def prepare(self) -> None:
        """Make the valid file."""
        if not self.path.is_file():
            raise FileNotFoundError(self.path)

    @property
    def path(self) -> Path:
        """The valid file."""
        return seeds.folder() / self.seed

    @abstractmethod
    def edits(self, rng: np.random.Generator) -> list[Edit]:
        """Make up damage."""

    @abstractmethod
    def damaged(self, edits: list[Edit]) -> bytes:
        """Apply it."""

    def write(self, edits: list[Edit], folder: Path) -> Paths:
        """Write the damaged file, and name it and those that go with it."""
        path = folder / self.seed
        path.write_bytes(self.damaged(edits))
        return [path]

    @abstractmethod
    def read(self, paths: Paths) -> list[str]:
        """Read it; what is accepted and impossible."""


class _Json(Reader):
    @cached_property
    def document(self) -> Any:
        """The valid file."""
        return json.loads(self.path.read_text())

    def edits(self, rng: np.random.Generator) -> list[Edit]:
        if rng.random() < 0.1:
            return [["bytes of file", byte_edits(rng, self.path.stat().st_size, n_edits(rng))]]
        return tree_edits(rng, self.document, n_edits(rng))

    def damaged(self, edits: list[Edit]) -> bytes:
        if edits and edits[0][0] == "bytes of file":
            return edited_bytes(self.path.read_bytes(), edits[0][1])
        return json.dumps(edited_tree(self.document, edits)).encode()


class ExperimentList(_Json):
    """.expt: read, described, and written again."""

    name, seed = "expt", "list.expt"

    def read(self, paths: Paths) -> list[str]:
        found = read_experiments(paths[0])
        wrong = possible.experiments(found)
        if not wrong:
            for sweep in sweeps_of(found):
                json.dumps(describe_experiment(sweep))
            write_experiments(paths[0].with_name("again.expt"), found, source=paths[0])
        return wrong


class SweepOfList(_Json):
    """.expt: its frames opened, its geometry made tensors."""

    name, seed = "expt-frames", "sweep.expt"

    def read(self, paths: Paths) -> list[str]:
        (sweep,) = sweeps_of(read_experiments(paths[0]))
        wrong = possible.experiments([sweep])
        if not wrong:
            geometry = DiffractionGeometry.from_experiment(sweep)
            wrong = possible.finite({"A": geometry.A, "panel_d": geometry.panel_d})
            with open_frames(sweep) as frames:
                for number in range(min(frames.n_images, 4)):
                    frames.read(number)
        return wrong


class Table(Reader):
    """.refl: placed on the scans, and as observations to merge."""

    name, seed = "refl", "table.refl"

    @cached_property
    def document(self) -> Any:
        """The valid table, unpacked."""
        return msgspec.msgpack.decode(self.path.read_bytes())

    def edits(self, rng: np.random.Generator) -> list[Edit]:
        if rng.random() < 0.2:
            return [["bytes of file", byte_edits(rng, self.path.stat().st_size, n_edits(rng))]]
        return tree_edits(rng, self.document, n_edits(rng))

    def damaged(self, edits: list[Edit]) -> bytes:
        if edits and edits[0][0] == "bytes of file":
            return edited_bytes(self.path.read_bytes(), edits[0][1])
        try:
            return msgspec.msgpack.encode(edited_tree(self.document, edits))
        except (OverflowError, ValueError):  # integers of more than 64 bits
            return b""

    def read(self, paths: Paths) -> list[str]:
        experiments = seeds.folder() / "sweep.expt"
        table, number = place_on_scans(read_reflections(paths[0]), read_experiments(experiments))
        wrong = [] if len(number) == len(table) else ["rows without a place"]
        return wrong + possible.unmerged(read_table([paths[0], experiments]))


class BytesReader(Reader):
    """Any file: bytes of it."""

    def edits(self, rng: np.random.Generator) -> list[Edit]:
        return byte_edits(rng, self.path.stat().st_size, n_edits(rng))

    def damaged(self, edits: list[Edit]) -> bytes:
        return edited_bytes(self.path.read_bytes(), edits)


class Mtz(BytesReader):
    """Unmerged MTZ: numbers of the rows, words of the header, bytes of both."""

    name, seed = "mtz", "a.mtz"

    @cached_property
    def header_at(self) -> int:
        """Where the records of the header begin [bytes]."""
        return 4 * (int(np.frombuffer(self.path.read_bytes()[4:8], "<i4")[0]) - 1)

    def edits(self, rng: np.random.Generator) -> list[Edit]:
        kind = rng.random()
        if kind < 0.4:
            return [["header", edit] for edit in text_edits(rng, n_edits(rng))]
        if kind < 0.7:
            bits = rng.choice([np.nan, np.inf, -1, 0, 1e30, 1e-30, 3e38, 1e9, 32768], n_edits(rng))
            first, last = 20, self.header_at // 4
            return [
                ["bytes", 4 * int(rng.integers(first, last)), np.float32(b).tobytes().hex()]
                for b in bits
            ]
        return super().edits(rng)

    def damaged(self, edits: list[Edit]) -> bytes:
        content = self.path.read_bytes()
        header = content[self.header_at :].decode("latin-1")
        for kind, *rest in edits:
            if kind == "header":
                records = "\n".join(header[i : i + 80] for i in range(0, len(header), 80))
                lines = edited_text(records, rest).split("\n")
                header = "".join(line.ljust(80)[:80] for line in lines)
        content = content[: self.header_at] + header.encode("latin-1", "replace")
        return edited_bytes(content, [e for e in edits if e[0] != "header"])

    def read(self, paths: Paths) -> list[str]:
        wrong = possible.unmerged(read_table(paths))
        if not wrong and paths[0].stat().st_size % 7 == 0:  # not always: the same reader twice
            convert_to_store(paths[0], paths[0].with_suffix(".h5"))
        return wrong


class TextReader(Reader):
    """Observations as text: words, lines and bytes of it."""

    def edits(self, rng: np.random.Generator) -> list[Edit]:
        if rng.random() < 0.15:
            return [["bytes of file", byte_edits(rng, self.path.stat().st_size, n_edits(rng))]]
        return text_edits(rng, n_edits(rng))

    def damaged(self, edits: list[Edit]) -> bytes:
        if edits and edits[0][0] == "bytes of file":
            return edited_bytes(self.path.read_bytes(), edits[0][1])
        return edited_text(self.path.read_text(), edits).encode()

    def read(self, paths: Paths) -> list[str]:
        return possible.unmerged(read_table(paths, space_group=seeds.GROUP, cell=seeds.CELL))


class Stream(TextReader):
    """CrystFEL stream."""

    name, seed = "stream", "a.stream"


class Xds(TextReader):
    """XDS_ASCII.HKL."""

    name, seed = "xds", "a.HKL"


class Settings(TextReader):
    """YAML or JSON of options."""

    name, seed = "yaml", "config.yaml"

    @cached_property
    def document(self) -> Any:
        """The valid settings."""
        return yaml.safe_load(self.path.read_text())

    def edits(self, rng: np.random.Generator) -> list[Edit]:
        if rng.random() < 0.3:
            return super().edits(rng)
        return [["tree", edit] for edit in tree_edits(rng, self.document, n_edits(rng))]

    def damaged(self, edits: list[Edit]) -> bytes:
        trees = [edit for kind, *(edit, *_) in edits if kind == "tree"]
        if not trees:
            return super().damaged(edits)
        return json.dumps(edited_tree(self.document, trees)).encode()

    def read(self, paths: Paths) -> list[str]:
        return possible.settings(schema.to_mapping(RunConfig.load(paths[0])))


@cache
def readers() -> tuple[Reader, ...]:
    """All of them."""
    import format_readers as formats
    import hdf5_readers as hdf5
    import parameters
    import run_readers

    kinds = (ExperimentList, SweepOfList, Table, Mtz, Stream, Xds, Settings)
    texts = (formats.Integrate, formats.Scalepack, formats.ReflectionCif)
    others = (formats.Model, formats.ModelCif, formats.Mask, formats.GainMap)
    frames = (hdf5.Master, hdf5.FrameData, hdf5.BloscFrames, hdf5.Tiles)
    stores = (hdf5.Shoeboxes, hdf5.ShoeboxesOfRun, hdf5.PhotonCounts, hdf5.Unmerged)
    trained = (parameters.Checkpoint, parameters.ScaleModel, parameters.TrainedIntegrator)
    kinds = (*kinds, formats.MergedAmplitudes, *texts, *others, *frames, *stores, *trained)
    return tuple(kind() for kind in (*kinds, run_readers.RunOnDisk))
