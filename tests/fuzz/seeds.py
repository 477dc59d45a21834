"""Small valid files of each format, written once a session; what is damaged are copies."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import gemmi
import h5py
import hdf5plugin
import numpy as np
import torch
from format_seeds import write_formats

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.io.dials import (
    ReflectionTable,
    read_experiments,
    read_reflections,
    write_reflections,
)
from braggflux.integrator.io.dials.sweeps import describe_experiment
from braggflux.integrator.io.intensity_file import write_intensities
from braggflux.integrator.io.shoebox_store import GZIP, ShoeboxStore
from braggflux.integrator.types import IntensityTable
from braggflux.merge.io.formats.unmerged_mtz import UnmergedTable, write_unmerged_mtz
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.integration.extraction import extract

N_ROWS = 40
CELL, GROUP = gemmi.UnitCell(79.3, 79.3, 37.8, 90, 90, 90), gemmi.SpaceGroup("P 43 21 2")


@cache
def folder() -> Path:
    """Simulated frames, .expt and .refl of 40 rows, shoeboxes and the rest."""
    path = Path(mkdtemp(prefix="fuzz-seeds-"))
    small = {"scan.n_images": 10, "images_per_file": 5}
    simulate(path, "tiny", 0, overrides=small)
    extract(
        RunConfig(expt=path / "tiny.expt", refl=path / "tiny.refl"), path / "shoeboxes.h5"
    ).close()
    _add_neighbours(path / "shoeboxes.h5")
    _write_table(path)
    _write_lists(path)
    _write_intensities(path)
    _write_mtz(path)
    _write_other_packings(path)
    write_formats(path)
    (path / "a.stream").write_text(STREAM)
    (path / "a.HKL").write_text(xds_text())
    (path / "config.yaml").write_text((path_of_reference()).read_text())
    return path


def path_of_reference() -> Path:
    """The annotated file of all settings."""
    from braggflux.pipelines.config import run

    return Path(run.__file__).with_name("reference_full.yaml")


def _add_neighbours(store: Path) -> None:
    """Give the store pairs of overlapping spots, which so small a crystal has not."""
    rng = np.random.default_rng(2)
    columns = {
        "row": np.arange(N_ROWS) // 2,
        "offset": rng.uniform(-4.0, 4.0, (N_ROWS, 3)).astype(np.float32),
        "zeta": np.full(N_ROWS, 0.8, np.float32),
        "experiment": np.zeros(N_ROWS, np.int64),
        "store_row": np.arange(N_ROWS) - 1,
    }
    with h5py.File(store, "r+") as file:
        for name, values in columns.items():
            del file["neighbours"][name]
            file["neighbours"].create_dataset(name, data=values, **GZIP)


def _write_table(path: Path) -> None:
    """Rows with what dials.integrate adds."""
    table = read_reflections(path / "tiny.refl")
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(len(table), N_ROWS, replace=False))
    columns = table.select(rows).columns
    strength = np.exp(rng.normal(5.0, 1.0, N_ROWS))
    columns |= {
        "flags": np.full(N_ROWS, 1 << 0 | 1 << 2 | 1 << 8 | 1 << 9, np.uint64),
        "lp": rng.uniform(0.3, 0.9, N_ROWS),
        "qe": rng.uniform(0.8, 1.0, N_ROWS),
        "partiality": np.ones(N_ROWS),
        "d": rng.uniform(2.0, 9.0, N_ROWS),
    }
    for kind in ("sum", "prf"):
        columns[f"intensity.{kind}.value"] = strength
        columns[f"intensity.{kind}.variance"] = strength + 9.0
    write_reflections(
        path / "table.refl", ReflectionTable(columns, table.identifiers, "integrated")
    )


def _write_lists(path: Path) -> None:
    """A list with every form of model: nested panels, goniometers, scan points, properties."""
    document = json.loads((path / "tiny.expt").read_text())
    document["imageset"][0]["template"] = str(path / "tiny_master.h5")
    (path / "sweep.expt").write_text(json.dumps(document))
    n = 11
    crystal, beam = document["crystal"][0], document["beam"][0]
    A = np.linalg.inv([crystal[f"real_space_{name}"] for name in "abc"])
    second = {
        "crystal": crystal | {"A_at_scan_points": [A.ravel().tolist()] * n},
        "beam": beam | {"s0_at_scan_points": [[0.0, 0.0, -1.0 / beam["wavelength"]]] * n},
        "goniometer": {
            "axes": [[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0]],
            "angles": [0.0, 12.0, 0.0],
            "names": ["phi", "kappa", "omega"],
            "scan_axis": 2,
        },
        "scan": {
            "image_range": [1, 10],
            "batch_offset": 0,
            "properties": {
                "oscillation": [0.5 * i for i in range(10)],
                "oscillation_width": [0.5] * 10,
            },
            "valid_image_ranges": {"b": [[1, 3]]},
        },
    }
    panel = dict(document["detector"][0]["panels"][0])
    second["detector"] = {
        "panels": [panel | {"name": f"p{i}", "mask": [[0, 0, 5, 5]]} for i in range(2)],
        "hierarchy": {
            "name": "root",
            "fast_axis": [1.0, 0.0, 0.0],
            "slow_axis": [0.0, 1.0, 0.0],
            "origin": [0.0, 0.0, -9.0],
            "children": [{"panel": 0}, {"panel": 1}],
        },
    }
    first = document["experiment"][0]
    entry = dict(first, identifier="b")
    for name, block in second.items():
        document[name].append(block)
        entry[name] = 1
    del entry["imageset"]
    document["experiment"] = [first, entry]
    (path / "list.expt").write_text(json.dumps(document))


def _write_intensities(path: Path) -> None:
    rng = np.random.default_rng(1)
    with ShoeboxStore.open(path / "shoeboxes.h5") as store:
        rows = torch.arange(0, len(store), max(len(store) // N_ROWS, 1))[:N_ROWS]
        metadata, records = store.metadata()[rows], store.experiments
    n = len(rows)
    law = {f.name: torch.as_tensor(rng.uniform(20.0, 90.0, n)) for f in fields(ShiftedPoisson)}
    law["exposure"] = torch.full((n,), 0.9, dtype=torch.float64)
    table = IntensityTable(
        metadata, ShiftedPoisson(**law), torch.ones(n), torch.zeros(n, dtype=torch.int64)
    )
    write_intensities(path / "intensities.h5", table, records)


def _write_mtz(path: Path) -> None:
    sweep = read_experiments(path / "sweep.expt")
    table = read_reflections(path / "table.refl")
    table = UnmergedTable(
        miller_index=table["miller_index"].astype(np.int64),
        experiment=np.zeros(N_ROWS, np.int64),
        intensity=table["intensity.prf.value"],
        sigma=np.sqrt(table["intensity.prf.variance"]),
        xyz_px=table["xyzcal.px"],
        lp=table["lp"],
    )
    write_unmerged_mtz(path / "a.mtz", table, sweep, history=["of a test"])


def _write_other_packings(path: Path) -> None:
    """Write the frames packed by Blosc, and as tiles of a virtual data set."""
    with h5py.File(path / "tiny_master.h5") as master:
        frames = master["entry/data/data"][()]
    for name in ("blosc", "tiles"):
        (path / name).mkdir()
        shutil.copyfile(path / "tiny_master.h5", path / name / "tiny_master.h5")
    chunks, half = (1, *frames.shape[1:]), frames.shape[1] // 2
    with h5py.File(path / "blosc/tiny_master.h5", "r+") as master:
        del master["entry/data/data"]
        packing = hdf5plugin.Blosc(cname="lz4", shuffle=hdf5plugin.Blosc.BITSHUFFLE)
        master.create_dataset("entry/data/data", data=frames, chunks=chunks, **packing)
    layout = h5py.VirtualLayout(frames.shape, frames.dtype)
    with h5py.File(path / "tiles/tiles.h5", "w") as file:
        for name, rows in (("top", slice(None, half)), ("bottom", slice(half, None))):
            tile = frames[:, rows]
            packing = hdf5plugin.Bitshuffle(cname="lz4")
            file.create_dataset(name, data=tile, chunks=(1, *tile.shape[1:]), **packing)
            layout[:, rows] = h5py.VirtualSource("tiles.h5", name, tile.shape)
    with h5py.File(path / "tiles/tiny_master.h5", "r+", libver="v110") as master:
        del master["entry/data/data"]
        master.create_virtual_dataset("entry/data/data", layout)


def records() -> list[dict[str, object]]:
    """Of the sweep, as stores have them."""
    return [describe_experiment(e) for e in read_experiments(folder() / "sweep.expt")]


_ROWS = "\n".join(
    f"{h:4d}{k:4d}{5:4d} {100.0 + 9 * h + k:10.2f} {11.0 + k:8.2f} {50.0:9.2f} {7.0:8.2f} "
    f"{300.0 + h:7.1f} {200.0 + k:7.1f} p0"
    for h in range(3)
    for k in range(1, 5)
)
_CRYSTAL = f"""--- Begin crystal
Cell parameters 7.93000 7.93000 3.78000 nm, 90.00000 90.00000 90.00000 deg
astar = +0.1261034 +0.0000000 +0.0000000 nm^-1
bstar = +0.0000000 +0.1261034 +0.0000000 nm^-1
cstar = +0.0000000 +0.0000000 +0.2645503 nm^-1
lattice_type = tetragonal
centering = P
unique_axis = c
profile_radius = 0.00300 nm^-1
num_reflections = 12
Reflections measured after indexing
   h    k    l          I   sigma(I)       peak background  fs/px  ss/px panel
{_ROWS}
End of reflections
--- End crystal
"""
STREAM = (
    "CrystFEL stream format 2.3\nGenerated by CrystFEL 0.9.0\n"
    "----- Begin unit cell -----\nCrystFEL unit cell file version 1.0\n"
    "----- End unit cell -----\n"
    + "".join(
        f"----- Begin chunk -----\nImage filename: a{i}.h5\nImage serial number: {i}\nhit = 1\n"
        f"photon_energy_eV = 9700.0\naverage_camera_length = 0.149 m\n{_CRYSTAL}"
        "----- End chunk -----\n"
        for i in range(1, 4)
    )
)


def xds_text() -> str:
    """XDS_ASCII.HKL of CORRECT."""
    head = """!FORMAT=XDS_ASCII    MERGE=FALSE    FRIEDEL'S_LAW=FALSE
