"""Real DIALS: reads our files, scales and merges our intensities; real frames beside it."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from pathlib import Path

import gemmi
import numpy as np
import pytest

from braggflux.integrator.io.dials import DialsFlag, read_reflections
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.types import Flag
from braggflux.pipelines import cli
from braggflux.pipelines.workspace.matching import match_observations
from braggflux.pipelines.workspace.rundir import RunDirectory

pytestmark = [pytest.mark.dials, pytest.mark.slow]


def dials_program(name: str, *arguments: object, folder: Path) -> str:
    """Run a DIALS program; its output."""
    result = subprocess.run(
        [f"dials.{name}", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def scaled(dials, straight, tiny, tmp_path_factory) -> Path:
    """DIALS' own scaling and merging of our integrated.refl."""
    folder = tmp_path_factory.mktemp("dials")
    log = dials_program(
        "scale", tiny.expt, straight.integrated_refl, "anomalous=True", folder=folder
    )
    (folder / "scale.txt").write_text(log)
    dials_program("merge", "scaled.expt", "scaled.refl", "anomalous=True", folder=folder)
    return folder


@pytest.mark.slow
def test_dials_scale_keeps_what_we_call_usable(scaled, straight):
    ours = read_reflections(straight.integrated_refl)
    excluded, total = re.search(
        r"Excluding (\d+)/(\d+) reflections", (scaled / "scale.txt").read_text()
    ).groups()
    assert int(total) == len(ours)
    rejected = int((~ours.has_flag(DialsFlag.INTEGRATED_PRF)).sum())
    # Seen 2026-11: 32 of 1309, 20 of them ours
    assert int(excluded) <= rejected + 0.02 * len(ours)


@pytest.mark.slow
def test_dials_reads_our_intensities_as_we_wrote_them(scaled, straight):
    """scaled.refl was written by DIALS and holds what it has read."""
    ours, theirs = (
        read_reflections(straight.integrated_refl),
        read_reflections(scaled / "scaled.refl"),
    )
    row = theirs["partial_id"].astype(int)
    assert len(row) > 1200
    for name in ("intensity.prf.value", "intensity.prf.variance", "lp", "xyzcal.px", "s1", "d"):
        np.testing.assert_array_equal(theirs[name], ours[name][row], err_msg=name)
    np.testing.assert_array_equal(theirs["miller_index"], ours["miller_index"][row])


def test_dials_show_reads_the_table(dials, straight, tmp_path):
    shown = dials_program("show", straight.integrated_refl, folder=tmp_path)
    n = len(read_reflections(straight.integrated_refl))
    assert f"Reflection list contains {n} reflections" in shown
    for column in ("intensity.prf.value", "intensity.sum.value", "background.mean", "partiality"):
        assert column in shown


def test_dials_merges_our_intensities_to_the_truth(scaled, straight, tiny):
    """Amplitudes by DIALS from our photons, and ours, against the true ones."""
    tables = []
    for path in (tiny.truth_mtz, scaled / "merged.mtz", straight.merged):
        mtz = gemmi.read_mtz_file(str(path))
        plus = zip(
            map(tuple, mtz.make_miller_array().tolist()),
            mtz.column_with_label("F(+)"),
            strict=True,
        )
        tables.append({h: f for h, f in plus if np.isfinite(f)})
    shared = sorted(set.intersection(*(set(t) for t in tables)))
    assert len(shared) > 500
    truth, dials_f, ours = (np.array([t[h] for h in shared]) for t in tables)
    r = {}
    for name, f in (("dials", dials_f), ("ours", ours)):
        scale = (f @ truth) / (f @ f)
        r[name] = np.abs(scale * f - truth).sum() / truth.sum()
    # Seen 2026-11: 0.018 and 0.017
    assert r["dials"] < 0.04
    assert r["ours"] < 1.2 * r["dials"]


def test_iotbx_reads_our_mtz(dials, straight):
    build = Path("/usr/lib/cctbx/python3.11")
    if build.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(build))
    mtz = pytest.importorskip("iotbx.mtz")
    merged = mtz.object(file_name=str(straight.merged))
    arrays = {a.info().label_string(): a for a in merged.as_miller_arrays()}
    assert arrays["F(+),SIGF(+),F(-),SIGF(-)"].anomalous_flag()
    assert arrays["I(+),SIGI(+),I(-),SIGI(-)"].is_xray_intensity_array()
    assert arrays["F,SIGF"].is_xray_amplitude_array()
    assert merged.space_group_number() == 96
    anomalous = arrays["F(+),SIGF(+),F(-),SIGF(-)"]
    ours = gemmi.read_mtz_file(str(straight.merged))
    seen = sum(int(np.isfinite(ours.column_with_label(x)).sum()) for x in ("F(+)", "F(-)"))
    assert anomalous.size() == seen
    unmerged = mtz.object(file_name=str(straight.unmerged))
    assert unmerged.n_batches() == 16


