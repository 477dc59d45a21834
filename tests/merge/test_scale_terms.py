"""Terms of the scale: what each says, its prior, its Newton steps; and one more from outside."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tolerances
import torch
from scipy import special
from simulated_intensities import simulated

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.sweeps import SweepTable
from braggflux.merge.fit.training import fit, start
from braggflux.merge.model.merger import Merger
from braggflux.merge.model.saved_scale import load_scale, save_scale
from braggflux.merge.problem import build_problem
from braggflux.merge.scale.model import ScaleModel
from braggflux.merge.scale.registry import TERMS
from braggflux.merge.scale.term import ScaleTerm
from braggflux.merge.scale.terms.absorption import HARMONIC_SD, Absorption, real_harmonics
from braggflux.merge.scale.terms.b_factor import B_SD, BFactor
from braggflux.merge.scale.terms.detector import DetectorResponse
from braggflux.merge.scale.terms.falloff import Falloff
from braggflux.merge.scale.terms.frames import DAMPING, MAX_STEP, FrameScale
from braggflux.merge.scale.terms.known import KnownScale

N_FRAMES, WIDTH = 60, 2.0  # of each of two sweeps; [deg]


def sweep_table(n=800, seed=0, rocking=0.6, n_frames=N_FRAMES):
    """Places of random observations on two sweeps."""
    rng = np.random.default_rng(seed)
    xyz = torch.as_tensor(rng.uniform([0, 0, 0], [1000, 800, n_frames], (n, 3)))
    beams = torch.as_tensor(rng.normal(size=(2, n, 3)))
    beams = beams / beams.norm(dim=-1, keepdim=True)
    return SweepTable(
        torch.arange(n) % 2,
        xyz,
        xyz,
        torch.full((n,), WIDTH, dtype=torch.float64),
        *beams,
        torch.as_tensor(rng.uniform(2.0, 20.0, n)),
        (n_frames, n_frames),
        (WIDTH, WIDTH),
        rocking=torch.full((n,), rocking, dtype=torch.float64) if rocking else None,
    )


def batch_of(rows, share=1.0):
    """What a term reads of a batch."""
    return SimpleNamespace(rows=rows, term_rows=rows, share=share)


@pytest.fixture
def terms():
    torch.manual_seed(1)
    sweeps = sweep_table()
    kinds = {
        "frames": FrameScale,
        "b_factor": BFactor,
        "absorption": Absorption,
        "detector": DetectorResponse,
    }
    return sweeps, {name: kind(sweeps) for name, kind in kinds.items()}


def test_an_untrained_sweep_leaves_what_is_known(terms):
    sweeps, made = terms
    known = torch.randn(len(sweeps), dtype=torch.float64)
    rows = torch.arange(len(sweeps))
    batch = batch_of(rows)
    batch.terms = SimpleNamespace(base_log_scale=known)
    model = ScaleModel(made | {"known": KnownScale()})
    torch.testing.assert_close(model(batch).log_k, known)
    assert model.frames is made["frames"]


def test_b_factor_is_piecewise_linear_with_mean_zero():
    sweeps = sweep_table()
    term = BFactor(sweeps, spacing_deg=12.0)
    n = len(term.b_factor) // 2
    assert n == 11
    b = torch.linspace(1, 5, 2 * n, dtype=torch.float64).sin()
    with torch.no_grad():
        term.b_factor.copy_(b)
        found = term(batch_of(torch.arange(len(sweeps)))).numpy()
    knots, angle = np.linspace(0, N_FRAMES * WIDTH, n), sweeps.xyz_px[:, 2].numpy() * WIDTH
    along = [np.interp(angle, knots, b[:n]), np.interp(angle, knots, b[n:])]
    along = np.choose(sweeps.experiment.numpy(), along)
    inv_d2 = sweeps.d.numpy() ** -2
    expected = -0.5 * (along - along.mean()) * (inv_d2 - inv_d2.mean())
    np.testing.assert_allclose(found, expected, atol=1e-7)
    # an observation is few numbers, however many knots there are
    held = [v for v in term.buffers() if len(v.shape) and len(v) == len(sweeps)]
    assert sum(v.element_size() for v in held) == 12
    # at the start of the first sweep the crystal is fresh
    model = ScaleModel({"b_factor": term})
    fresh = model.fresh_crystal_factor(torch.tensor([0.0, 0.1, 0.25]))
    change = along.mean() - float(b[0])
    np.testing.assert_allclose(fresh, np.exp(0.5 * change * np.array([0.0, 0.1, 0.25])), rtol=1e-6)
    # unless the falloff is a matter of the scale: then amplitudes have that which was asked for
    falloff = Falloff(2)
    keeping = ScaleModel({"b_factor": term, "falloff": falloff})
    np.testing.assert_array_equal(keeping.fresh_crystal_factor(torch.tensor([0.1])), fresh[1:2])
    falloff.add(torch.tensor([0.01, 0.1]), torch.tensor([0.0, -1.0]))
    assert keeping.fresh_crystal_factor(torch.tensor([0.1])).tolist() == [1.0]
    none = ScaleModel({"known": KnownScale()}).fresh_crystal_factor(torch.tensor([0.1, 0.2]))
    assert none.tolist() == [1.0, 1.0]


def test_reversed_path_has_the_same_absorption():
    """The Friedel mate measured along (s0, s1) -> (-s1, -s0) crosses the same matter."""
    ours = sweep_table()
    values = vars(ours) | {"s0_crystal": -ours.s1_crystal, "s1_crystal": -ours.s0_crystal}
    theirs = SweepTable(**values)
    for order in (1, 3, 4, 6):
        terms = [Absorption(s, order) for s in (ours, theirs)]
        assert torch.equal(terms[0].harmonics, terms[1].harmonics)
        assert len(terms[0].absorption) == (order + 1) ** 2 - 1


@pytest.mark.parametrize("name", ["frames", "b_factor", "absorption", "detector"])
def test_gradients(terms, name):
    sweeps, made = terms
    term, batch = made[name], batch_of(torch.arange(0, len(sweeps), 9))
    with torch.no_grad():
        for p in term.parameters():
            p.add_(0.1 * torch.randn_like(p))
    value = lambda: term(batch).sin().sum() + 1e-3 * term.penalty()  # noqa: E731
    value().backward()
    for p in term.parameters():
        k = int(p.grad.abs().argmax())
        flat, step = p.data.view(-1), 1e-6
        with torch.no_grad():
            flat[k] += step
            high = value().item()
            flat[k] -= 2 * step
            low = value().item()
            flat[k] += step
        ours = p.grad.view(-1)[k].item()
        assert ours == pytest.approx((high - low) / (2 * step), rel=1e-4, abs=1e-6)


def test_penalties_are_the_log_priors():
    """Differences of the penalties against Gaussian log-densities."""
    sweeps = sweep_table()
    frames, b, absorption = FrameScale(sweeps), BFactor(sweeps), Absorption(sweeps)
    rest = [term.penalty().item() for term in (frames, b, absorption)]
    with torch.no_grad():
        b.b_factor[3] = 2.0
        absorption.absorption[1] = 0.1
        # a straight drift on the first sweep with flicker of alternating sign about it
        n, knots = N_FRAMES, len(frames.drift) // 2
        flicker = 0.002 * (-1.0) ** torch.arange(n)
        middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        frames.drift[:knots] = 0.004 * torch.arange(knots)
        frames.log_frame_scale[:n] = 0.004 * (knots - 1) * middle + flicker
    found = [term.penalty().item() for term in (frames, b, absorption)]
    of_all = float(frames.log_frame_scale.detach().mean())  # of the first sweep twice as much
    walk = 0.5 * (n * 0.002**2 + (knots - 1) * 0.004**2) / 0.03**2
    expected = (
        walk + 0.5 * (of_all / 0.1) ** 2 + 2 * 0.5 * (of_all / 2.0) ** 2,
        0.5 * (2.0**2 + 4.0**2 + 2.0**2) / 0.1**2 + 0.5 * (2 / B_SD) ** 2,
        0.5 * (0.1 / HARMONIC_SD) ** 2,
    )
    for a, before, after in zip(expected, rest, found, strict=True):
        assert after - before == pytest.approx(a, rel=tolerances.SCIPY)


# --- Newton steps of the frames


def newton_case(has_flicker=True, rocking=0.6):
    """Frames away from a target of log K that they can reach: (term, batch, weight, objective)."""
    rng = np.random.default_rng(3)
    sweeps = sweep_table(n=600, rocking=rocking, n_frames=15)
    term, batch = FrameScale(sweeps, has_flicker=has_flicker), batch_of(torch.arange(600))
    with torch.no_grad():
        term.log_flicker.fill_(-1.0)
        term.log_frame_scale.copy_(torch.as_tensor(rng.normal(0.0, 0.1, 30)))
        target = term(batch)
    weight = torch.as_tensor(rng.uniform(0.0, 50.0, 600))

    def objective():
        return 0.5 * (weight * (term(batch) - target) ** 2).sum() + term.penalty()

    return term, batch, weight, objective


def gradient(term, objective):
    term.zero_grad()
    objective().backward()
    return term.log_frame_scale.grad.clone()


def bound_of(term, batch, weight):
    """What a step divides the gradient by."""
    before = term.log_frame_scale.detach().clone()
    term.log_frame_scale.grad = torch.ones_like(before)
    term.newton_step(batch, weight)
    change = (term.log_frame_scale.detach() - before) / -DAMPING
    with torch.no_grad():
        term.log_frame_scale.copy_(before)
    return 1.0 / change


@pytest.mark.parametrize("rocking", [0.6, None], ids=["known", "learned"])
def test_frame_information_bounds_the_curvature(rocking):
    """Against the matrix of second derivatives by finite differences, where residuals are 0."""
    term, batch, weight, objective = newton_case(rocking=rocking)
    n, step = len(term.log_frame_scale), 1e-5
    curvature = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                term.log_frame_scale[k] += sign * step
            sides.append(gradient(term, objective))
            with torch.no_grad():
                term.log_frame_scale[k] -= sign * step
        curvature[k] = (sides[0] - sides[1]) / (2 * step)
    bound = bound_of(term, batch, weight)
    # rows of absolute values: a bound of every eigenvalue, by Gershgorin
    assert (curvature.abs().sum(1) <= bound * (1 + 1e-6)).all()
    assert torch.linalg.eigvalsh(torch.diag(bound) - curvature).min() > 0
    assert (bound < 2.0 * curvature.abs().sum(1)).all()  # and no loose one
    half = bound_of(term, batch_of(batch.rows, share=0.5), 0.5 * weight)
    torch.testing.assert_close(half, 0.5 * bound)


def test_newton_steps_of_the_frames_descend_to_the_optimum():
    term, batch, weight, objective = newton_case()
    with torch.no_grad():
        term.log_frame_scale += 0.3 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    values = []
    for _ in range(150):
        left = gradient(term, objective)
        values.append(float(objective().detach()))
        term.newton_step(batch, weight)
    assert (np.diff(values) < 1e-9).all()
    # what is left moves no frame by a hundredth of its standard deviation
    assert left.abs().max() < 1e-2 * float(weight.sum() / 30) ** 0.5
    assert values[-1] < 1e-2 * values[0]


def test_newton_steps_leave_alone_what_is_held():
    term, batch, weight, objective = newton_case()
    gradient(term, objective)
    term.log_frame_scale.grad.fill_(1e9)
    before = term.log_frame_scale.detach().clone()
    term.newton_step(batch, weight)
    change = before - term.log_frame_scale.detach()  # far from the optimum: no further than this
    torch.testing.assert_close(change, torch.full_like(change, DAMPING * MAX_STEP))
    model = ScaleModel({"frames": term, "known": KnownScale()})
    assert [id(p) for p in model.newton_parameters] == [id(term.log_frame_scale)]
    term.log_frame_scale.requires_grad_(False)
    term.log_frame_scale.grad = None
    held = term.log_frame_scale.clone()
    model.newton_step(batch, weight)
    assert model.newton_parameters == ()
    assert torch.equal(term.log_frame_scale, held)


# --- a term from outside


class Tilt(ScaleTerm):
    """Log K is linear in the first metadata column."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    @classmethod
    def of(cls, table, config):
        return cls()

    def forward(self, batch):
        return self.slope * batch.terms.features[:, 1].double()

    def penalty(self):
        return 0.5 * self.slope**2