!OUTPUT_FILE=XDS_ASCII.HKL        DATE=14-Sep-2022
!DATA_RANGE=       1    100
!ROTATION_AXIS=  0.999994  0.003061 -0.001524
!OSCILLATION_RANGE=  0.500000
!STARTING_ANGLE=     0.000
!STARTING_FRAME=       1
!SPACE_GROUP_NUMBER=   96
!UNIT_CELL_CONSTANTS=    79.336    79.336    37.797  90.000  90.000  90.000
!UNIT_CELL_A-AXIS=    57.023    54.873     5.619
!UNIT_CELL_B-AXIS=   -53.323    52.768    25.815
!UNIT_CELL_C-AXIS=     6.726   -10.639    35.640
!X-RAY_WAVELENGTH=  1.892000
!INCIDENT_BEAM_DIRECTION=  0.004215 -0.006992  0.999967
!FRACTION_OF_POLARIZATION=   0.980
!POLARIZATION_PLANE_NORMAL=  0.000000  1.000000  0.000000
!SENSOR_THICKNESS=  0.320000
!NX=  2463  NY=  2527    QX=  0.172000  QY=  0.172000
!ORGX=   1305.18  ORGY=   1695.69
!DETECTOR_DISTANCE=   149.766
!DIRECTION_OF_DETECTOR_X-AXIS=   1.00000   0.00000   0.00000
!DIRECTION_OF_DETECTOR_Y-AXIS=   0.00000   1.00000   0.00000
!NUMBER_OF_ITEMS_IN_EACH_DATA_RECORD=12
"""
    items = "H K L IOBS SIGMA(IOBS) XD YD ZD RLP PEAK CORR PSI".split()
    head += "".join(f"!ITEM_{name}={i}\n" for i, name in enumerate(items, 1))
    rows = "".join(
        f"{h:6d}{k:6d}{2:6d}{10.0 + h:11.3E}{0.5 + k:11.3E}{1310.0 + 9 * h:8.1f}"
        f"{1700.0 + 9 * k:8.1f}{20.3 + h + 7 * k:9.1f}{0.5:10.5f} 100  65  {60.0 + h:7.2f}\n"
        for h in range(5)
        for k in range(1, 6)
    )
    return f"{head}!END_OF_HEADER\n{rows}!END_OF_DATA\n"
