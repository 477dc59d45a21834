"""Unmerged MTZ files of rotation data with known anomalous differences, as users bring them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import gemmi
import numpy as np

from braggflux.integrator.crystal.geometry import Beam, Crystal, Experiment, Goniometer, Scan
from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.crystal.symmetry import to_asu
from braggflux.integrator.io.dials import (
    DialsFlag,
    ReflectionTable,
    write_experiments,
    write_reflections,
)
from braggflux.merge.io.mtz import read_merged_mtz

CELL = gemmi.UnitCell(40, 50, 60, 90, 90, 90)
GROUP = gemmi.SpaceGroup("P 21 21 21")
#: Wavelengths [A] whose anomalous differences are opposite in :func:`truth`.
PEAK, REMOTE = 0.9793, 1.0200
TYPES = {"M/ISYM": "Y", "M_ISYM": "Y", "BATCH": "B", "I": "J", "IPR": "J", "FLAG": "I"}
TYPES |= {"SIGI": "Q", "SIGIPR": "Q"}


def truth(sign: float = 1.0, d_min: float = 4.0) -> tuple[ReciprocalAsu, np.ndarray]:
    """Amplitudes of all rows; Bijvoet differences of 10 % times ``sign``, alike for all signs."""
    asu = ReciprocalAsu(CELL, GROUP, d_min, True)
    rng = np.random.default_rng(5)
    mean = np.sqrt(rng.exponential(1000.0, len(asu)) * asu.epsilon) + 5.0
    share = 0.05 * rng.standard_normal(len(asu))
    minus = asu.friedel_sign < 0
    plus_of = np.where(minus, asu.friedel_mate, np.arange(len(asu)))
    half = sign * np.where(asu.is_centric, 0.0, share[plus_of]) * np.where(minus, -1.0, 1.0)
    return asu, mean[plus_of] * (1.0 + half)


@dataclass
class Rows:
    """Observations as they were made: indices (n, 3) and columns by label, (n,) each."""

    hkl: np.ndarray
    columns: dict[str, np.ndarray]

    def take(self, rows) -> Rows:
        return Rows(self.hkl[rows], {k: v[rows] for k, v in self.columns.items()})

    def but(self, **columns) -> Rows:
        return Rows(self.hkl, self.columns | columns)

    def without(self, *names) -> Rows:
        return Rows(self.hkl, {k: v for k, v in self.columns.items() if k not in names})


def observe(crystal, seed: int, n_images=20, n_per_image=300, first_batch=1) -> Rows:
    asu, f = crystal
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(n_images), n_per_image)
    row = rng.integers(0, len(asu), len(image))
    x, y = rng.uniform(0, 1000, (2, len(image)))
    sigma = np.full(len(image), 15.0)
    mean = np.exp(0.3 * np.sin(image / 3)) * f[row] ** 2
    # any equivalent may have been observed
    turns = np.array([np.diag(s) for s in ((1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, -1))])
    hkl = np.einsum("ni,nij->nj", asu.miller_index[row], turns[rng.integers(0, 4, len(row))])
    columns = {"BATCH": image + first_batch, "SIGI": sigma, "XDET": x, "YDET": y}
    columns["I"] = mean + sigma * rng.standard_normal(len(image))
    columns["ROT"] = image + rng.random(len(image))
    return Rows(hkl, columns)


def joined(*parts: Rows) -> Rows:
    return Rows(
        np.concatenate([p.hkl for p in parts]),
        {k: np.concatenate([p.columns[k] for p in parts]) for k in parts[0].columns},
    )


def empty_mtz(title="title of the file", cell=CELL, group=GROUP) -> gemmi.Mtz:
    """With HKL_base, whose wavelength is 0, as CCP4's programs write it."""
    mtz = gemmi.Mtz()
    mtz.add_dataset("HKL_base").id = 0
    mtz.spacegroup, mtz.title = group, title
    mtz.set_cell_for_all(cell)
    return mtz


