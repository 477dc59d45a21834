#!/usr/bin/env python3
r"""What merging gives on the data of README and docs/results.md: to compare two versions.

Every row of the tables is one command of the ``braggflux`` that is installed beside this Python,
made in a folder of its own below ``--work`` and scored by the independent scorers of
``SHARED/tools``. What is already there is not made again but only scored.

Cases
-----
demo         staged run on the frames of ``braggflux simulate``, their true geometry, to 2.5 A
twin         staged run on SHARED/data/hewl_nai, to 2.0 A
twin-dials   ``scaled.mtz`` and ``integrated.mtz`` that DIALS exports of the twin, in ``--dials``
thermolysin  395 stills of a free-electron laser, Friedel halves in two files, to 1.8 A
yellow       photoactive yellow protein, Laue, dark and 2 ms

Of demo and twin, ``run`` is the run's own merged.mtz; ``merge`` is
``braggflux merge RUN/intensities.h5 --anomalous``, whose prior of Bijvoet mates is double-Wilson;
``--prior wilson`` the same without.

Columns
-------
weighted, unweighted   heights [sigma] at the sites by anomalous_peaks.py, and their sum
S mean                 mean weighted height of all sulfurs
Bijvoet CC, R          of F(+) - F(-) and of the mean amplitude against the truth, by shell, on the
                       pairs that all files of a seed have (of the twin those of DIALS too)
DANO ...               the same of the coupled Bijvoet difference; empty where a file has none
map CC                 by pyp_difference_map.py, unweighted / weighted
held out               log-likelihood per observation, by image / by observation
CPU s, MiB             CPU time and peak memory of the command; empty where not made here

Examples
--------
python benchmarks/merger_parity.py demo twin --seeds 0 1 2 --work parity
python benchmarks/merger_parity.py twin-dials --dials twin_dials --work parity
python benchmarks/merger_parity.py thermolysin yellow --work parity

where twin_dials is made by DIALS:

../shared/tools/dials_reference.sh ../shared/data/hewl_nai/twin_master.h5 twin_dials 2.0
cd twin_dials
dials.export scaled.expt scaled.refl mtz.hklout=scaled.mtz
dials.export integrated.expt integrated.refl mtz.hklout=integrated.mtz
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemmi

IODIDES = ("IOD204:I", "IOD205:I", "IOD206:I")


@dataclass(frozen=True)
class Row:
    """One command.

    Attributes
    ----------
    name : str
        In the table.
    folder : Path
        The command's ``--out``.
    arguments : tuple of str
        Of ``braggflux``, without ``--out``.
    outputs : tuple of str
        Files of ``folder`` that are scored.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]
    outputs: tuple[str, ...] = ("merged.mtz",)

    @property
    def files(self) -> tuple[Path, ...]:
        """Paths of the outputs."""
        return tuple(self.folder / name for name in self.outputs)

    @property
    def cost_file(self) -> Path:
        """CPU time and peak memory, beside the folder, which belongs to ``braggflux``."""
        return self.folder.with_name(f"{self.folder.name}.cost.json")

    @property
    def is_made(self) -> bool:
        """Whether all outputs are there."""
        return all(path.exists() for path in self.files)

    def make(self) -> None:
        """Run the command unless its outputs are there."""
        if self.is_made:
            return
        program = Path(sys.executable).with_name("braggflux")
        command = [str(program), *self.arguments, "--out", str(self.folder)]
        print(shlex.join(command), file=sys.stderr, flush=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self.folder.with_name(f"{self.folder.name}.log"), "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"failed, see {log.name}")
        cost = {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}
        self.cost_file.write_text(json.dumps(cost) + "\n")

    def held_out_and_cost(self) -> list[str]:
        """Last cells of the row."""
        metrics, scores = self.folder / "metrics.json", []
        if metrics.exists():
            held_out = json.loads(metrics.read_text())["held_out"]
            scores = [f"{part['log_likelihood']:.3f}" for part in held_out.values()]
        cost = ["", ""]
        if self.cost_file.exists():
            spent = json.loads(self.cost_file.read_text())
            cost = [f"{spent['cpu_s']:.0f}", f"{spent['peak_mib']:.0f}"]
        return [" / ".join(scores), *cost]


@dataclass(frozen=True)
class Anomalous:
    """Scores of Bijvoet differences.

    Attributes
    ----------
    tools : Path
        Folder of the scorers.
    model : Path
        For phases and sites.
    d_min : float
        [A].
    sites : tuple of str
        Whose heights are shown, as the scorer names them.
    truth : Path, optional
        MTZ with the true F(+) and F(-).
    beside : tuple of Path
        Other merged files, scored on the same pairs.
    """

    tools: Path
    model: Path
    d_min: float
    sites: tuple[str, ...]
    truth: Path | None = None
    beside: tuple[Path, ...] = ()

    def header(self) -> list[str]:
        """Names of the columns that :meth:`cells` fills."""
        sites = " / ".join(site.split(":")[0] for site in self.sites)
        return [
            f"weighted: {sites} / sum", "unweighted", "S mean", "Bijvoet CC", "R",
            "DANO unweighted", "DANO S mean", "DANO CC",
        ]  # fmt: skip

    def cells(self, rows: list[Row]) -> list[list[str]]:
        """Scores of the rows of one seed."""
        files = [row.files[0] for row in rows]
        plain, coupled = self.against_truth(files), self.against_truth(files, "--dano")
        result = []
        for path in files:
            weighted, sulfurs = self.heights(path)
            unweighted, _ = self.heights(path, "--no-weight")
            cc, r = plain[path]
            dano = ["", "", ""]
            if "DANO" in gemmi.read_mtz_file(str(path)).column_labels():
                dano = [*self.heights(path, "--dano"), coupled[path][0]]
            result.append([weighted, unweighted, sulfurs, cc, r, *dano])
        return result

    def heights(self, path: Path, *options: str) -> tuple[str, str]:
        """Heights at the sites with their sum, and the mean of the sulfurs."""
        arguments = (path, self.model, "--d-min", self.d_min, "--json", *options)
        peaks = score(self.tools / "anomalous_peaks.py", *arguments)["peaks"]
        shown = [peaks[site] for site in self.sites]
        sulfurs = [height for site, height in peaks.items() if site.endswith((":SG", ":SD"))]
        mean = f"{sum(sulfurs) / len(sulfurs):.2f}" if sulfurs else ""
        return " / ".join(f"{height:.2f}" for height in [*shown, sum(shown)]), mean

    def against_truth(self, files: list[Path], *options: str) -> dict[Path, tuple[str, str]]:
        """Correlations and R by shell of each file; empty without a truth."""
        if self.truth is None:
            return dict.fromkeys(files, ("", ""))
        arguments = (self.truth, *files, *self.beside, "--json", *options)
        found = score(self.tools / "bijvoet_truth.py", *arguments)
        return {
            path: (
                " ".join(f"{shell['cc_bijvoet']:.3f}" for shell in found[str(path)]),
                " ".join(f"{shell['r_mean']:.4f}" for shell in found[str(path)]),
            )
            for path in files
        }


@dataclass(frozen=True)
class DifferenceMap:
    """Score of the difference of two datasets; ``references`` as the scorer asks for them."""

    tools: Path
    references: Path

    def header(self) -> list[str]:
        """Name of the column that :meth:`cells` fills."""
        return ["map CC"]

    def cells(self, rows: list[Row]) -> list[list[str]]:
        """Score of every row."""
        scorer = self.tools / "pyp_difference_map.py"
        found = [score(scorer, *row.files, "--refs", self.references) for row in rows]
        return [[f"{one['cc_roi']:.3f} / {one['cc_roi_weighted']:.3f}"] for one in found]


def score(script: Path, *arguments: object) -> Any:
    """Run a scorer, which prints JSON."""
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@dataclass(frozen=True)
class Places:
    """The folders of the command line."""

    shared: Path
    work: Path
    dials: Path | None

    @property
    def tools(self) -> Path:
        """Folder of the scorers."""
        return self.shared / "tools"

    def data(self, *names: str) -> Path:
        """Path below the shared data."""
        return self.shared.joinpath("data", *names)


def staged_rows(places: Places, name: str, seed: int, run: tuple[object, ...]) -> list[Row]:
    """Staged run and two merges of its photon counts."""
    folder, options = f"{name}_s{seed}", ("--seed", str(seed))
    on_cpu = ("--coupling", "staged", "--device", "cpu")
    merge = ("merge", str(places.work / folder / "intensities.h5"), "--anomalous", *options)
    return [
        Row("run", places.work / folder, ("run", *map(str, run), *on_cpu, *options)),
        Row("merge", places.work / f"{folder}_merge", merge),
        Row("--prior wilson", places.work / f"{folder}_wilson", (*merge, "--prior", "wilson")),
    ]


def demo(places: Places, seed: int) -> tuple[list[Row], Anomalous]:
    """Rows of the demo's crystal, simulated with seed 0."""
    frames = places.work / "demo_frames"
    Row("frames", frames, ("simulate", "--seed", "0"), ("model.pdb", "truth.mtz")).make()
    expt, refl, model = (frames / f for f in ("hewl-iodide.expt", "hewl-iodide.refl", "model.pdb"))
    rows = staged_rows(places, "demo", seed, (expt, refl, "--model", model, "--d-min", "2.5"))
    return rows, Anomalous(places.tools, model, 2.5, IODIDES, frames / "truth.mtz")


def twin_scores(places: Places) -> Anomalous:
    """Scores of the twin, on the pairs of README's table."""
    data = places.data("hewl_nai")
    beside = (data / "dials_merged.mtz", data / "dials_tuned_merged.mtz")
    return Anomalous(places.tools, data / "9b7c.pdb", 2.0, IODIDES, data / "truth.mtz", beside)


def twin(places: Places, seed: int) -> tuple[list[Row], Anomalous]:
    """Rows of the twin's frames."""
    scores, data = twin_scores(places), places.data("hewl_nai")
    geometry = (data / "refined.expt", data / "refined.refl")
    run = (*geometry, "--model", scores.model, "--d-min", "2.0")
    return staged_rows(places, "twin", seed, run), scores


def twin_dials(places: Places, seed: int) -> tuple[list[Row], Anomalous]:
    """Rows of DIALS' observations of the twin."""
    if places.dials is None:
        raise SystemExit("twin-dials needs --dials, the folder of scaled.mtz and integrated.mtz.")
    options = ("--anomalous", "--seed", str(seed))
    rows = []
    for kind in ("scaled", "integrated"):
        merge = ("merge", str(places.dials / f"{kind}.mtz"), *options)
        rows.append(Row(f"merge {kind}.mtz", places.work / f"twin_{kind}_s{seed}", merge))
    return rows, twin_scores(places)


def thermolysin(places: Places, seed: int) -> tuple[list[Row], Anomalous]:
    """Rows of the stills."""
    data = places.data("thermolysin_xfel")
    halves = (str(data / f"friedel_{half}_n395.mtz") for half in ("plus", "minus"))
    options = ("--friedel", "--stills", "--d-min", "1.8", "--seed", str(seed))
    merge = ("merge", *halves, *options)
    rows = [
        Row("merge", places.work / f"thermo_s{seed}", merge),
        Row(
            "--prior wilson", places.work / f"thermo_wilson_s{seed}", (*merge, "--prior", "wilson")
        ),
    ]
    return rows, Anomalous(places.tools, data / "2tli.pdb", 1.8, ("ZN317:ZN", "CA320:CA"))


def yellow(places: Places, seed: int) -> tuple[list[Row], DifferenceMap]:
    """Rows of the Laue data."""
    data, stems = places.data("pyp_laue"), ("off_iso_uc", "2ms_iso_uc")
    inputs = (str(data / f"{stem}.mtz") for stem in stems)
    merge = ("merge", *inputs, "--laue", "--seed", str(seed))
    outputs = tuple(f"{stem}_merged.mtz" for stem in stems)
    coupled = (*merge, "--parents", "none,0")
    rows = [
        Row("merge", places.work / f"pyp_s{seed}", merge, outputs),
        Row("--parents none,0", places.work / f"pyp_dw_s{seed}", coupled, outputs),
    ]
    return rows, DifferenceMap(places.tools, data)


CASES = {
    "demo": demo,
    "twin": twin,
    "twin-dials": twin_dials,
    "thermolysin": thermolysin,
    "yellow": yellow,
}


def line(cells: list[str]) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Make and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of all runs and merges")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--dials", type=Path, help="folder of scaled.mtz and integrated.mtz")
    parser.add_argument("--only-score", action="store_true", help="make nothing")
    args = parser.parse_args()
    places = Places(args.shared, args.work, args.dials)
    for name in args.cases:
        for number, seed in enumerate(args.seeds):
            rows, scores = CASES[name](places, seed)
            if number == 0:
                header = ["row", "seed", *scores.header(), "held out", "CPU s", "MiB"]
                print(f"\n{name}\n\n{line(header)}\n{line(['---'] * len(header))}", flush=True)
            for row in () if args.only_score else rows:
                row.make()
            rows = [row for row in rows if row.is_made]
            for row, cells in zip(rows, scores.cells(rows) if rows else [], strict=True):
                print(line([row.name, str(seed), *cells, *row.held_out_and_cost()]), flush=True)


if __name__ == "__main__":
    main()
