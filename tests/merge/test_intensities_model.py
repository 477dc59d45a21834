"""Merging measured intensities: batches, likelihood, priors and recovery against references."""

from __future__ import annotations

from types import SimpleNamespace

import gemmi
import numpy as np
import pytest
import torch
from scipy import stats
from simulated_intensities import CELL, SPACE_GROUP, simulated

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.distributions.nakagami import Nakagami
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.measurement import GaussianMeasurement
from braggflux.merge.data.pairing import paired_clusters
from braggflux.merge.fit.held_out import split
from braggflux.merge.fit.training import fit, start
from braggflux.merge.io.observations import make_unmerged
from braggflux.merge.likelihood.common_error import CommonError
from braggflux.merge.likelihood.error_model import ErrorModel
from braggflux.merge.likelihood.expectation import Expectation
from braggflux.merge.likelihood.student_t import Normal, StudentT
from braggflux.merge.model.merger import Merger
from braggflux.merge.output.amplitudes import merged_rows, scaled_observations
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.problem import build_problem
from braggflux.merge.rows import UniqueRows, check_parents
from braggflux.merge.scale.networks import ImageEncoder


@pytest.mark.parametrize("kind", ["scan", "stills", "paired"])
def test_any_batches_add_up_to_the_full_batch(kind):
    rng = np.random.default_rng(1)
    config = MergeConfig(stills=kind == "stills")
    first, _, asu = simulated(rng)
    data, parents = [first], None
    if kind == "paired":
        second, _, _ = simulated(np.random.default_rng(1), f=None, asu=asu, name="b")
        data, parents = [first, second], (None, 0)
    problem = build_problem(data, config, parents)
    assert problem.table.has_clusters == (kind == "paired")
    table = problem.table
    masks = split(table, 0.1, config.stills, seed=3)
    table = table.with_masks(masks.is_used, masks.is_seen)
    merger = Merger(problem.unique, table, config)
    merger.prior.couple()
    assert merger.prior.is_coupled == (kind == "paired")
    start(merger, table)
    with torch.no_grad():
        for p in merger.parameters():
            p += 0.05 * torch.randn_like(p)
        q = merger.inference()
        full = merger.loss(table.everything(), q)
        generator = torch.Generator().manual_seed(0)
        for batch_size in (200, 900):
            batches = table.unit_batches(batch_size, generator)
            assert len(batches) > 2
            parts = [merger.loss(table.batch(units), q) for units in batches]
            for name in ("log_likelihood", "kl_structure_factor", "scale_penalty"):
                total = float(sum(getattr(part, name) for part in parts))
                # networks are float32: sums in another order differ in the last digits
                assert total == pytest.approx(float(getattr(full, name)), rel=1e-6), name
            information = sum(part.information for part in parts)
            torch.testing.assert_close(information, full.information, rtol=1e-4, atol=1e-6)


def law(is_normal, dof=None, has_common=False, sigma_unit=1.0):
    parts = ErrorModel(True, sigma_unit), CommonError(has_common)
    return Normal(*parts) if is_normal else StudentT(*parts, dof)


def density(model, residual, variance, cluster=None, spread=0.0, **errors):
    """Log-density of measurements that lie ``residual`` off, of errors that are known."""
    residual, variance = torch.as_tensor(residual), torch.as_tensor(variance)
    measured = GaussianMeasurement(residual, variance.sqrt())
    batch = SimpleNamespace(observations=SimpleNamespace(measured=measured), cluster=cluster)
    nothing = torch.zeros_like(residual)
    errors = {name: torch.as_tensor(value) for name, value in errors.items()}
    expected = Expectation(nothing, nothing + spread, variance, nothing, **errors)
    return model(batch, expected).detach().numpy()


def test_likelihood_is_scipys_when_f_is_known():
    rng = np.random.default_rng(0)
    residual, variance = rng.normal(size=30), rng.uniform(0.5, 3, 30)
    for is_normal, wanted in ((True, stats.norm()), (False, stats.t(7.0))):
        given = density(law(is_normal, 7.0), residual, variance)
        wanted = wanted.logpdf(residual / np.sqrt(variance)) - 0.5 * np.log(variance)
        np.testing.assert_allclose(given, wanted, rtol=1e-10)


def test_common_error_is_a_correlated_normal_or_student_t():
    rng = np.random.default_rng(0)
    residual, expected = rng.normal(size=3), rng.uniform(1, 3, 3)
    variance = rng.uniform(0.5, 3, 3)
    cluster = torch.tensor([0, 0, 1])
    for is_normal in (True, False):
        model = law(is_normal, 5.0, has_common=True)
        s2 = model.error_parameters["common_error"] ** 2
        given = density(model, residual, variance, cluster, common=s2**0.5 * expected)
        for c, rows in ((0, [0, 1]), (1, [2])):
            m = expected[rows]
            shape = np.diag(variance[rows]) + s2 * np.outer(m, m)
            wanted = stats.multivariate_normal(cov=shape)
            if not is_normal:
                wanted = stats.multivariate_t(shape=shape, df=5.0)
            assert given[c] == pytest.approx(wanted.logpdf(residual[rows]), rel=1e-10)


