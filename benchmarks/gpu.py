"""Training, integration and merging of a large simulated data set on a GPU.

    python benchmarks/gpu.py [--boxes 1900000] [--frames 1440] [--epochs 11] [--minutes 8]

Makes its own shoeboxes: Gaussian spots of a crystal like lysozyme with a Wilson intensity for
every unique reflection, scales that drift from frame to frame, Poisson noise. Then it trains as
``braggflux run`` does, with the outputs of every epoch, and prints for each stage the time, what
it would take at the least (its bytes over the memory's bandwidth, which is measured, and its
multiplications over the speed of large matrix products) and the gap; the throughput of inference;
kernels per step and how long they keep the GPU busy (torch.profiler); memory of the device and of
the host. Epochs stop when ``--minutes`` would be passed, and the table says how many there were.

``--device cpu`` with few boxes tries it out; without a GPU there is nothing to measure otherwise.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import gemmi
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.io.shoebox_store import BackgroundField, ShoeboxStore, writing_store
from braggflux.integrator.shoebox.mask import MaskBit
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.config.schema import updated
from braggflux.pipelines.integration.epoch_outputs import merge_epoch
from braggflux.pipelines.integration.problem import build
from braggflux.pipelines.integration.trainer import Trainer
from braggflux.pipelines.workspace.stage_times import StageTimes

CELL, SPACE_GROUP = gemmi.UnitCell(79.4, 79.4, 37.8, 90, 90, 90), gemmi.SpaceGroup("P 43 21 2")
DETECTOR = (4148, 4362)  # slow, fast
SIGMA = (0.10, 0.9, 0.9)  # deg, px, px
FRAME_WIDTH, WAVELENGTH, PIXEL, DISTANCE = 0.25, 1.0, 0.075, 150.0
BACKGROUND, PHOTONS = 0.3, 300.0
CHUNK = 16384
PROFILED_STEPS = 10


def metadata_columns(
    n: int, n_frames: int, box: tuple, d_min: float, rng
) -> tuple[dict, np.ndarray]:
    """Columns of ``n`` reflections in the order of their frames, and their rows in the ASU."""
    asu = ReciprocalAsu(CELL, SPACE_GROUP, d_min, anomalous=True)
    row = rng.integers(0, len(asu), n)
    frame = np.sort(rng.uniform(0, n_frames, n))
    xyz = np.column_stack([rng.uniform(20, side - 20, n) for side in DETECTOR[::-1]] + [frame])
    centre = np.array([DETECTOR[1], DETECTOR[0]]) / 2
    flat = np.column_stack([(xyz[:, :2] - centre) * PIXEL, np.full(n, DISTANCE)])
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    phi = np.radians(frame * FRAME_WIDTH)
    turned = np.column_stack(
        [unit[:, 0] * np.cos(phi) + unit[:, 2] * np.sin(phi), unit[:, 1],
         unit[:, 2] * np.cos(phi) - unit[:, 0] * np.sin(phi)]
    )  # fmt: skip
    zeta = rng.uniform(0.5, 1.0, n)
    half = np.array(box) // 2
    cos = unit[:, 2]
    columns = {
        "refl_row": np.arange(n),
        "miller_index": asu.miller_index[row].astype(np.int64),
        "experiment": np.zeros(n, np.int64),
        "panel": np.zeros(n, np.int64),
        "xyz_px": xyz,
        "xyz_mm": np.column_stack([xyz[:, :2] * PIXEL, phi]),
        "s1": unit / WAVELENGTH,
        "s0_crystal": np.column_stack([np.sin(phi), np.zeros(n), np.cos(phi)]),
        "s1_crystal": turned,
        "d": asu.d[row],
        "lp": np.sqrt(1 - cos**2) * 2 / (1 + cos**2) + 0.05,
        "zeta": zeta,
        "frame_sigma": np.sqrt((SIGMA[0] / zeta / FRAME_WIDTH) ** 2 + 1 / 12),
        "corner": np.floor(xyz[:, ::-1]).astype(np.int64) - half,
        "frames_per_layer": np.ones(n, np.int64),
        "flags": np.zeros(n, np.int64),
        "entering": np.ones(n, bool),
        "recorded_fraction": np.ones(n),
    }
    return columns, row


def make_store(
    path: Path, n: int, n_frames: int, device: torch.device, box=(7, 11, 11), d_min=1.1, seed=0
) -> None:
    """Write a store of ``n`` boxes."""
    rng = np.random.default_rng(seed)
    columns, row = metadata_columns(n, n_frames, box, d_min, rng)
    strength = rng.exponential(PHOTONS, int(row.max()) + 1)
    scale = 1 + 0.1 * np.sin(columns["xyz_px"][:, 2] / 50)
    photons = strength[row] * scale / columns["lp"]
    torch.manual_seed(seed)
    most, dtype = 0, np.uint16
    with writing_store(path, n, box, np.dtype(dtype)) as writer:
        for first in range(0, n, CHUNK):
            part = slice(first, min(first + CHUNK, n))
            voxels = gaussian(
                *(
                    torch.as_tensor(columns[k][part], device=device)
                    for k in ("xyz_px", "corner", "zeta")
                ),
                box,
            )
            rate = voxels * torch.as_tensor(photons[part], device=device)[:, None, None, None]
            counts = torch.poisson((rate + BACKGROUND).float()).clamp_max(65534).cpu().numpy()
            most = max(most, int(counts.max()))
            mask = np.full(counts.shape, MaskBit.VALID | MaskBit.FOREGROUND, np.uint8)
            writer.write_boxes(first, counts.astype(dtype), mask)
        writer.write_columns(columns)
        total = np.full(DETECTOR, BACKGROUND * n_frames, np.float32)
        count = np.full(DETECTOR, n_frames, np.float32)
        writer.write_background(0, BackgroundField([total], [count], np.ones(n_frames)))
        writer.write_header(
            {
                "extent": np.array([SIGMA[2], SIGMA[1], SIGMA[0]]),
                "rocking": np.array([SIGMA[0], 0.0]),
                "box": np.array(box),
                "max_count": most,
                "d_min": d_min,
            },
            [experiment_record(n_frames)],
        )


def gaussian(xyz: torch.Tensor, corner: torch.Tensor, zeta: torch.Tensor, box) -> torch.Tensor:
    """Share of a Gaussian spot in each voxel, (B, D, H, W)."""
    shares = []
    for axis, n in enumerate(box):
        edges = (
            torch.arange(n + 1, device=xyz.device) + corner[:, axis, None] - xyz[:, 2 - axis, None]
        )
        width = SIGMA[0] / zeta / FRAME_WIDTH if axis == 0 else torch.full_like(zeta, SIGMA[axis])
        shares.append(torch.special.ndtr(edges / width[:, None]).diff(dim=1))
    return torch.einsum("bi,bj,bk->bijk", *shares)


def experiment_record(n_frames: int) -> dict:
    """Describe the sweep for the header of a store."""
    return {
        "identifier": "", "wavelength": WAVELENGTH, "n_images": n_frames,
        "image_range": [1, n_frames], "oscillation_deg": [0.0, FRAME_WIDTH],
        "unit_cell": list(CELL.parameters), "space_group": SPACE_GROUP.xhm(),
        "panel_shapes": [list(DETECTOR)], "pixel_size_mm": [[PIXEL, PIXEL]], "images": [],
    }  # fmt: skip


def synchronise(device: torch.device) -> None:
    """Wait for all kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed_of(device: torch.device) -> tuple[float, float]:
    """Measure memory bandwidth [bytes/s] and speed of float32 products [FLOP/s]."""
    big = device.type == "cuda"
    block = torch.ones((1 << 28) if big else (1 << 22), device=device)
    side = 8192 if big else 512
    matrix = torch.ones(side, side, device=device)
    found = []
    for work, amount in (
        (lambda: block.clone(), 2 * block.numel() * 4),
        (lambda: matrix @ matrix, 2 * side**3),
    ):
        work()
        synchronise(device)
        start = time.perf_counter()
        for _ in range(5):
            work()
        synchronise(device)
        found.append(5 * amount / (time.perf_counter() - start))
    return found[0], found[1]


