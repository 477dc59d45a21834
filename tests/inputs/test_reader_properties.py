"""How data are written down does not matter: every reader, and a merge.

The same observations are written with rows, columns, images and experiments in another order or
under other numbers, and through the stores and DIALS; what is read is compared row by row after
both were sorted, with images as the sets of rows that they are.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch
from simulated_integration import changed, write_integrated

from braggflux.integrator.io.dials import (
    ReflectionTable,
    read_experiments,
    read_reflections,
    write_reflections,
)
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.training import fit, start
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.read import read_table
from braggflux.merge.io.stores.store_conversion import convert_to_store
from braggflux.merge.io.sweep_columns import SWEEP
from braggflux.merge.model.merger import Merger
from braggflux.merge.problem import build_problem

pytestmark = pytest.mark.realdata
GROUP = gemmi.SpaceGroup("P 43 21 2")
#: Numbers of images and sweeps, which may be others.
NUMBERS = ("BATCH", SWEEP, "serial")


def read(*paths) -> UnmergedData:
    cell = gemmi.UnitCell(79.336, 79.336, 37.797, 90, 90, 90)
    (data,) = read_table(paths, space_group=GROUP, cell=cell)
    return data


def canonical(data: UnmergedData, digits: type) -> dict[str, np.ndarray]:
    """Columns in an order of their own; images and sweeps as the first row that they have."""
    columns = {"intensity": data.intensity, "sigma": data.sigma}
    columns |= {n: data.metadata[n] for n in sorted(set(data.metadata) - set(NUMBERS))}
    if data.wavelength is not None:
        columns["wavelength"] = data.wavelength
    columns = {name: column.astype(digits) for name, column in columns.items()}
    order = np.lexsort((*columns.values(), *data.miller_index.T))
    result = {name: column[order] for name, column in columns.items()}
    result["index"] = data.miller_index[order]
    for name in ("image", SWEEP):
        label = data.image if name == "image" else data.metadata.get(SWEEP, data.image)
        _, first, which = np.unique(label[order], return_index=True, return_inverse=True)
        result[name] = first[which]
    return result


def assert_same(a: UnmergedData, b: UnmergedData, *, digits=np.float64, **tolerance) -> None:
    left, right = canonical(a, digits), canonical(b, digits)
    assert left.keys() == right.keys()
    for name, column in left.items():
        np.testing.assert_allclose(column, right[name], err_msg=name, **(tolerance or {"rtol": 0}))
    np.testing.assert_allclose(a.cell.parameters, b.cell.parameters, rtol=1e-5)
    assert a.space_group.xhm() == b.space_group.xhm()
    assert a.has_lp_applied == b.has_lp_applied


# How each format is written: order of rows, columns reversed or not, shift of image numbers.


def lines_of(source: Path, order) -> tuple[list[str], list[list[str]]]:
    lines = source.read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("!")]
    return lines, [rows[i] for i in order(len(rows))]


def write_xds(small, folder, order, flip, shift):
    lines, rows = lines_of(small / "xds_ascii.hkl", order)
    header = [line for line in lines if line.startswith("!") and not line.startswith("!END")]
    header = [
        line.replace("FRAME=       1", f"FRAME= {1 + shift}").replace(
            "RANGE=       1    1439", f"RANGE= {1 + shift} {1439 + shift}"
        )
        for line in header
    ]
    items = [line for line in header if line.startswith("!ITEM_")]
    header = [line for line in header if line not in items]
    rows = [[*r[:7], f"{float(r[7]) + shift:.1f}", *r[8:]] for r in rows]
    if flip:
        names = [item.partition("=")[0] for item in items][::-1]
        items = [f"{name}={i + 1}" for i, name in enumerate(names)]
        rows = [row[::-1] for row in rows]
    text = [*header, *items, "!END_OF_HEADER", *map(" ".join, rows), "!END_OF_DATA", ""]
    (folder / "a.HKL").write_text("\n".join(text))
    return [folder / "a.HKL"]


def write_integrate(small, folder, order, flip, shift):
    lines, rows = lines_of(small / "integrate.hkl", order)
    names = "H,K,L,IOBS,SIGMA,XCAL,YCAL,ZCAL,RLP,PEAK,CORR,MAXC,XOBS,YOBS,ZOBS,ALF0,BET0,ALF1,BET1"
    names = [*names.split(","), "PSI", "ISEG"]
    header = [line for line in lines if line.startswith("!") and "," not in line]
    header = [line.replace("FRAME=       1", f"FRAME= {1 + shift}") for line in header][:-2]
    rows = [[*r[:7], f"{float(r[7]) + shift:.1f}", *r[8:]] for r in rows]
    if flip:
        names, rows = names[::-1], [row[::-1] for row in rows]
    text = [*header, "!" + ",".join(names), "!END_OF_HEADER", *map(" ".join, rows)]
    (folder / "a.HKL").write_text("\n".join([*text, "!END_OF_DATA", ""]))
    return [folder / "a.HKL"]


def write_mtz(small, folder, order, flip, shift):
    mtz = gemmi.read_xds_ascii(str(small / "xds_ascii.hkl")).to_mtz()
    rows = np.array(mtz)[order(mtz.nreflections)]
    labels = mtz.column_labels()
    rows[:, labels.index("BATCH")] += shift
    for batch in mtz.batches:
        batch.number += shift
    kinds = [c.type for c in mtz.columns]
    new = gemmi.Mtz(with_base=True)
    new.spacegroup = mtz.spacegroup
    new.set_cell_for_all(mtz.cell)
    new.add_dataset("d").wavelength = 1.892
    columns = list(range(3, len(labels)))[:: -1 if flip else 1]
    for i in columns:
        new.add_column(labels[i], kinds[i])
    new.set_data(rows[:, [0, 1, 2, *columns]])
    for batch in mtz.batches:
        new.batches.append(batch)
    new.write_to_file(str(folder / "a.mtz"))
    return [folder / "a.mtz"]


def write_scalepack(small, folder, order, flip, shift):
    _, rows = lines_of(small / "xds_ascii.hkl", order)
    operators = list(GROUP.operations().sym_ops)
    head = [f"{len(operators):5d} p43212"]
    for op in operators:
        head.append("".join(f"{v // 24:3d}" for row in op.rot for v in row))
        head.append("".join(f"{v // 2:3d}" for v in op.tran))
    body = [
        "".join(f"{int(v):4d}" for v in 2 * row[:3])
        + f"{int(float(row[7])) + 1 + shift:6d} 0 0  1{float(row[3]):8.2f}{float(row[4]):8.3f}"
        for row in rows
        if float(row[3]) < 9e4
    ]
    (folder / "a.sca").write_text("\n".join([*head, *body, ""]))
    return [folder / "a.sca"]


def write_mmcif(small, folder, order, flip, shift):
    _, rows = lines_of(small / "xds_ascii.hkl", order)
    items = ("index_h", "index_k", "index_l", "intensity_net", "intensity_sigma")
    items = [*items, "pdbx_detector_x", "pdbx_detector_y", "pdbx_image_id"]
    rows = [[*r[:7], str(int(float(r[7])) + 1 + shift)] for r in rows]
    if flip:
        items, rows = items[::-1], [row[::-1] for row in rows]
    tags = [f"_diffrn_refln.{item}" for item in items]
    text = ["data_a", "loop_", *tags, *map(" ".join, rows), ""]
    (folder / "a.cif").write_text("\n".join(text))
    return [folder / "a.cif"]


def write_stream(small, folder, order, flip, shift):
    """Chunks in another order, and the columns of each list, panels last or first."""
    text = (small / "crystfel.stream").read_text()
    head, *chunks = text.split("----- Begin chunk -----\n")
    chunks = [chunks[i] for i in order(len(chunks))]
    begin, end = "Reflections measured after indexing\n", "End of reflections"
    done = []
    for number, chunk in enumerate(chunks):
        before, _, rest = chunk.partition(begin)
        table, _, after = rest.partition(end)
        before = before.replace("serial number: ", f"serial number: {shift}{number}")
        names, *rows = [line.split() for line in table.splitlines()]
        rows = [rows[i] for i in order(len(rows))]
        if flip:
            names, rows = names[::-1], [row[::-1] for row in rows]
        table = "".join(" ".join(row) + "\n" for row in (names, *rows))
        done.append(before + begin + table + end + after)
    parts = [head, *done]
    (folder / "a.stream").write_text("----- Begin chunk -----\n".join(parts))
    return [folder / "a.stream"]


def write_stills(small, folder, order, flip, shift):
    return rewrite_table(small / "stills.refl", small / "stills.expt", folder, order, flip)


def write_sweeps(small, folder, order, flip, shift):
    table, experiments = write_integrated(
        small.parents[1], folder / "made", n_sweeps=2, n_rows=900
    )
    return rewrite_table(table, experiments, folder, order, flip)


def rewrite_table(table, experiments, folder, order, flip):
    old = read_reflections(table)
    rows = order(len(old))
    columns = {name: column[rows] for name, column in old.columns.items()}
    if flip:
        columns = dict(reversed(columns.items()))
    write_reflections(folder / "a.refl", ReflectionTable(columns, old.identifiers, "integrated"))
    (folder / "a.expt").write_text(experiments.read_text())
    return [folder / "a.refl", folder / "a.expt"]


WRITERS: dict[str, Callable] = {
    "XDS_ASCII": write_xds,
    "INTEGRATE": write_integrate,
    "MTZ": write_mtz,
    "SCALEPACK": write_scalepack,
    "mmCIF": write_mmcif,
    "CrystFEL": write_stream,
    "DIALS stills": write_stills,
    "DIALS sweeps": write_sweeps,
}


def as_it_is(n: int) -> np.ndarray:
    return np.arange(n)


def mixed(n: int) -> np.ndarray:
    return np.random.default_rng(n).permutation(n)


@pytest.fixture(scope="module", params=WRITERS)
def written(request, shared, tmp_path_factory):
    """Read a format as it is, and give a function that writes and reads it otherwise."""
    small = shared / "data" / "small"

    def again(order=as_it_is, flip=False, shift=0):
        folder = tmp_path_factory.mktemp("a")
        return read(*WRITERS[request.param](small, folder, order, flip, shift))

    return again(), again


def test_order_of_rows(written):
    plain, again = written
    assert_same(again(order=mixed), plain)
    assert_same(again(order=lambda n: np.arange(n)[::-1]), plain)


def test_order_of_columns(written):
    plain, again = written
    assert_same(again(flip=True), plain)


def test_numbers_of_images(written):
    plain, again = written
    moved = again(shift=200)
    # columns that say where a row is on its sweep do not move with the image's number
    assert_same(moved, plain, rtol=1e-7, atol=1e-9)


def test_order_of_experiments(shared, tmp_path):
    """The second of two sweeps first, in the list and by its number in the table."""
    table, experiments = write_integrated(shared, tmp_path / "a", n_sweeps=2, n_rows=900)
    old = read_reflections(table)
    other, expt = changed(table, tmp_path / "b", id=1 - old["id"])
    swapped = read_reflections(other)
    names = {0: old.identifiers[1], 1: old.identifiers[0]}
    write_reflections(other, ReflectionTable(swapped.columns, names, "integrated"))
    text = expt.read_text()
    first, second = (old.identifiers[i] for i in (0, 1))
    text = text.replace(first, "\0").replace(second, first).replace("\0", second)
    expt.write_text(text)
    assert [e.identifier for e in read_experiments(expt)] == [second, first]
    assert_same(read(other, expt), read(table, experiments))


@pytest.mark.parametrize("name", ["XDS_ASCII", "MTZ", "CrystFEL", "mmCIF", "SCALEPACK"])
def test_through_a_store(shared, tmp_path, name):
    (path,) = WRITERS[name](shared / "data" / "small", tmp_path, as_it_is, False, 0)
    plain = read(path)
    convert_to_store(path, tmp_path / "a.h5", space_group=GROUP, cell=plain.cell)
    (again,) = read_table([tmp_path / "a.h5"])
    assert_same(again, plain, digits=np.float32)
    assert again.labels.wavelength == pytest.approx(plain.labels.wavelength)


@pytest.mark.dials
def test_through_dials_as_xds(shared, dials, tmp_path):
    """DIALS writes XDS_ASCII in XDS' frame of reference, with fewer digits."""
    table, expt = write_integrated(shared, tmp_path / "a", n_rows=900)
    plain = read_table([table, expt])[0]
    options = ["format=xds_ascii", "intensity=sum", "xds_ascii.hklout=a.HKL"]
    command = [f"{dials}/dials.export", str(table), str(expt), *options]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    data = read(tmp_path / "a.HKL")
    flags = read_reflections(table)
    both = (flags["flags"] & np.uint64(0x300)) == 0x300
    only_sums = changed(
        table, tmp_path / "b", rows=both, flags=flags["flags"] & ~np.uint64(1 << 9)
    )
    reference = read_table(only_sums)[0]
    here, there = (
        {
            (*h, round(x, 2)): i
            for i, (h, x) in enumerate(
                zip(d.miller_index.tolist(), d.metadata["XDET"].tolist(), strict=True)
            )
        }
        for d in (data, reference)
    )
    common = sorted(here.keys() & there.keys())
    assert len(common) > 0.9 * len(reference) > 100
    a, b = ([k[c] for c in common] for k in (here, there))
    np.testing.assert_allclose(data.intensity[a], reference.intensity[b], rtol=1e-4, atol=1e-3)
    for name, tolerance in (("ROT", 1e-4), ("zeta", 2e-3), ("frame", 1e-4), ("YDET", 1e-4)):
        np.testing.assert_allclose(
            data.metadata[name][a], reference.metadata[name][b], atol=tolerance, err_msg=name
        )
    np.testing.assert_array_equal(data.metadata["BATCH"][a], reference.metadata["BATCH"][b])
    assert plain.labels.wavelength == pytest.approx(data.labels.wavelength, abs=1e-5)


def merged(data: UnmergedData) -> dict[tuple, float]:
    """Amplitudes of a short fit."""
    torch.manual_seed(0)
    config = MergeConfig(anomalous=True, epochs=3, network_width=8, d_min=4.0)
    problem = build_problem([data], config)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    fit(merger, problem.table, config)
    mean = merger.inference().mean.detach().numpy()
    index = problem.unique.asus[0].miller_index.tolist()
    sign = problem.unique.asus[0].friedel_sign.tolist()
    return {(*h, s): f for h, s, f in zip(index, sign, mean.tolist(), strict=True)}


@pytest.mark.parametrize("name", ["XDS_ASCII", "DIALS sweeps"])
def test_merged_amplitudes(shared, tmp_path, name):
    small = shared / "data" / "small"
    results = []
    for i, (order, flip, shift) in enumerate([(as_it_is, False, 0), (mixed, True, 200)]):
        (tmp_path / str(i)).mkdir()
        results.append(merged(read(*WRITERS[name](small, tmp_path / str(i), order, flip, shift))))
    keys = sorted(results[0])
    assert keys == sorted(results[1])
    a, b = (np.array([r[k] for k in keys]) for r in results)
    np.testing.assert_allclose(a, b, rtol=1e-6)
