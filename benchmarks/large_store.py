"""Training from a store that is larger than the memory, beside one that is held in it.

    python benchmarks/large_store.py [--gigabytes 50] [--memory 4] [--steps 40]

Simulates some boxes and repeats their compressed chunks, with reflections that go on from frame to
frame, until a store holds so many gigabytes of counts and masks. A process whose memory is limited
(as by ``--max-memory``) opens it, builds the models, and takes so many training steps, steps
of integration and steps of the merge. The same steps from the boxes before they were repeated,
held in memory, are what its speed is compared with. Prints boxes per second of wall and CPU time,
memory, and what a reflection takes of it. Needs a tenth of the gigabytes on the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import torch
from gpu import BACKGROUND, DETECTOR, FRAME_WIDTH, experiment_record, make_store

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.io.shoebox_store import (
    CHUNK_BYTES,
    BackgroundField,
    ShoeboxStore,
    writing_store,
)
from braggflux.integrator.memory import limit_memory
from braggflux.integrator.types import IntensityTable
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.integration.problem import build
from braggflux.pipelines.integration.trainer import Trainer

SPOTS_A_FRAME = 1300
COLUMNS = ("store", "limit GB", "boxes", "GB of boxes", "step", "boxes/s", "boxes/CPU s")


def repeated(small: Path, large: Path, times: int) -> None:
    """Repeat the chunks of a store, and its reflections on the frames that follow."""
    with h5py.File(small) as source:
        columns = {name: column[()] for name, column in source["reflections"].items()}
        attributes, n_frames = dict(source.attrs), len(source["background/0/frame_ratio"])
        boxes = [source[f"boxes/{name}"] for name in ("counts", "mask")]
        n, box = len(boxes[0]), boxes[0].shape[1:]
        with writing_store(large, n * times, box, boxes[0].dtype) as writer:
            for data, to in zip(boxes, (writer._counts, writer._mask), strict=True):
                for first in range(0, n, data.chunks[0]):
                    bits, chunk = data.id.read_direct_chunk((first, 0, 0, 0))
                    for k in range(times):
                        to.id.write_direct_chunk((k * n + first, 0, 0, 0), chunk, bits)
            turn = np.repeat(np.arange(times), n) * n_frames
            longer = {name: np.concatenate([c] * times) for name, c in columns.items()}
            longer["refl_row"] = np.arange(n * times)
            longer["xyz_px"][:, 2] += turn
            longer["xyz_mm"][:, 2] += np.radians(turn * FRAME_WIDTH)
            longer["corner"][:, 0] += turn
            writer.write_columns(longer)
            n_frames *= times
            count = np.full(DETECTOR, n_frames, np.float32)
            field = BackgroundField([count * BACKGROUND], [count], np.ones(n_frames))
            writer.write_background(0, field)
            kept = {
                k: v for k, v in attributes.items() if k not in ("format", "version", "n_rows")
            }
            writer.write_header(kept, [experiment_record(n_frames)])


def integrated(store: ShoeboxStore) -> IntensityTable:
    """Make a table as of an integration pass, of photons drawn for each reflection."""
    metadata, n = store.metadata(), len(store)
    photons = torch.empty(n).exponential_(1 / 300.0) / metadata.lp
    own = ShiftedPoisson(photons + 20.0, torch.full((n,), 20.0), torch.ones(n))
    return IntensityTable(metadata, own, torch.full((n,), BACKGROUND), store.flags)


def measure(path: Path, n_steps: int, batch_size: int) -> dict[str, object]:
    """Build the models of a store and take some steps of each kind."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, object] = {"seconds": {}}
    with ShoeboxStore.open(path) as store:
        found |= {"boxes": len(store), "bytes": 3 * len(store) * math.prod(store.box)}
        found["opened_mb"] = peak_mb()
        with timed(found, "start", len(store)):
            trainer = Trainer(build(store, RunConfig()), RunConfig(), torch.device("cpu"))
        found["started_mb"] = peak_mb()
        found["held"] = store.is_cached
        generator = torch.Generator().manual_seed(0)
        optimizer = trainer.integrator_optimizer
        n = n_steps * batch_size
        with timed(found, "training", n):
            for batch in islice(trainer.batches(batch_size, generator), n_steps):
                trainer.model.zero_grad(set_to_none=True)
                trainer._add_gradients(batch, len(batch))
                optimizer.step()
        with timed(found, "integration", n), torch.no_grad():
            for batch in islice(trainer.batches(batch_size, None), n_steps):
                for part in trainer._parts(batch):
                    trainer.model.integrate(part, sample=False, use_expected=False)
        found["pixels_mb"] = peak_mb()
        trainer.table = integrated(store)
        table = trainer.merge_table()
        trainer.model.merger.count(table)
        with timed(found, "merge step", len(store)):
            trainer.merge_fit.steps(table, 1, lambda _: 0.0)
        found["merged_mb"] = peak_mb()
    return found