def whole_spots_beside_dials(run: RunDirectory) -> tuple[int, float]:
    """Number and correlation of profile intensities above 3 sigma whose core was recorded."""
    ours = read_reflections(run.integrated_refl)
    theirs = read_reflections(run.dials / "integrated.refl")
    sweeps = (ours["id"], theirs["id"])
    where = [(t["miller_index"], t["xyzcal.px"]) for t in (ours, theirs)]
    rows, dials_rows = match_observations(*where[0], *where[1], sweeps=sweeps)
    with ShoeboxStore.open(run.shoeboxes) as store:
        whole = (store.flags.numpy()[rows] & (Flag.MASKED_CORE | Flag.REJECTED)) == 0
    value, variance = (theirs[f"intensity.prf.{k}"][dials_rows] for k in ("value", "variance"))
    fitted = theirs.has_flag(DialsFlag.INTEGRATED_PRF)[dials_rows] & (variance > 0)
    chosen = whole & fitted & (value > 3 * np.sqrt(np.where(fitted, variance, 1.0)))
    mine = ours["intensity.prf.value"][rows]
    return int(chosen.sum()), float(np.corrcoef(mine[chosen], value[chosen])[0, 1])


@pytest.mark.slow
@pytest.mark.realdata
def test_small_molecule_from_real_frames(dials, shared, tmp_path, capsys):
    """l-cysteine, Pilatus 2M: two sweeps of 15 frames, 80 spots, no mates, no anomalous model."""
    data = shared / "data" / "l_cysteine"
    out = tmp_path / "run"
    argv = ["process", *(str(p) for p in sorted(data.glob("*.cbf.gz"))), "--out", str(out)]
    argv += ["--space-group", "P212121", "--unit-cell", "5.428,8.141,12.038,90,90,90"]
    argv += ["--index-args", "detector.fix=all", "--epochs", "6", "--device", "cpu"]
    argv += ["--integrate-args", "min_spots.per_degree=5 min_spots.overall=10"]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    shown = captured.out
    assert "Warning" not in captured.err
    assert "no peaks: they need the phases of a model, and none was given" in shown
    run = RunDirectory.open(out)
    assert run.read_peaks() == []
    assert len(read_reflections(run.integrated_refl).identifiers) == 2
    argv = ["compare", str(out), "--integrated", str(run.dials / "integrated.refl")]
    argv += ["--merged", str(run.dials / "merged.mtz")]
    assert cli.main([*argv, "--full", str(data / "dials_full_merged.mtz")]) == 0
    with run.compare_file.open() as stream:
        rows = {
            (r["comparison"], r["bin"], r["metric"], r["subject"]): r
            for r in csv.DictReader(stream)
        }
    strong = rows["observations by I/sigma of DIALS", "all > 3", "cc", "ours vs DIALS"]
    # Seen 2026-11-25: 0.979 for 68 observations (2026-11-22: 0.997 for 67). Spots that the ends of
    # these short scans cut are kept since then, as whole spots; DIALS' values are recorded parts.
    assert int(strong["n"]) > 50
    assert float(strong["value"]) > 0.97
    # Seen 2026-11-25: 0.9998 for the 45 whose core is whole
    n_whole, cc_whole = whole_spots_beside_dials(run)
    assert n_whole > 30
    assert cc_whole > 0.998
    full = "merged against the full data by resolution [A]"
    cc = {who: float(rows[full, "all", "cc I", who]["value"]) for who in ("ours", "DIALS")}
    # Seen 2026-11-25: 0.979 (ours), 0.966 (DIALS) for 65 reflections; 2026-11-22: 0.966 (ours)
    assert cc["ours"] > 0.95
    assert cc["ours"] > cc["DIALS"] - 0.003
    mtz = gemmi.read_mtz_file(str(run.merged))
    sigma, seen = (mtz.column_with_label(x).array for x in ("SIGIMEAN", "IMEAN"))
    assert np.isfinite(sigma[np.isfinite(seen)]).all(), "no lone observation is an outlier"
    for row in run.read_metrics():
        missing = {k for k, v in row.items() if v is None}
        assert missing <= set(row["reasons"])