def profiled_steps(trainer: Trainer, device: torch.device) -> dict[str, float]:
    """Kernels per training step, and the share of the time that they keep the device busy."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    batches = trainer.batches(trainer.config.training.batch_size)
    some = [batch for batch, _ in zip(batches, range(PROFILED_STEPS), strict=False)]

    def steps() -> None:
        for batch in some:
            trainer.model.zero_grad(set_to_none=True)
            terms, _ = trainer.model.joint_terms(batch)
            (-terms.elbo / len(batch)).backward()
        synchronise(device)

    steps()
    start = time.perf_counter()
    steps()
    wall = time.perf_counter() - start
    with profile(activities=activities) as watch:
        steps()
    events = watch.key_averages()
    busy = sum(getattr(e, "self_device_time_total", 0) for e in events) / 1e6
    launches = sum(e.count for e in events if e.key.startswith(("cudaLaunchKernel", "cuLaunch")))
    operators = sum(e.count for e in events if e.key.startswith("aten::"))
    flops = flop_of(steps)
    n = len(some)
    return {
        "steps": n,
        "wall": wall / n,
        "busy": busy / wall if busy else float("nan"),
        "launches": launches / n,
        "operators": operators / n,
        "flop": flops / n,
    }


def flop_of(work) -> float:
    """Multiplications and additions of matrix products, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def benchmark(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, object]:
    """Make the store, train, and return what was measured."""
    began, stages = time.perf_counter(), StageTimes()
    with stages("make shoeboxes"):
        box = tuple(int(side) for side in args.box.split(","))
        make_store(folder / "boxes.h5", args.boxes, args.frames, device, box, args.d_min)
    changes = {"training.epochs": args.epochs, "training.batch_size": args.batch_size}
    config = updated(RunConfig(), changes | {"extraction.d_min": args.d_min})
    with ShoeboxStore.open(folder / "boxes.h5") as store:
        with stages("start of the models"):
            trainer = Trainer(build(store, config), config, device, stages=stages)
        with stages("first epoch"):
            trainer.start()
        steps = profiled_steps(trainer, device)
        ends = [time.perf_counter()]
        while trainer.epoch < args.epochs:
            lasted = max(np.diff(ends), default=0.0)
            if ends[-1] + lasted - began > 60 * args.minutes:
                break
            trainer.run_epoch()
            with stages("outputs", trainer.epoch):
                merge_epoch(trainer)
            synchronise(device)
            ends.append(time.perf_counter())
        n_used, n_bytes = len(trainer.dataset), store.in_memory.n_bytes if store.in_memory else 0
    bandwidth, speed = speed_of(device)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "boxes": n_used,
        "epochs": trainer.epoch,
        "stages": stages.rows,
        "steps": steps,
        "total_s": time.perf_counter() - began,
        "bandwidth": bandwidth,
        "speed": speed,
        "bytes": n_bytes,
        "batch_size": args.batch_size,
        "device_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def table(found: dict) -> list[str]:
    """Lines to print: floor, achieved, gap of each stage, then what else was measured."""
    n, steps, epochs = found["boxes"], found["steps"], max(found["epochs"], 1)
    n_steps = -(-n // found["batch_size"])
    # boxes are read once a pass; matrix products are those of a step, a third without gradients
    read, products = found["bytes"] / found["bandwidth"], n_steps * steps["flop"] / found["speed"]
    floors = {"training pass": read + products, "integration pass": read + products / 3}
    total = f"{found['epochs']} epochs, {found['total_s']:.0f} s in all"
    lines = [f"{found['device']}: {n} boxes, {total}"]
    lines += ["", "| stage | floor s | achieved s | gap | boxes/s |", "|---|---|---|---|---|"]
    for stage in dict.fromkeys(row["stage"] for row in found["stages"]):
        own = [r["wall_s"] for r in found["stages"] if r["stage"] == stage and r["epoch"] != 0]
        seconds = sum(own) / max(len(own), 1)
        floor = floors.get(stage)
        gap = "" if floor is None else f"{seconds / floor:.0f}"
        known = "" if floor is None else f"{floor:.3g}"
        lines.append(
            f"| {stage} | {known} | {seconds:.3g} | {gap} | {n / max(seconds, 1e-9):.3g} |"
        )
    of_epochs = sum(r["wall_s"] for r in found["stages"] if r["epoch"])
    epoch = of_epochs / epochs
    lines += [
        "",
        f"an epoch with outputs: {epoch:.2f} s; eleven: {11 * epoch / 60:.1f} min",
        f"a training step without Adam: {1e3 * steps['wall']:.1f} ms, "
        f"{steps['operators']:.0f} operators, {steps['launches']:.0f} kernels, device busy "
        f"{100 * steps['busy']:.0f} %",
        f"memory: device {found['device_gb']} GB, host {found['host_gb']:.1f} GB",
    ]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--boxes", type=int, default=1_900_000)
    parser.add_argument("--frames", type=int, default=1440)
    parser.add_argument("--box", default="7,11,11")
    parser.add_argument("--d-min", type=float, default=1.1)
    parser.add_argument("--epochs", type=int, default=11)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is here: nothing to measure; --device cpu --boxes 3000 tries it out")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = benchmark(args, torch.device(args.device), Path(folder))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