def add_dataset(mtz, names, wavelength, batches=(), cell=CELL, batch_wavelength=0.0) -> None:
    dataset = mtz.add_dataset(names[2])
    dataset.project_name, dataset.crystal_name = names[:2]
    dataset.wavelength, dataset.cell = wavelength, cell
    for number, value in zip(
        batches, np.broadcast_to(batch_wavelength, len(batches)), strict=True
    ):
        batch = gemmi.Mtz.Batch()
        batch.number, batch.dataset_id, batch.wavelength = int(number), dataset.id, float(value)
        mtz.batches.append(batch)


def write(path: Path, rows: Rows, mtz: gemmi.Mtz, *, isym="M/ISYM", order=None, types=None):
    """Write with indices in the asymmetric unit and M/ISYM; ``isym`` None: as observed."""
    columns = {axis: rows.hkl[:, k] for k, axis in enumerate("HKL")}
    if isym:
        reduced = to_asu(rows.hkl, mtz.spacegroup)
        columns |= {axis: reduced.miller_index[:, k] for k, axis in enumerate("HKL")}
        columns[isym] = reduced.isym
    columns |= rows.columns
    kinds = dict.fromkeys("HKL", "H") | {n: TYPES.get(n, "R") for n in columns if n not in "HKL"}
    kinds |= types or {}
    order = order or list(columns)
    for label in order:
        mtz.add_column(label, kinds[label], dataset_id=len(mtz.datasets) - 1)
    mtz.set_data(np.column_stack([columns[label] for label in order]).astype(np.float32))
    mtz.write_to_file(str(path))
    return path


def sweep(wavelength: float, cell=CELL, n_images: int = 20, group=GROUP) -> Experiment:
    setting = np.array(cell.frac.mat.tolist()).T  # columns a*, b*, c*
    return Experiment(
        Beam(np.array([0.0, 0.0, 1.0 / wavelength]), wavelength),
        (),
        Goniometer(np.array([1.0, 0.0, 0.0])),
        Scan((1, n_images), (0.0, 1.0)),
        Crystal(setting, group),
    )


def write_tables(folder: Path, sweeps: list[tuple[Rows, Experiment]]) -> tuple[Path, Path]:
    """DIALS files of integrated sweeps, whose images count from 1."""
    rows = joined(*(rows for rows, _ in sweeps))
    column, n = rows.columns, len(rows.hkl)
    flags = DialsFlag.PREDICTED | DialsFlag.INTEGRATED_PRF | DialsFlag.INTEGRATED_SUM
    direction = np.column_stack([column["XDET"] - 500, column["YDET"] - 500, np.full(n, 900.0)])
    table = {
        "miller_index": rows.hkl.astype(np.int32),
        "id": np.repeat(np.arange(len(sweeps)), [len(r.hkl) for r, _ in sweeps]).astype(np.int32),
        "panel": np.zeros(n, np.uint64),
        "flags": np.full(n, flags, np.uint64),
        "s1": direction / np.linalg.norm(direction, axis=1, keepdims=True),
        "xyzcal.px": np.column_stack([column["XDET"], column["YDET"], column["BATCH"] - 0.5]),
        "lp": np.ones(n),
        "intensity.prf.value": column["I"],
        "intensity.prf.variance": column["SIGI"] ** 2,
    }
    names = {k: f"sweep{k}" for k in range(len(sweeps))}
    experiments = [replace(e, identifier=names[k]) for k, (_, e) in enumerate(sweeps)]
    write_experiments(folder / "mad.expt", experiments)
    write_reflections(folder / "mad.refl", ReflectionTable(table, names, "mad"))
    return folder / "mad.refl", folder / "mad.expt"


def bijvoet_correlation(path: Path, crystal) -> float:
    """Correlation of F(+) - F(-) in a merged file with the truth."""
    asu, f = crystal
    table = read_merged_mtz(path).table
    row = asu.refl_id(table.miller_index)
    found, true = table.f_plus - table.f_minus, f[row] - f[asu.friedel_mate[row]]
    seen = np.isfinite(found) & ~asu.is_centric[row]
    return float(np.corrcoef(found[seen], true[seen])[0, 1])