def test_a_new_term_is_a_class_and_a_line_in_the_registry(monkeypatch, tmp_path):
    monkeypatch.setitem(TERMS, "tilt", Tilt)
    data, f, asu = simulated(np.random.default_rng(2))
    x = (data.metadata["X"] - 500.0) / 1000 * 12**0.5  # unit standard deviation
    data.intensity[:] *= np.exp(0.3 * x)
    config = MergeConfig(physical_scale=False, network_width=0, epochs=30)
    torch.manual_seed(0)
    problem = build_problem([data], config)
    merger = Merger(problem.unique, problem.table, config)
    assert list(merger.scale.terms)[-1] == "tilt"
    start(merger, problem.table)
    fit(merger, problem.table, config)
    assert float(merger.scale.terms["tilt"].slope.detach()) == pytest.approx(0.3, abs=0.01)
    found = merger.inference().mean.detach().numpy()
    true = f[asu.refl_id(problem.unique.asus[0].miller_index)]
    seen = merger.n_obs.numpy() > 1
    assert np.corrcoef(found[seen], true[seen])[0, 1] > 0.99
    # it is saved and used again like every other
    save_scale(tmp_path / "m.pt", merger, problem.table, config)
    again = Merger(problem.unique, problem.table, config)
    load_scale(tmp_path / "m.pt").load_into(again)
    assert torch.equal(again.scale.terms["tilt"].slope, merger.scale.terms["tilt"].slope)