def test_uncertain_root_is_a_second_error_in_common():
    rng = np.random.default_rng(0)
    residual, common, shared = rng.normal(size=(3, 5))
    variance = rng.uniform(0.5, 3, 5)
    cluster = torch.tensor([0, 0, 1, 1, 1])
    model = law(False, 5.0, has_common=True)
    given = density(model, residual, variance, cluster, common=common, shared=shared)
    for c, rows in ((0, [0, 1]), (1, [2, 3, 4])):
        shape = np.diag(variance[rows])
        shape = shape + sum(np.outer(v[rows], v[rows]) for v in (common, shared))
        wanted = stats.multivariate_t(shape=shape, df=5.0).logpdf(residual[rows])
        assert given[c] == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("one_minus_r2", [0.002, 0.0002])
def test_width_of_a_coupled_pair_is_that_of_the_joint_normal(one_minus_r2):
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 12.0, False)
    config = MergeConfig(prior="double-wilson")
    data, _, _ = simulated(np.random.default_rng(0), asu=asu)
    problem = build_problem([data, data], config, (None, 0))
    merger = Merger(problem.unique, problem.table, config)
    prior, unique = merger.prior, problem.unique
    prior.couple()
    prior.one_minus_r2.fill_(one_minus_r2)
    r, spread = (x.detach() for x in prior.conditional())
    child, parent, expected = prior.child, prior.parent, prior.spread().detach()
    stiffness = torch.where(prior.is_centric[child], 1.0, 2.0) / spread
    # variance of F: 1 - pi / 4 of <F^2> for acentric, 1 - 2 / pi for centric reflections
    wilson = torch.where(prior.is_centric, 1 - 2 / np.pi, 1 - np.pi / 4) * expected
    torch.manual_seed(0)
    precision = 100 * torch.rand(len(unique)).double() / expected
    square = 4 + torch.rand(len(unique)).double()
    # q's own variance, as far off as it may be before a fit has ended, does not matter
    q = SimpleNamespace(variance=0.99 * spread.mean().expand(len(unique)), spread=square)
    width = prior.width(q, precision * square / 4)
    for i in (0, len(child) // 2, len(child) - 1):
        c, p = int(child[i]), int(parent[i])
        k = float(stiffness[i])
        own = float(precision[p] + 1 / wilson[p])
        matrix = np.array([[own + r[i] ** 2 * k, -r[i] * k], [-r[i] * k, precision[c] + k]])
        joint = np.linalg.inv(matrix.astype(float))
        assert float(width.sigma[p]) == pytest.approx(joint[0, 0] ** 0.5, rel=1e-6)
        assert float(width.sigma[c]) == pytest.approx(joint[1, 1] ** 0.5, rel=1e-6)
        assert float(width.shared[p] * width.shared[c]) == pytest.approx(joint[0, 1], rel=1e-6)


def test_expected_student_t_is_a_lower_bound():
    rng = np.random.default_rng(0)
    spread = 0.7
    sampled = stats.t(4.0).logpdf(1.3 + np.sqrt(spread) * rng.standard_normal(200_000)).mean()
    bound = density(law(False, 4.0), [1.3], [1.0], spread=spread)[0]
    assert sampled - 0.2 < bound < sampled


def test_error_model_is_evans():
    model = ErrorModel(True, 2.0)
    with torch.no_grad():
        model.log_sdfac.fill_(np.log(1.2))
        model.sdb.fill_(0.05)
        model.log_sdadd.fill_(np.log(0.04))
    sigma, mean = torch.tensor([[3.0, 1.0], [50.0, 2.0]], dtype=torch.float64)
    wanted = 1.2**2 * (sigma**2 + 0.05 * 2.0 * mean + (0.04 * mean) ** 2)
    torch.testing.assert_close(model(sigma**2, mean, None), wanted)


def test_child_divergence_against_samples():
    asu = ReciprocalAsu(CELL, SPACE_GROUP, 12.0, False)
    unique = UniqueRows([asu, asu], (None, 0))
    prior = DoubleWilson(Wilson.of_rows(unique, 3), unique, 2)
    prior.couple()
    prior.one_minus_r2.fill_(0.2)
    q = Nakagami(
        torch.full((len(unique),), 40.0, dtype=torch.float64),
        torch.full((len(unique),), 1.5, dtype=torch.float64),
    )
    got = prior.kl(q).detach()[prior.child]
    torch.manual_seed(0)
    f = q.rsample((40_000,))
    child, parent = f[:, prior.child].numpy(), f[:, prior.parent].numpy()
    r, s = (x.detach().numpy() for x in prior.conditional())
    centre = r * parent
    rice = stats.rice.logpdf(child, centre / np.sqrt(s / 2), scale=np.sqrt(s / 2))
    folded = stats.foldnorm.logpdf(child, centre / np.sqrt(s), scale=np.sqrt(s))
    centric = unique.is_centric[prior.child.numpy()]
    assert 0 < centric.sum() < len(centric)
    log_q = q.log_prob(f)[:, prior.child].detach().numpy()
    wanted = (log_q - np.where(centric, folded, rice)).mean(0)
    # I_0 and cosh enter at the mean amplitudes: good to a few hundredths of a nat
    np.testing.assert_allclose(got.numpy(), wanted, atol=0.05)


@pytest.mark.slow
def test_sigma_shrinks_with_redundancy_and_truth_is_recovered():
    config = MergeConfig(
        network_width=0, likelihood="normal", error_model=False, held_out=0.0, epochs=60
    )
    sigma = {}
    for n_per_image in (200, 800):
        data, f, asu = simulated(np.random.default_rng(2), 20, n_per_image)
        problem = build_problem([data], config)
        torch.manual_seed(0)
        merger = Merger(problem.unique, problem.table, config)
        start(merger, problem.table)
        fit(merger, problem.table, config)
        rows = merged_rows(merger, problem.table, scaled_observations(merger, problem.table))
        own = problem.unique.asus[0].refl_id(asu.miller_index)
        amplitude = rows.amplitude.numpy()[own]
        seen = (rows.n_obs.numpy()[own] > 0) & (f > 15)
        assert np.corrcoef(amplitude[seen], f[seen])[0, 1] > 0.995
        ratio = np.median(amplitude[seen] / f[seen])
        z = (amplitude / ratio - f)[seen] / (rows.sigma_amplitude.numpy()[own][seen] / ratio)
        assert 0.8 < np.median(np.abs(z)) / 0.6745 < 1.25
        sigma[n_per_image] = np.median(rows.sigma_amplitude.numpy()[own][seen] / ratio)
    assert sigma[200] / sigma[800] == pytest.approx(2.0, rel=0.2)


def test_encoder_ignores_the_order_of_reflections():
    torch.manual_seed(0)
    encoder = ImageEncoder(3, 8, 2, 4).double()
    x, image = torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 3
    seen = torch.rand(30) < 0.7
    order = torch.randperm(30)
    torch.testing.assert_close(
        encoder(x, image, seen, 3), encoder(x[order], image[order], seen[order], 3)
    )
    changed = x.clone()
    changed[~seen] += 1.0
    torch.testing.assert_close(encoder(x, image, seen, 3), encoder(changed, image, seen, 3))


def test_an_image_that_was_never_trained_on_has_no_parameters_of_its_own():
    rng = np.random.default_rng(3)
    data, *_ = simulated(rng)
    config = MergeConfig(stills=True, epochs=4)
    problem = build_problem([data], config)
    masks = split(problem.table, 0.1, True, seed=0)
    table = problem.table.with_masks(masks.is_used, masks.is_seen)
    merger = Merger(problem.unique, table, config)
    start(merger, table)
    fit(merger, table, config)
    scale, o = merger.scale, table.observations
    held = torch.unique(o.image[masks.by_image])
    assert len(held) == 2
    with torch.no_grad():
        assert not scale.network.deviation[held].any()
        others = torch.ones(len(scale.network.deviation), dtype=torch.bool)
        others[held] = False
        assert scale.network.deviation[others].any(1).all()
        before = scale(table.everything()).log_k
        again = scale(table.everything()).log_k
        torch.testing.assert_close(before, again, rtol=0, atol=0)
        with merger.training_mode():  # another draw of images that do without each time
            assert (scale(table.everything()).log_k != before).any()
        scale.forget_images()
        alone = scale(table.everything()).log_k
    of_held = torch.isin(o.image, held)
    torch.testing.assert_close(alone[of_held], before[of_held], rtol=0, atol=1e-6)
    assert (alone[~of_held] != before[~of_held]).any()


def test_pairs_need_the_same_place():
    dataset = np.array([0, 0, 1, 1, 1])
    hkl = np.array([[1, 2, 3]] * 4 + [[1, 2, 4]])
    position = np.array([[10.0, 10.0], [900.0, 500.0], [11.0, 10.0], [500.0, 0.0], [900.0, 500.0]])
    cluster = paired_clusters(dataset, np.zeros(5, int), hkl, position)
    np.testing.assert_array_equal(cluster, [0, 1, 0, 3, 4])


def test_harmonics_share_one_observation():
    data = make_unmerged(
        source="x",
        miller_index=[[2, 2, 2], [1, 1, 1], [1, 2, 3]],
        intensity=[10.0, 20.0, 30.0],
        sigma=[1.0, 1.0, 1.0],
        image_label=[0, 0, 1],
        metadata={},
        wavelength=[1.0, 1.1, 1.9],
        cell=CELL,
        space_group=SPACE_GROUP,
        name="x",
        has_lp_applied=True,
    )
    terms = build_problem([data], MergeConfig(laue=True)).table.terms
    # 222 at 1.0 A is 111 at 2.0 A (outside 1.0-1.9); 111 at 1.1 A is no 222 (0.55 A);
    # 123 at 1.9 A would be 246 at 0.95 A
    assert len(terms) == 3
    data = data.__class__(**vars(data) | {"wavelength": np.array([1.0, 2.0, 2.0])})
    problem = build_problem([data], MergeConfig(laue=True))
    wide, asu = problem.table.terms, problem.unique.asus[0]
    rows = {tuple(h): int(asu.refl_id([h])[0]) for h in ([1, 1, 1], [2, 2, 2], [1, 2, 3])}
    place = np.argsort(problem.source)
    first = wide.row[wide.observation == place[0]].tolist()
    assert first == [rows[2, 2, 2], rows[1, 1, 1]]
    np.testing.assert_allclose(wide.wavelength[wide.observation == place[0]], [1.0, 2.0])
    assert wide.row[wide.observation == place[1]].tolist() == [rows[1, 1, 1], rows[2, 2, 2]]


def test_neighbouring_high_orders_overlap_in_a_narrow_beam():
    """16 8 0 at 1.158 A lies on 18 9 0 at 1.029 A: orders 8 and 9 of 2 1 0."""
    cell = gemmi.UnitCell(66.9, 66.9, 40.8, 90, 90, 120)
    data = make_unmerged(
        source="x",
        miller_index=[[16, 8, 0], [18, 9, 0], [1, 2, 30]],
        intensity=[10.0, 20.0, 30.0],
        sigma=[1.0, 1.0, 1.0],
        image_label=[0, 0, 0],
        metadata={},
        wavelength=[1.158, 1.02, 1.18],
        cell=cell,
        space_group=gemmi.SpaceGroup("P 63"),
        name="x",
        has_lp_applied=True,
    )
    problem = build_problem([data], MergeConfig(laue=True))
    terms, asu = problem.table.terms, problem.unique.asus[0]
    assert not terms.base_log_scale.any()
    place = np.argsort(problem.source)
    first = terms.row[terms.observation == place[0]].tolist()
    assert first == [int(asu.refl_id([h])[0]) for h in ([16, 8, 0], [18, 9, 0])]
    terms = build_problem([data], MergeConfig(laue=True, laue_lp=True)).table.terms
    # lambda^4 / sin^2 theta; harmonics have the same angle
    sine2 = terms.wavelength.numpy() ** 2 * terms.inv_d2.numpy() / 4
    polarization = 1 - 2 * sine2 * (1 - sine2)  # (1 + cos^2 2 theta) / 2
    factor = np.log(terms.wavelength.numpy() ** 4 / sine2 * polarization)
    np.testing.assert_allclose(np.ptp(terms.base_log_scale.numpy() - factor), 0, atol=1e-9)
    np.testing.assert_allclose(
        terms.wavelength[terms.observation == place[0]], [1.158, 1.158 * 8 / 9], rtol=1e-6
    )
    # 16 8 0 would need 1.1475 A on the spot of 18 9 0, and has it; 1 2 30 is alone
    assert torch.bincount(terms.observation)[place].tolist() == [2, 2, 1]


@pytest.mark.parametrize(
    ("parents", "message"),
    [((0, None), "own parent"), ((1, 0), "own parent"), ((None, 5), "does not exist"),
     ((None,), "names 1 parents")],
)  # fmt: skip
def test_wrong_parents(parents, message):
    with pytest.raises(UserError, match=message):
        check_parents(parents, 2)


def test_wrong_requests():
    data, _, _ = simulated(np.random.default_rng(0))
    with pytest.raises(UserError, match="unknown metadata nonsense; these files have"):
        build_problem([data], MergeConfig(metadata=("nonsense",)))
    with pytest.raises(UserError, match="no wavelength"):
        build_problem([data], MergeConfig(laue=True))
    with pytest.raises(ValueError, match="exclude each other"):
        MergeConfig(laue=True, stills=True)
