#!/usr/bin/env python3
r"""Map quality and Bijvoet correlation against dose: joint, staged and DIALS on the same photons.

Lower doses of a simulated data set are made by binomial thinning: a Poisson count of which every
photon is kept with probability p is a Poisson count of p times the rate, so that a thinned frame
is exactly one of a shorter exposure. Masked pixels keep their mark. Geometry is that of the full
dose for every program, so that rows differ by integration, scaling and merging alone.

Every row is made in a folder of its own below ``--work``; what is there is not made again, so that
a killed call goes on where it was.

Rows
----
joint, staged      ``braggflux run``, ``--coupling staged``
joint-wilson ...   the same with ``--set merge.prior=wilson``
dials              ``dials.integrate``, ``dials.scale anomalous=True``, ``dials.merge``
dials-tuned        the same integration scaled with ``physical.scale_interval=1.0
                   physical.absorption_level=medium``

Columns
-------
weighted, unweighted, DANO   sum of the heights [sigma] of iodides 204, 205, 206 by
                             anomalous_peaks.py
CC, CC of DANO               of Bijvoet differences with the truth by shell, on the pairs that
                             all files of a dose have
CPU s                        of the commands

Examples
--------
../shared/tools/dials_reference.sh ../shared/data/hewl_nai/twin_master.h5 twin_dials 2.0
python benchmarks/doses.py --doses 30 100 8 1 --rows joint staged dials dials-tuned \
    --geometry twin_dials --work doses --figure docs/figures/dose.svg
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MASTER, DATA = "twin_master.h5", "twin_data_000001.h5"
MASKED = 65535  # of 16-bit frames
IODIDES = ("IOD204:I", "IOD205:I", "IOD206:I")
OPTIONS = {
    "joint": ("--coupling", "joint"),
    "staged": ("--coupling", "staged"),
    "joint-wilson": ("--coupling", "joint", "--set", "merge.prior=wilson"),
    "staged-wilson": ("--coupling", "staged", "--set", "merge.prior=wilson"),
}
TUNED = ("physical.scale_interval=1.0", "physical.absorption_level=medium")
ROWS = (*OPTIONS, "dials", "dials-tuned")
#: Columns of heights: their options of anomalous_peaks.py.
HEIGHTS = {"weighted": (), "unweighted": ("--no-weight",), "DANO": ("--dano",)}


@dataclass(frozen=True)
class Places:
    """What the command line says.

    Attributes
    ----------
    data, tools : Path
        The simulated data set; its scorers.
    geometry : Path
        Folder with refined.expt and refined.refl, strong spots with shoeboxes.
    work : Path
        Of all rows.
    d_min : float
        [A].
    epochs : int
        Of our rows.
    """

    data: Path
    tools: Path
    geometry: Path
    work: Path
    d_min: float
    epochs: int


@dataclass(frozen=True)
class Row:
    """One result: a program on one dose.

    Attributes
    ----------
    name : str
        One of :data:`ROWS`.
    dose : int
        Denominator of the dose.
    seed : int
    folder : Path
        Holds merged.mtz in the end.
    commands : tuple of tuple of str
        One after the other; of ``braggflux``, which makes the folder, or in the folder.
    """

    name: str
    dose: int
    seed: int
    folder: Path
    commands: tuple[tuple[str, ...], ...]

    @property
    def merged(self) -> Path:
        """The merged file."""
        return self.folder / "merged.mtz"

    def beside(self, ending: str) -> Path:
        """File beside the folder."""
        return self.folder.with_name(self.folder.name + ending)

    def make(self) -> None:
        """Run the commands unless the merged file is there."""
        if self.merged.exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # of a killed run
        is_ours = self.name in OPTIONS
        if not is_ours:
            self.folder.mkdir(parents=True)
        # DIALS finds the frames' filters there; a second copy of them disturbs our own
        plugins = {} if is_ours else {"HDF5_PLUGIN_PATH": hdf5plugin.PLUGINS_PATH}
        spent = 0.0
        with open(self.beside(".log"), "wb") as log:
            for command in self.commands:
                print(shlex.join(command), file=sys.stderr, flush=True)
                where = None if is_ours else self.folder
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, cwd=where, env=os.environ | plugins
                )
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                spent += usage.ru_utime + usage.ru_stime
                if process.returncode != 0:
                    raise SystemExit(f"failed, see {log.name}")
        self.beside(".cost.json").write_text(json.dumps({"cpu_s": round(spent)}) + "\n")

    def heights(self, places: Places) -> dict[str, float]:
        """Sum the iodides' heights [sigma], kept in a file beside the folder."""
        path = self.beside(".heights.json")
        if path.exists() and path.stat().st_mtime > self.merged.stat().st_mtime:
            return json.loads(path.read_text())
        result = {}
        for kind, options in HEIGHTS.items():
            if kind == "DANO" and self.name not in ("joint", "staged"):
                continue  # DIALS' column of that name means something else
            model, limit = places.data / "9b7c.pdb", ("--d-min", str(places.d_min))
            scorer = places.tools / "anomalous_peaks.py"
            peaks = score(scorer, self.merged, model, *limit, *options)["peaks"]
            result[kind] = round(sum(peaks[site] for site in IODIDES), 2)
        path.write_text(json.dumps(result) + "\n")
        return result

    def cost(self) -> str:
        """CPU seconds, empty if not known."""
        path = self.beside(".cost.json")
        return str(json.loads(path.read_text())["cpu_s"]) if path.exists() else ""


