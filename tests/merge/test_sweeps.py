"""Scale of rotation data from files: places on the sweep, and recovery of known scales."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import gemmi
import numpy as np
import pytest
import torch
from scipy import special
from scipy.spatial.transform import Rotation
from simulated_merge import CELL, FRAME_WIDTH, SPACE_GROUP, simulate

from braggflux.integrator.crystal.geometry import Beam, Crystal, Experiment, Goniometer, Scan
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.sweeps import plain_sweep_table
from braggflux.merge.fit.held_out import split
from braggflux.merge.fit.training import fit, start
from braggflux.merge.io import mtz as mtz_io
from braggflux.merge.io.formats.mtz_observations import read_mtz
from braggflux.merge.io.observations import make_unmerged
from braggflux.merge.io.sweep_columns import (
    BEAMS,
    FRAME,
    ROCKING,
    SWEEP,
    SWEEP_COLUMNS,
    ZETA,
)
from braggflux.merge.io.sweep_columns import (
    FRAME_WIDTH as WIDTH,
)
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.saved_scale import load_scale, save_scale
from braggflux.merge.problem import build_problem

TRUE_ROCKING = 0.4  # frames, of the simulation


def observed(experiment, *, zeta=1.0, name="a"):
    """Counts of a simulated sweep as a file of intensities has them."""
    t, likelihood = experiment.table.metadata, experiment.table.likelihood
    frame = t.xyz_px[:, 2].double().numpy()
    beams = torch.cat([t.s0_crystal, t.s1_crystal], 1).double().numpy()
    lp = t.lp.double().numpy()
    metadata = {"XDET": t.xyz_px[:, 0].numpy(), "YDET": t.xyz_px[:, 1].numpy()}
    metadata |= {SWEEP: 0 * frame, FRAME: frame, WIDTH: 0 * frame + FRAME_WIDTH}
    metadata |= {ZETA: 0 * frame + zeta, "ROT": frame * FRAME_WIDTH}
    counts = likelihood.effective_counts.double().numpy()
    return make_unmerged(
        source=name,
        miller_index=t.miller_index.numpy(),
        intensity=(counts - likelihood.effective_background.double().numpy()) * lp,
        sigma=np.sqrt(counts + 1) * lp,
        image_label=np.floor(frame),
        metadata=metadata | dict(zip(BEAMS, beams.T, strict=True)),
        wavelength=None,
        cell=CELL,
        space_group=SPACE_GROUP,
        name=name,
        has_lp_applied=True,
    )


def fitted(data, config):
    torch.manual_seed(0)
    problem = build_problem(data, config)
    merger = Merger(problem.unique, problem.table, config)
    start(merger, problem.table)
    fit(merger, problem.table, config)
    return merger, problem


@pytest.fixture(scope="module")
def sweep():
    return simulate(d_min=3.5, span_deg=200.0)


def test_frame_scale_is_averaged_over_the_rocking_curve(sweep):
    problem = build_problem([observed(sweep, zeta=0.5)], MergeConfig(anomalous=True))
    scale = Merger(problem.unique, problem.table, MergeConfig()).scale.frames
    rng = np.random.default_rng(0)
    gamma = rng.normal(size=sweep.n_frames)
    with torch.no_grad():
        scale.log_frame_scale.copy_(torch.as_tensor(gamma))
        scale.log_mosaicity.fill_(np.log(0.2))  # 0.4 frames at this zeta
        found = scale(problem.table.everything())
    z = problem.table.sweeps.xyz_px[:, 2].numpy()
    edges = special.ndtr((np.arange(sweep.n_frames + 1) - z[:, None]) / 0.4)
    weight = np.diff(edges, axis=1)
    expected = np.log(weight @ np.exp(gamma) / weight.sum(1))
    np.testing.assert_allclose(found, expected, atol=1e-5)  # the frames within reach


@pytest.mark.slow
def test_scales_mosaic_spread_and_amplitudes_are_found(sweep):
    config = MergeConfig(anomalous=True, epochs=60, batch_size=2000)
    data = observed(sweep)
    merger, problem = fitted([data], config)
    frames = merger.scale.frames
    assert merger.scale.network is None
    assert float(frames.log_mosaicity.detach().exp()) == pytest.approx(TRUE_ROCKING, rel=0.25)
    # against all of K; what all share belongs to the amplitudes
    rows = problem.source
    order = np.argsort(np.floor(sweep.table.metadata.xyz_px[:, 2].double().numpy()), kind="stable")
    true = (sweep.truth.log_scale + np.log(sweep.table.metadata.lp.double().numpy()))[order][rows]
    with torch.no_grad():
        found = merger.scale(problem.table.everything()).log_k.numpy()
    residual = found - true
    inv = problem.table.terms.inv_d2.numpy()
    residual -= np.polyval(np.polyfit(inv, residual, 1), inv)
    assert true.std() > 0.1
    assert residual.std() < 0.02
    plain = fitted([data], replace(config, physical_scale=False))[0]
    truth = sweep.truth.amplitude
    good = sweep.asu.refl_id(problem.unique.asus[0].miller_index)
    strong = truth[good] > np.median(truth)

    def error(m):
        f = m.inference().mean.detach().numpy()
        ratio = (f / truth[good])[strong]
        d = problem.unique.d[strong]
        return np.std(np.log(ratio) - np.polyval(np.polyfit(d**-2, np.log(ratio), 1), d**-2))

    assert error(merger) < 0.9 * error(plain)


def test_batches_of_a_sweep_add_up_and_held_out_frames_are_interpolated(sweep):
    config = MergeConfig(anomalous=True, epochs=3, batch_size=1000)
    problem = build_problem([observed(sweep)], config)
    masks = split(problem.table, 0.1, False, seed=1)
    table = problem.table.with_masks(masks.is_used, masks.is_seen)
    merger = Merger(problem.unique, table, config)
    start(merger, table)
    fit(merger, table, config)
    merger.requires_grad_(False)
    q = merger.inference()
    full = merger.loss(table.everything(), q)
    units = torch.randperm(table.n_units).tensor_split(7)
    parts = [merger.loss(table.batch(u), q) for u in units]
    for name in ("log_likelihood", "kl_structure_factor", "scale_penalty"):
        total = float(sum(getattr(p, name).detach() for p in parts))
        assert total == pytest.approx(float(getattr(full, name)), rel=1e-9), name


def test_two_datasets_have_sweeps_of_their_own(sweep):
    data = [observed(sweep), observed(sweep, name="b")]
    table = build_problem(data, MergeConfig()).table
    assert table.sweeps.n_frames == (sweep.n_frames, sweep.n_frames)
    assert torch.equal(table.sweeps.experiment, table.observations.dataset)


@pytest.mark.parametrize("missing", ["columns", "positions"])
def test_without_headers_the_scale_goes_by_batches(sweep, missing, caplog):
    data, config = observed(sweep), MergeConfig()
    del data.metadata[ZETA if missing == "columns" else "XDET"]
    with caplog.at_level("INFO"):
        problem = build_problem([data], config)
    assert "the scale goes by their batches" in caplog.text
    assert ("positions on the detector" in caplog.text) == (missing == "columns")
    found = problem.table.sweeps
    assert not found.has_beams
    assert found.n_frames == (sweep.n_frames,)
    assert found.frame_width_deg == pytest.approx((FRAME_WIDTH,), rel=0.02)
    frame = data.metadata[FRAME][problem.source]
    assert torch.equal(found.xyz_px[:, 2], torch.as_tensor(np.floor(frame) + 0.5))
    scale = Merger(problem.unique, problem.table, config).scale
    assert scale.network is None
    assert ("absorption" in scale.terms) == (missing == "columns")
    if missing == "columns":  # 200 degrees: five waves
        assert len(scale.terms["absorption"].absorption) == 5 * 5


def test_physical_scales_can_be_switched_off(sweep):
    config = MergeConfig(physical_scale=False)
    problem = build_problem([observed(sweep)], config)
    scale = Merger(problem.unique, problem.table, config).scale
    assert scale.frames is None
    assert scale.network is not None


@pytest.mark.parametrize("known", [(True,), (True, False)], ids=["in the file", "in one of two"])
def test_a_known_rocking_width_is_kept(sweep, known):
    data = [observed(sweep, name=name) for name in "ab"[: len(known)]]
    width = np.linspace(0.2, 0.6, len(data[0]))
    for d, has_width in zip(data, known, strict=True):
        if has_width:
            d.metadata[ROCKING] = width * FRAME_WIDTH
    problem = build_problem(data, MergeConfig())
    frames = Merger(problem.unique, problem.table, MergeConfig()).scale.frames
    if not all(known):
        assert frames.log_mosaicity is not None
        assert problem.table.sweeps.rocking is None
        return
    assert frames.log_mosaicity is None
    np.testing.assert_allclose(problem.table.sweeps.rocking, width[problem.source])
    gamma = np.random.default_rng(0).normal(size=sweep.n_frames)
    with torch.no_grad():
        frames.log_frame_scale.copy_(torch.as_tensor(gamma))
        found = frames(problem.table.everything())
    z = problem.table.sweeps.xyz_px[:, 2].numpy()
    edges = (np.arange(sweep.n_frames + 1) - z[:, None]) / width[problem.source][:, None]
    weight = np.diff(special.ndtr(edges), axis=1)
    np.testing.assert_allclose(found, np.log(weight @ np.exp(gamma) / weight.sum(1)), atol=1e-5)


def place(batch, rotation=None, dataset=None):
    """Sweep, frame, and width of each sweep of one observation a batch."""
    n = len(batch)
    columns = SimpleNamespace(
        image=np.arange(n),
        frame=np.asarray(batch),
        dataset=np.zeros(n, int) if dataset is None else np.asarray(dataset),
        member=np.zeros(n, int),
        position=None,
        inv_d2=np.full(n, 0.1),
    )
    rotation = None if rotation is None else np.asarray(rotation, float)
    table = plain_sweep_table(columns, rotation, np.arange(n))
    return table.experiment.tolist(), table.xyz_px[:, 2].tolist(), table.frame_width_deg


def test_batches_tell_sweeps_apart():
    # missing images leave a gap, another sweep begins at its first batch
    sweep, frame, width = place([101, 102, 105, 1001, 1002])
    assert sweep == [0, 0, 0, 1, 1]
    assert frame == [0.5, 1.5, 4.5, 0.5, 1.5]
    assert width == (1.0, 1.0)
    # as many images as that are finer than a degree
    assert place(np.arange(720))[2] == (0.25,)
    assert place([1, 2, 3, 4], dataset=[0, 0, 1, 1])[0] == [0, 0, 1, 1]


def test_rotation_tells_sweeps_apart():
    rotation = [30.1, 30.6, 32.0, 90.2, 90.7, 91.3]
    sweep, frame, width = place([1, 2, 5, 6, 7, 8], rotation)
    assert sweep == [0, 0, 0, 1, 1, 1]
    assert frame == [0.5, 1.5, 4.5, 0.5, 1.5, 2.5]
    assert width == pytest.approx((0.5, 0.5), rel=0.1)
    # the other way round
    sweep, _, width = place([1, 2, 3, 4], [10.0, 9.5, 9.0, 8.5])
    assert sweep == [0, 0, 0, 0]
    assert width == pytest.approx((-0.5,))


def test_a_named_metadata_column_gets_a_network_beside_the_sweep(sweep):
    config = MergeConfig(metadata=("XDET",))
    problem = build_problem([observed(sweep)], config)
    scale = Merger(problem.unique, problem.table, config).scale
    assert scale.frames is not None
    assert scale.network is not None
    assert scale.network.embedding is None


# --- batch headers

TRICLINIC = gemmi.UnitCell(31, 36, 41, 82, 97, 104)


def triclinic_experiment(first=5, start=30.0, width=0.5, sign=1.0):
    reciprocal = np.array(TRICLINIC.frac.mat.tolist()).T
    a = Rotation.from_rotvec([0.3, -0.5, 0.8]).as_matrix() @ reciprocal
    fixed = Rotation.from_rotvec([0.1, 0.2, -0.3]).as_matrix()
    setting = Rotation.from_rotvec([0.0, 0.02, 0.01]).as_matrix()
    beam = np.array([0.02, -0.01, 1.0])
    return Experiment(
        beam=Beam(beam / np.linalg.norm(beam), 1.0),
        panels=(),
        goniometer=Goniometer(np.array([sign, 0.0, 0.0]), fixed, setting),
        scan=Scan((first, first + 79), (start, width)),
        crystal=Crystal(a, gemmi.SpaceGroup("P 1")),
    )


def predicted(experiment):
    """Indices, frames and s1 in the laboratory, found by bisection of the Ewald condition."""
    grid = np.stack(np.meshgrid(*[np.arange(-8, 9)] * 3, indexing="ij"), -1).reshape(-1, 3)
    grid = grid[np.abs(grid).sum(1) > 0]
    g = experiment.goniometer

    def s1(hkl, z):
        phi = np.radians(experiment.scan.phi_deg(z))
        turn = Rotation.from_rotvec(phi[:, None] * g.rotation_axis)
        r = turn.apply(hkl @ (g.fixed_rotation @ experiment.crystal.A).T)
        return experiment.beam.s0 + r @ g.setting_rotation.T

    def off(hkl, z):
        return np.linalg.norm(s1(hkl, z), axis=1) - np.linalg.norm(experiment.beam.s0)

    hits = []
    for z in np.arange(0.0, 80.0, 0.5):
        low, high = (np.full(len(grid), x) for x in (z, z + 0.5))
        rows = np.flatnonzero(off(grid, low) * off(grid, high) < 0)
        if not len(rows):
            continue
        a, b, h = low[rows], high[rows], grid[rows]
        for _ in range(40):
            middle = (a + b) / 2
            left = off(h, a) * off(h, middle) < 0
            a, b = np.where(left, a, middle), np.where(left, middle, b)
        hits.append((h, a))
    hkl, z = (np.concatenate(x) for x in zip(*hits, strict=True))
    return hkl, z, s1(hkl, z)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_batch_headers_give_the_beams_in_the_crystal(tmp_path, sign):
    """Triclinic cell, inclined beam, fixed and setting rotations; up to one common rotation."""
    experiments = [
        triclinic_experiment(sign=sign),
        triclinic_experiment(first=5, start=100.0, sign=sign),
    ]
    parts = [predicted(e) for e in experiments]
    hkl, z, s1 = (np.concatenate(x) for x in zip(*parts, strict=True))
    number = np.repeat([0, 1], [len(p[1]) for p in parts])
    n = len(z)
    assert n > 500
    xyz = np.column_stack([np.zeros(n), np.zeros(n), z])
    table = mtz_io.UnmergedTable(hkl, number, np.arange(n) + 1.0, np.ones(n), xyz, np.ones(n))
    mtz_io.write_unmerged_mtz(tmp_path / "u.mtz", table, experiments)
    mtz = gemmi.read_mtz_file(str(tmp_path / "u.mtz"))
    rot = mtz.column_with_label("ROT")
    rot.array[:] = rot.array + 360.0 * (rot.array > 110.0)  # a turn later than the header says
    (tmp_path / "u.mtz").write_bytes(mtz.write_to_bytes())
    data = read_mtz(tmp_path / "u.mtz")
    assert set(SWEEP_COLUMNS) <= set(data.metadata)
    rows = np.round(data.intensity).astype(int) - 1
    np.testing.assert_array_equal(data.metadata[SWEEP], number[rows])
    np.testing.assert_allclose(data.metadata[FRAME], z[rows], atol=2e-4)
    np.testing.assert_allclose(data.metadata[WIDTH], 0.5, atol=1e-5)
    for k, e in enumerate(experiments):
        of = data.metadata[SWEEP] == k
        lab = s1[rows][of]
        axis = e.goniometer.lab_axis
        normal = np.cross(lab, np.broadcast_to(e.beam.s0, lab.shape))
        expected = np.abs(normal @ axis) / np.linalg.norm(normal, axis=1)
        np.testing.assert_allclose(data.metadata[ZETA][of], expected, atol=2e-3)
        beams = np.stack([data.metadata[name][of] for name in BEAMS], 1)
        undo = Rotation.from_rotvec(-np.radians(e.scan.phi_deg(z[rows][of]))[:, None] * axis)
        s0 = np.broadcast_to(e.beam.s0 / np.linalg.norm(e.beam.s0), lab.shape)
        unit = lab / np.linalg.norm(lab, axis=1, keepdims=True)
        true = np.concatenate([undo.apply(s0), undo.apply(unit)])
        found = np.concatenate([beams[:, :3], beams[:, 3:]])
        _, rssd = Rotation.align_vectors(true, found)
        assert rssd / len(true) ** 0.5 < 1e-3


def test_headers_without_orientation_give_no_places(tmp_path):
    e = triclinic_experiment()
    hkl, z, _ = predicted(e)
    n = len(z)
    xyz = np.column_stack([np.zeros(n), np.zeros(n), z])
    table = mtz_io.UnmergedTable(hkl, np.zeros(n, int), z + 1, np.ones(n), xyz, np.ones(n))
    mtz_io.write_unmerged_mtz(tmp_path / "u.mtz", table, [e])
    mtz = gemmi.read_mtz_file(str(tmp_path / "u.mtz"))
    for batch in mtz.batches:
        for k in range(6, 15):
            batch.floats[k] = float(k == 6 or k == 10 or k == 14)
    (tmp_path / "v.mtz").write_bytes(mtz.write_to_bytes())
    assert not set(SWEEP_COLUMNS) & set(read_mtz(tmp_path / "v.mtz").metadata)


def test_saved_scale_means_the_same_for_other_observations(sweep, tmp_path):
    config = MergeConfig(anomalous=True, epochs=5, batch_size=1000)
    data = observed(sweep)
    merger, problem = fitted([data], config)
    save_scale(tmp_path / "m.pt", merger, problem.table, config)
    saved = load_scale(tmp_path / "m.pt")
    rows = (data.metadata["XDET"] > 0) | (np.arange(len(data)) % 7 == 0)
    part = data.select(rows)
    other = build_problem([part], config, feature_scaling=saved.feature_scaling)
    saved.check(other.table)
    again = Merger(other.unique, other.table, config)
    saved.load_into(again)
    with torch.no_grad():
        whole = merger.scale(problem.table.everything()).log_k.numpy()
        alone = again.scale(other.table.everything()).log_k.numpy()
    assert len(other.source) < 0.7 * len(problem.source)
    place = np.full(len(data), -1)
    place[problem.source] = np.arange(len(problem.source))
    expected = whole[place[np.flatnonzero(rows)[other.source]]]
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)