def peak_mb() -> float:
    """Largest resident memory so far [MB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@contextmanager
def timed(found: dict, name: str, n: int) -> Iterator[None]:
    """Note wall and CPU time of a block that works on ``n`` boxes."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found["seconds"][name] = n, time.perf_counter() - wall, time.process_time() - cpu


def in_process(path: Path, args: argparse.Namespace, gigabytes: float | None) -> dict:
    """Measure in a process of its own, whose memory is limited."""
    command = [sys.executable, __file__, "--measure", str(path), "--steps", str(args.steps)]
    command += ["--batch-size", str(args.batch_size)]
    if gigabytes is not None:
        command += ["--memory", str(gigabytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{path.name} with {gigabytes} GB:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(held: dict, limited: dict, memory: float) -> list[str]:
    """Lines to print."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for found, name, limit in ((held, "in memory", ""), (limited, "from disk", f"{memory:g}")):
        for step, (n, wall, cpu) in found["seconds"].items():
            size = f"{found['boxes']} | {found['bytes'] / 1e9:.1f}"
            speed = f"{n / wall:.0f} | {n / cpu:.0f}"
            lines.append(f"| {name} | {limit} | {size} | {step} | {speed} |")
    more = limited["boxes"] - held["boxes"]
    stages = ("opened", "started", "pixels", "merged")
    memory_of = ", ".join(f"{k} {limited[f'{k}_mb']:.0f}" for k in stages)
    each = (limited["started_mb"] - held["started_mb"]) * 1e6 / more
    compared = ("training", "integration")
    lines += [
        "",
        *(
            f"speed from disk over that in memory, of {kind} time: "
            + ", ".join(f"{k} {cost(held, k, i) / cost(limited, k, i):.2f}" for k in compared)
            for i, kind in ((1, "wall"), (2, "CPU"))
        ),
        f"largest memory [MB]: {memory_of}; {each:.0f} bytes a reflection at the start",
    ]
    return lines


def cost(found: dict, step: str, kind: int) -> float:
    """Seconds a box of a step, wall (1) or CPU time (2)."""
    return found["seconds"][step][kind] / found["seconds"][step][0]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=50.0)
    parser.add_argument("--memory", type=float, help="limit [GB], 4 by default")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--box", default="13,25,25")
    parser.add_argument("--boxes", type=int, default=8192, help="simulated, then repeated")
    parser.add_argument("--folder", type=Path, help="for the stores; a temporary one by default")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure is not None:
        if args.memory is not None:
            limit_memory(args.memory)
        print(json.dumps(measure(args.measure, args.steps, args.batch_size)))
        return 0
    memory = args.memory or 4.0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        small, large = Path(folder) / "small.h5", Path(folder) / "large.h5"
        box = tuple(int(side) for side in args.box.split(","))
        chunk = max(CHUNK_BYTES // (2 * math.prod(box)), 1)
        n = -(-args.boxes // chunk) * chunk
        make_store(small, n, max(n // SPOTS_A_FRAME, 1), torch.device("cpu"), box)
        times = math.ceil(args.gigabytes * 1e9 / (3 * n * math.prod(box)))
        repeated(small, large, times)
        print(f"{large.stat().st_size / 1e9:.1f} GB on the disk", flush=True)
        held = in_process(small, args, None)
        limited = in_process(large, args, memory)
    print("\n".join(table(held, limited, memory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