def score(script: Path, *arguments: object) -> Any:
    """Run a scorer, which prints JSON."""
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def thinned(places: Places, dose: int) -> Path:
    """Folder of the frames and the geometry of 1 / ``dose``, made if absent."""
    folder = places.work / f"frames_{dose}"
    if (folder / DATA).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(places.data / MASTER, folder / MASTER)
    experiments = json.loads((places.geometry / "refined.expt").read_text())
    for imageset in experiments["imageset"]:
        imageset["template"] = MASTER
    (folder / "refined.expt").write_text(json.dumps(experiments))
    if dose == 1:
        shutil.copyfile(places.data / DATA, folder / DATA)
        return folder
    temporary = folder / "thinning.h5"
    with h5py.File(places.data / DATA) as source, h5py.File(temporary, "w") as file:
        frames = source["data"]
        bitshuffle = hdf5plugin.Bitshuffle()
        result = file.create_dataset(
            "data", frames.shape, frames.dtype, chunks=frames.chunks, **bitshuffle
        )
        rng = np.random.default_rng(dose)
        for k in range(len(frames)):
            result[k] = thin(frames[k], 1 / dose, rng)
    temporary.rename(folder / DATA)
    return folder


def thin(counts: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Keep each photon with probability ``share``; masked pixels as they are."""
    result = counts.copy()
    is_counted = counts != MASKED
    result[is_counted] = rng.binomial(counts[is_counted], share)
    return result


def make_row(places: Places, name: str, dose: int, seed: int) -> Row:
    """Row with its commands; DIALS knows no seed."""
    frames = thinned(places, dose).resolve()
    refl, limit = places.geometry.resolve() / "refined.refl", str(places.d_min)
    if name in OPTIONS:
        folder = places.work / f"d{dose}_{name}_s{seed}"
        run = (
            *(str(Path(sys.executable).with_name("braggflux")), "run"),
            *(str(frames / "refined.expt"), str(refl), "--model", str(places.data / "9b7c.pdb")),
            *("--d-min", limit, "--epochs", str(places.epochs), "--seed", str(seed)),
            *("--device", "cpu", *OPTIONS[name], "--out", str(folder)),
        )
        return Row(name, dose, seed, folder, (run,))
    integrated = (places.work / f"d{dose}_dials").resolve()
    predicted = f"prediction.d_min={limit}"
    integrate = ("dials.integrate", str(frames / "refined.expt"), str(refl), "nproc=1", predicted)
    scale = (
        *("dials.scale", str(integrated / "integrated.expt"), str(integrated / "integrated.refl")),
        *("anomalous=True", f"d_min={limit}"),
    )
    merge = ("dials.merge", "scaled.expt", "scaled.refl", "anomalous=True")
    if name == "dials":
        return Row(name, dose, 0, integrated, (integrate, scale, merge))
    make_row(places, "dials", dose, 0).make()
    folder = places.work / f"d{dose}_dials_tuned"
    return Row(name, dose, 0, folder, ((*scale, *TUNED), merge))


def correlations(places: Places, rows: list[Row], *options: str) -> dict[Path, list[float]]:
    """Correlation of Bijvoet differences with the truth by shell of the rows of one dose."""
    truth = places.data / "truth.mtz"
    found = score(
        places.tools / "bijvoet_truth.py", truth, *(row.merged for row in rows), *options
    )
    return {Path(p): [shell["cc_bijvoet"] for shell in shells] for p, shells in found.items()}


def scored(places: Places, rows: list[Row]) -> list[dict[str, Any]]:
    """All numbers of the rows of one dose."""
    plain, coupled = correlations(places, rows), correlations(places, rows, "--dano")
    result = []
    for row in rows:
        heights = row.heights(places)
        cc = {"CC": plain[row.merged]}
        if "DANO" in heights:
            cc["CC of DANO"] = coupled[row.merged]
        cells = {"dose": row.dose, "row": row.name, "seed": row.seed, "CPU s": row.cost()}
        result.append(cells | heights | cc)
    return result


def show(rows: list[dict[str, Any]]) -> None:
    """Print lines of the table."""
    for row in rows:
        cells = [f"1/{row['dose']}", row["row"], str(row["seed"])]
        cells += [f"{row[k]:.2f}" if k in row else "" for k in HEIGHTS]
        cells += [" ".join(f"{c:.3f}" for c in row.get(k, ())) for k in ("CC", "CC of DANO")]
        print("| " + " | ".join([*cells, row["CPU s"]]) + " |", flush=True)


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[int, tuple[float, float]]]:
    """Sum of heights and mean correlation by dose, mean of the seeds, of what is drawn."""
    drawn = {
        "braggflux, coupled difference": ("joint", "DANO", "CC of DANO"),
        "braggflux, F(+) - F(-)": ("joint", "unweighted", "CC"),
        "staged, F(+) - F(-)": ("staged", "unweighted", "CC"),
        "DIALS as it comes": ("dials", "unweighted", "CC"),
        "DIALS tuned": ("dials-tuned", "unweighted", "CC"),
        "DIALS as it comes, weighted": ("dials", "weighted", "CC"),
        "DIALS tuned, weighted": ("dials-tuned", "weighted", "CC"),
    }
    result: dict[str, dict[int, tuple[float, float]]] = {}
    for label, (name, height, cc) in drawn.items():
        mine = [row for row in rows if row["row"] == name]
        for dose in sorted({row["dose"] for row in mine}):
            seeds = [row for row in mine if row["dose"] == dose]
            values = [(row[height], np.mean(row[cc])) for row in seeds]
            result.setdefault(label, {})[dose] = tuple(np.mean(values, axis=0))
    return result


def dose_needed(
    ours: dict[int, tuple[float, float]], theirs: dict[int, tuple[float, float]], column: int
) -> dict[int, float]:
    """Share of their dose at which ours is as good, by denominator of their dose.

    Our values are joined by straight lines over the logarithm of the dose; where theirs lies
    outside of what was measured there is no number.
    """
    doses = sorted(ours, reverse=True)
    values = [ours[dose][column] for dose in doses]
    result = {}
    for dose, point in theirs.items():
        if values[0] <= point[column] <= values[-1]:
            log_dose = np.interp(point[column], values, -np.log(doses))
            result[dose] = float(np.exp(log_dose) * dose)
    return result


def show_dose_needed(rows: list[dict[str, Any]]) -> None:
    """Print at what share of DIALS' dose ours is as good."""
    points = curves(rows)
    for theirs in (label for label in points if label.startswith("DIALS")):
        for label in ("braggflux, coupled difference", "braggflux, F(+) - F(-)"):
            for column, quantity in enumerate(("heights", "correlation")):
                if label not in points:
                    continue
                needed = dose_needed(points[label], points[theirs], column)
                shares = ", ".join(f"1/{dose}: {x:.2f}" for dose, x in needed.items())
                print(f"dose for the {quantity} of {theirs}, {label}: {shares}")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Heights and correlations against dose."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    styles = ("o-", "s-", "x:", "^--", "v--", "^:", "v:")
    for k, (label, points) in enumerate(curves(rows).items()):
        doses = [1 / dose for dose in points]
        heights, correlations_of = zip(*points.values(), strict=True)
        look: dict[str, Any] = {"label": label, "color": f"C{k}", "markersize": 4}
        axes[0].plot(doses, heights, styles[k], **look)
        if not label.endswith(", weighted"):  # weights change the map alone
            axes[1].plot(doses, correlations_of, styles[k], **look)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlabel("dose (share of the photons)")
    axes[0].set_ylabel("sum of three iodides [sigma]")
    axes[1].set_ylabel("Bijvoet correlation, mean of shells")
    axes[0].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def main() -> None:
    """Make and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--doses", nargs="+", type=int, default=[30, 100, 8, 1], metavar="N")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of all frames and rows")
    parser.add_argument("--geometry", type=Path, required=True, help="of DIALS, at full dose")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--d-min", type=float, default=2.5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--only-score", action="store_true", help="make nothing")
    args = parser.parse_args()
    data, tools = args.shared / "data" / "hewl_nai", args.shared / "tools"
    places = Places(data, tools, args.geometry, args.work, args.d_min, args.epochs)
    header = ["dose", "row", "seed", *HEIGHTS, "CC", "CC of DANO", "CPU s"]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)
    table = []
    for dose in args.doses:
        rows = []
        for name in args.rows:
            for seed in args.seeds if name in OPTIONS else [0]:
                row = make_row(places, name, dose, seed)
                if not args.only_score:
                    row.make()
                if row.merged.exists():
                    rows.append(row)
        if rows:
            found = scored(places, rows)
            show(found)
            table += found
    show_dose_needed(table)
    if args.figure:
        draw(table, args.figure)


if __name__ == "__main__":
    main()
