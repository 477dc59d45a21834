"""Extraction from frames of the shared simulation, from beginning to end."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401 - the frames are compressed with bitshuffle
import numpy as np
import pytest
import torch

from braggflux.integrator.crystal.geometry import Scan
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    read_experiments,
    read_reflections,
)
from braggflux.integrator.io.hdf5.frames import FrameStack
from braggflux.integrator.io.images import open_frames
from braggflux.integrator.prediction.predict import predict_reflections
from braggflux.integrator.shoebox.background import mean_image
from braggflux.integrator.shoebox.canvas import FrameCanvas
from braggflux.integrator.shoebox.extent import SpotExtent
from braggflux.integrator.shoebox.extraction import is_full_set, run_extraction
from braggflux.integrator.shoebox.mask import MaskBit
from braggflux.integrator.types import Flag

pytestmark = pytest.mark.realdata
N_FRAMES = 48
D_MIN = 2.2
EXTENT = SpotExtent(0.73, 0.62, 0.077, (7, 11, 11))


def first_frames(experiment, n=N_FRAMES):
    """The experiment cut to its first frames."""
    crystal = replace(
        experiment.crystal, A_at_scan_points=experiment.crystal.A_at_scan_points[: n + 1]
    )
    images = replace(experiment.images, indices=experiment.images.indices[:n])
    return replace(
        experiment, crystal=crystal, images=images, scan=Scan((1, n), experiment.scan.oscillation)
    )


@pytest.fixture(scope="module")
def experiment(shared):
    return first_frames(read_experiments(shared / "data/hewl_nai/refined.expt")[0])


@pytest.fixture(scope="module")
def table(shared):
    """Strong spots of the first frames."""
    refined = read_reflections(shared / "data/hewl_nai/refined.refl")
    return refined.select(refined["xyzobs.px.value"][:, 2] < N_FRAMES)


@pytest.fixture(scope="module")
def store(experiment, table, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "shoeboxes.h5"
    return run_extraction([experiment], D_MIN, path, reflections=table)


@pytest.fixture(scope="module")
def frames(shared):
    with h5py.File(shared / "data/hewl_nai/twin_data_000001.h5") as file:
        dataset = file["entry/data/data"] if "entry/data/data" in file else file["data"]
        return dataset[:N_FRAMES]


def test_boxes_are_slices_of_the_raw_frames(store, frames):
    rows = torch.nonzero(store.flags & Flag.PARTIAL_EDGE == 0)[:, 0][::211]
    counts, mask = store.read_raw(rows)
    corner = store.metadata().corner[rows].numpy()
    depth, height, width = store.box
    for box, bits, (z, y, x) in zip(counts, mask, corner, strict=True):
        raw = frames[z : z + depth, y : y + height, x : x + width].astype(int)
        is_valid = raw != 65535
        np.testing.assert_array_equal((bits & MaskBit.VALID) > 0, is_valid)
        np.testing.assert_array_equal(box, np.where(is_valid, raw, 0))


def test_extent_is_that_of_dials(store):
    """dials.integrate: sigma_m 0.0811 deg, frame width included (2025-11-22: ours 0.077)."""
    assert store.attributes["extent"][2] == pytest.approx(0.0811, rel=0.1)
    assert store.box == (7, 11, 11)


def test_all_reflections_are_there(store, experiment):
    expected = predict_reflections(experiment, D_MIN)
    assert len(store) == len(expected)
    metadata = store.metadata(torch.float64)
    torch.testing.assert_close(metadata.xyz_px.sum(0), expected.xyz_px.sum(0))
    centre = metadata.xyz_px.flip(1) - metadata.corner
    centre[:, 0] /= metadata.frames_per_layer
    half = torch.tensor(store.box) // 2
    assert ((centre >= half) & (centre < half + 1)).all()
    wide = metadata.frames_per_layer > 1
    assert 0.02 < wide.double().mean() < 0.2
    assert metadata.zeta[wide].max() < metadata.zeta[~wide].min() + 1e-9


def test_boxes_hold_the_photons_of_their_reflections(store, shared):
    """Summed boxes less background against the noise-free truth of the simulation."""
    truth = np.load(shared / "data/hewl_nai/true_counts.npz")
    names = {name: truth[name] for name in truth.files}
    photons = next(v for k, v in names.items() if v.ndim == 1)
    metadata = store.metadata(torch.float64)
    known = {}
    for hkl, xyz, value in zip(names["miller_index"], names["xyz_px"], photons, strict=True):
        known.setdefault(tuple(hkl), []).append((xyz[2], value))
    clean = Flag.PARTIAL_EDGE | Flag.MASKED_CORE | Flag.OVERLAPPED | Flag.REJECTED
    rows = torch.nonzero(store.flags & clean == 0)[:, 0]
    counts, mask = store.read_raw(rows)
    is_dark = ((mask & MaskBit.BACKGROUND) > 0).flatten(1)
    level = (counts.flatten(1) * is_dark).sum(1) / is_dark.sum(1)
    signal = ((counts.flatten(1) - level[:, None]) * ~is_dark).sum(1)
    pairs = []
    for row, value in zip(rows.tolist(), signal.tolist(), strict=True):
        hkl, z = tuple(metadata.miller_index[row].tolist()), metadata.xyz_px[row, 2].item()
        near = [true for frame, true in known.get(hkl, ()) if abs(frame - z) < 2]
        pairs += [(value, true) for true in near if true > 200]
    found, true = np.array(pairs).T
    assert len(found) > 300
    assert np.median(found / true) == pytest.approx(1.0, abs=0.02)


def test_background_is_that_of_the_simulation(store, shared):
    truth = np.load(shared / "data/hewl_nai/truth_frames.npz")
    field = store.background(0)
    factor = truth["gb"][:N_FRAMES]
    ratio = field.frame_ratio / factor
    assert np.std(ratio) / np.mean(ratio) < 0.01
    often = field.count[0] > 30
    image = mean_image(field.total[0], field.count[0])[often] / truth["bg"][often]
    assert np.median(image) == pytest.approx(factor.mean(), rel=0.02)


def test_a_predicted_table_gives_the_positions(store, experiment, tmp_path):
    ours = predict_reflections(experiment, D_MIN)[::3]
    shifted = ours.xyz_px.numpy() + np.array([0.3, 0.0, 0.0])
    is_on_panel = shifted[:, 0] <= 487
    table = ReflectionTable(
        {
            "miller_index": ours.miller_index.numpy().astype(np.int32),
            "panel": ours.panel.numpy().astype(np.uint64),
            "id": np.zeros(len(ours), np.int32),
            "s1": ours.s1.numpy(),
            "xyzcal.px": shifted,
            "xyzcal.mm": ours.xyz_mm.numpy(),
            "entering": ours.entering.numpy(),
            "flags": np.full(len(ours), DialsFlag.PREDICTED, np.uint64),
        }
    )
    assert is_full_set(table)
    again = run_extraction(
        [experiment], D_MIN, tmp_path / "s.h5", reflections=table, extent_override=EXTENT
    )
    found = again.metadata(torch.float64).xyz_px.sum(0)
    np.testing.assert_allclose(found, shifted[is_on_panel].sum(0))
    # the spots left out of the table are neighbours still: as many voxels overlap as before
    share = [
        ((s.read_raw(slice(0, len(s)))[1] & MaskBit.OVERLAPPED) > 0).float().mean()
        for s in (store, again)
    ]
    assert share[1] == pytest.approx(float(share[0]), rel=0.2)


def test_box_can_be_given(experiment, tmp_path):
    given = run_extraction(
        [experiment], 3.0, tmp_path / "s.h5", extent_override=EXTENT, box=(3, 13, 15)
    )
    assert given.box == (3, 13, 15)
    with pytest.raises(UserError, match="three odd numbers"):
        run_extraction([experiment], 3.0, tmp_path / "t.h5", extent_override=EXTENT, box=(3, 4, 5))


def test_strong_spots_are_no_full_set(table):
    assert not is_full_set(table)


def test_user_errors(experiment, table, tmp_path):
    out = tmp_path / "s.h5"

    def refused(message, experiments=(experiment,), d_min=D_MIN, **options):
        with pytest.raises(UserError, match=message):
            run_extraction(list(experiments), d_min, out, extent_override=EXTENT, **options)

    refused("beyond the detector", d_min=1.2)
    refused("no experiment", experiments=())
    refused("holds no reflection", reflections=table.select(np.zeros(len(table), bool)))
    moved = table.select(np.arange(len(table)))
    moved.columns["miller_index"] = moved["miller_index"][:, [1, 0, 2]] + np.array([3, -2, 1])
    refused("same DIALS step", reflections=moved)
    del moved.columns["miller_index"]
    refused("lacks the column", reflections=moved)

    class Masked:
        def __init__(self, inner):
            self.inner, self.n_images, self.panel_shapes = (
                inner, inner.n_images, inner.panel_shapes
            )  # fmt: skip

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.inner.close()

        def static_mask(self):
            return [np.zeros(shape, bool) for shape in self.panel_shapes]

    refused("all pixels", frame_source=lambda e: Masked(open_frames(e)))

    def too_many(_):
        return open_frames(first_frames(experiment, 20))

    refused("hold 20 frames", frame_source=too_many)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("extent", "n_reads"), [(EXTENT, 1), (None, 2)])
def test_frames_are_decompressed_once_for_each_look(
    experiment, table, extent, n_reads, tmp_path, monkeypatch
):
    """The pass reads every frame once; to measure the spots, a short scan is read once before."""
    reads, load = [], FrameStack._load_alone

    def counted(self, dataset, frame):
        reads.append(frame)
        return load(self, dataset, frame)

    monkeypatch.setattr(FrameStack, "_load_alone", counted)
    run_extraction(
        [first_frames(experiment, 24)],
        3.0,
        tmp_path / "s.h5",
        reflections=table,
        extent_override=extent,
    )
    assert sorted(reads) == sorted(list(range(24)) * n_reads)


def command(shared, out, *options, before=""):
    folder = shared / "data/hewl_nai"
    program = f"{before}import sys; from braggflux.pipelines.cli import main; sys.exit(main())"
    files = [str(folder / "refined.expt"), str(folder / "refined.refl")]
    return [sys.executable, "-c", program, "extract", *files, "--out", str(out), *options]


#: What something else takes while the boxes are cut: the look at the room has seen a larger disk.
SAW_ROOM = "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(9e9, 0, 9e9); "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "message"),
    [("", "GB free; make room"), (SAW_ROOM, "s.h5: No space left on device; it needs more than")],
    ids=["known before anything is written", "filled while it writes"],
)
def test_a_full_disk_is_one_line(before, message, shared, tmp_path):
    """A small file system in memory, mounted for the command only, stands in for the disk."""
    mount = ["unshare", "-rm", "bash", "-c"]
    small = f"mount -t tmpfs -o size=4m tmpfs {tmp_path}"
    if subprocess.run([*mount, small], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    script = f'{small}; "$@"; code=$?; ls -A {tmp_path}; exit $code'
    program = command(shared, tmp_path / "s.h5", "--d-min", "2.5", before=before)
    run = [*mount, script, "bash", *program]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr  # HDF5 does not crash at the end
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("braggflux: error: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""  # nothing is left in the folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "n"), [("SIGINT", 130, "1"), ("SIGINT", 130, "2"), ("SIGTERM", 143, "2")]
)
def test_a_signal_leaves_nothing(shared, tmp_path, end, code, n):
    run = command(shared, tmp_path / "s.h5", "--d-min", "2.5", "--processes", n)
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    written = "*.h5.*/*" if n == "2" else "*"  # the workers' parts of the store, or itself
    while not any(tmp_path.glob(written)) and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2 or n == "1"
    os.kill(process.pid, getattr(signal, end))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert list(tmp_path.iterdir()) == []


#: What each rank runs: its exit code is left in a file, the launcher does not pass it on.
RANK = """
import os, sys
from pathlib import Path
from braggflux.pipelines.cli import main
code = main(sys.argv[1:])
Path(f"code_{os.environ['RANK']}").write_text(str(code))
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("SIGINT", "130"), ("SIGTERM", "143")])
def test_a_signal_to_the_launcher_ends_every_rank(shared, tmp_path, end, code):
    """``torchrun`` passes it on; what it says itself, after all ranks have ended, is its own."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "out").mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    extract = command(shared, tmp_path / "out/s.h5", "--d-min", "3.0")[3:]
    run = [*launcher, "--nproc-per-node", "2", "rank.py", *extract]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not any(tmp_path.glob("out/.s.h5.*/*")) and process.poll() is None:
        time.sleep(0.05)  # until a rank cuts boxes
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(getattr(signal, end))
    _, stderr = process.communicate(timeout=60)
    assert [(tmp_path / f"code_{k}").read_text() for k in range(2)] == [code] * 2
    assert stderr.count("braggflux: error: ") == 2
    before = stderr[: stderr.rindex("braggflux: error: ")]
    assert "Traceback" not in before
    assert len(ranks) == 2
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert list((tmp_path / "out").iterdir()) == []


def test_frames_too_large_for_the_memory_are_told(experiment, table, tmp_path, monkeypatch):
    def none_left(self):
        raise MemoryError

    monkeypatch.setattr(FrameCanvas, "empty", none_left)
    with pytest.raises(UserError, match=r"0.3 megapixels need about 0.015 GB"):
        run_extraction([experiment], 3.0, tmp_path / "s.h5", reflections=table)
    assert list(tmp_path.iterdir()) == []