# --- spherical harmonics


def test_real_harmonics_are_orthonormal():
    """Gauss-Legendre by uniform azimuth: exact for products up to order 8."""
    x, w = np.polynomial.legendre.leggauss(12)
    azimuth = np.arange(24) * 2 * np.pi / 24
    z = np.repeat(x, 24)
    rho = np.sqrt(1 - z**2)
    directions = np.stack(
        [rho * np.tile(np.cos(azimuth), 12), rho * np.tile(np.sin(azimuth), 12), z], 1
    )
    weight = np.repeat(w, 24) * 2 * np.pi / 24
    y = real_harmonics(torch.as_tensor(directions), 4).numpy()
    np.testing.assert_allclose(y.T @ (weight[:, None] * y), np.eye(24), atol=1e-12)
    np.testing.assert_allclose(weight @ y, 0, atol=1e-12)  # order 0 is left to the other terms


def test_real_harmonics_equal_scipy():
    rng = np.random.default_rng(0)
    v = rng.normal(size=(20, 3))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    y = real_harmonics(torch.as_tensor(v), 3).numpy()
    theta, phi = np.arctan2(v[:, 1], v[:, 0]), np.arccos(v[:, 2])
    column = 0
    for l in range(1, 4):
        for m in range(-l, l + 1):
            z = special.sph_harm(abs(m), l, theta, phi)
            expected = z.real if m == 0 else np.sqrt(2) * (z.real if m > 0 else z.imag)
            np.testing.assert_allclose(y[:, column], expected, atol=1e-12)
            column += 1
