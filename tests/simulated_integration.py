"""Tables as dials.integrate writes them: real geometry, intensities of a toy crystal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from braggflux.integrator.crystal.symmetry import to_asu
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    read_experiments,
    read_reflections,
    write_reflections,
)


def write_integrated(
    shared: Path, folder: Path, *, n_sweeps: int = 1, n_rows: int = 3000, seed: int = 0
) -> tuple[Path, Path]:
    """Write ``integrated.refl`` and ``.expt``; most rows are fitted and summed, some only one.

    The sweeps have the same models, and rows of their own.
    """
    source = shared / "data" / "hewl_nai"
    rng = np.random.default_rng(seed)
    experiments = json.loads((source / "refined.expt").read_text())
    first = experiments["experiment"][0]
    names = [first["identifier"]] + [
        f"00000000-0000-0000-0000-{i:012d}" for i in range(1, n_sweeps)
    ]
    experiments["experiment"] = [first | {"identifier": name} for name in names]
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "integrated.expt").write_text(json.dumps(experiments))
    table = read_reflections(source / "refined.refl")
    indexed = np.flatnonzero(table["miller_index"].any(axis=1))
    rows = np.sort(rng.permutation(indexed)[:n_rows])
    space_group = read_experiments(source / "refined.expt")[0].crystal.space_group
    n = len(rows)
    asu = to_asu(table["miller_index"][rows], space_group).miller_index
    strength = np.exp(5.0 + np.sin(asu @ [1.3, 2.1, 0.7]))
    flags = np.full(n, DialsFlag.PREDICTED, dtype=np.uint64)
    flags[rng.random(n) < 0.9] |= np.uint64(DialsFlag.INTEGRATED_SUM)
    flags[rng.random(n) < 0.8] |= np.uint64(DialsFlag.INTEGRATED_PRF)
    lp, partiality = rng.uniform(0.3, 0.9, n), np.where(rng.random(n) < 0.1, rng.random(n), 1.0)
    noise = np.sqrt(strength) * rng.standard_normal((2, n))
    names_kept = ("miller_index", "panel", "s1", "bbox", "xyzcal.px", "xyzcal.mm")
    names_kept += (
        "xyzobs.px.value",
        "xyzobs.px.variance",
        "xyzobs.mm.value",
        "xyzobs.mm.variance",
    )
    columns = {name: table[name][rows] for name in names_kept}
    columns |= {
        "id": np.arange(n, dtype=np.int32) % n_sweeps,
        "flags": flags,
        "d": np.full(n, 2.5),
        "lp": lp,
        "qe": np.where(rng.random(n) < 0.02, 0.0, rng.uniform(0.8, 1.0, n)),
        "partiality": partiality,
        "partial_id": np.arange(n, dtype=np.uint64),
        "intensity.sum.value": (strength + noise[0]) / lp * partiality,
        "intensity.sum.variance": strength / lp**2 + 30.0,
        "intensity.prf.value": (strength + noise[1]) / lp,
        "intensity.prf.variance": np.where(rng.random(n) < 0.02, -1.0, strength / lp**2 + 9.0),
    }
    identifiers = dict(enumerate(names))
    write_reflections(
        folder / "integrated.refl", ReflectionTable(columns, identifiers, "integrated")
    )
    return folder / "integrated.refl", folder / "integrated.expt"


def changed(
    table: Path, to: Path, experiments: Path | None = None, rows=None, **columns
) -> tuple[Path, Path]:
    """Write a table with other columns, and rows (mask or order) of it alone, elsewhere."""
    old = read_reflections(table)
    new = dict(old.columns) | columns
    if rows is not None:
        new = {name: column[rows] for name, column in new.items()}
    to.mkdir(exist_ok=True, parents=True)
    write_reflections(to / table.name, ReflectionTable(new, old.identifiers, "integrated"))
    source = table.with_suffix(".expt") if experiments is None else experiments
    (to / source.name).write_text(source.read_text())
    return to / table.name, to / source.name
