"""The one objective: what it sums, where its gradients go, and that they are right."""

import math
from dataclasses import replace

import pytest
import tolerances
import torch
from simulated_joint import EXTREMES, in_float64, joint_problem

from braggflux.integrator.model.integrator import IntegratorLoss
from braggflux.integrator.types import Flag, ShoeboxBatch
from braggflux.merge.model.objective import MergeTerms
from braggflux.pipelines.integration.joint_model import assemble_elbo

#: The merge as it is, and each of its ablations.
SETTINGS = {
    "as it is": {},
    "observed variance": {"photon_counts": False},
    "mates apart": {"prior": "wilson"},
    "no physics": {"physical_scale": False},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS)
def problem(request):
    return joint_problem(**request.param)


def parameters(module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def gradient_norm(value, module) -> float:
    values = list(parameters(module).values())
    found = torch.autograd.grad(value, values, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float((g**2).sum()) for g in found if g is not None))


def merge_likelihood(model, table) -> torch.Tensor:
    """Sum of <log p(J | K F^2)> over the usable rows of a table."""
    batch = model.merge_batch(table)
    return model.merger.loss(batch, model.merger.inference()).log_likelihood


def test_terms_add_up():
    integration = IntegratorLoss(*torch.tensor([[-5.0, -6.0], [0.5, 0.25], [0.125, 0.125]]))
    parts = torch.tensor([-3.0, 1.5, 2.0]).double()
    merging = MergeTerms(*parts, *torch.zeros(3, 2))
    terms = assemble_elbo(integration, merging)
    assert terms.nll.item() == 14.0
    assert terms.kl_profile.item() == 0.75
    assert terms.kl_background.item() == 0.25
    assert terms.kl_structure_factor.item() == 1.5
    assert terms.scale_penalty.item() == 2.0
    assert terms.elbo.item() == -(14.0 + 0.75 + 0.25 + 1.5 + 2.0)
    assert terms.detached()["elbo"] == terms.elbo.item()
    alone = assemble_elbo(integration, None)
    assert alone.elbo.item() == -12.0
    assert assemble_elbo(None, merging).elbo.item() == -6.5


@pytest.mark.parametrize("coupled", [True, False])
def test_minibatches_sum_to_the_full_batch(problem, coupled):
    model, batch = problem.model, problem.batch
    with torch.no_grad():
        whole, _ = model.joint_terms(batch, sample=False, coupled=coupled)
        parts = [
            model.joint_terms(batch[rows], sample=False, coupled=coupled)[0].detached()
            for rows in torch.randperm(len(batch)).split(13)
        ]
    for name, value in whole.detached().items():
        total = sum(part[name] for part in parts)
        # pixels are summed in float32, in batches of another shape
        size = abs(value) + abs(whole.nll.item())
        assert total == pytest.approx(value, abs=tolerances.FLOAT32_SUM * size), name


@every_setting
def test_minibatches_sum_exactly_in_float64(settings):
    problem = in_float64(joint_problem(60, **settings))
    with torch.no_grad():
        whole, _ = problem.model.joint_terms(problem.batch, sample=False)
        parts = sum(
            problem.model.joint_terms(problem.batch[rows], sample=False)[0].elbo
            for rows in torch.randperm(60).split(7)
        )
    assert parts.item() == pytest.approx(whole.elbo.item(), rel=tolerances.FLOAT64_SUM)


def test_gradient_of_the_merge_reaches_the_encoder(problem):
    """d <log p(J | K F^2)> / d encoder, and the same for profile and its prior."""
    model = problem.model
    _, table = model.integrate(problem.batch, sample=False, use_expected=True)
    value = merge_likelihood(model, table)
    integrator = model.integrator
    for module in (integrator.encoder, integrator.profile, integrator.profile_prior):
        assert gradient_norm(value, module) > 1e-3
    # and the pixels reach the structure factors
    assert gradient_norm(value, model.merger) > 1e-3


def test_detached_table_stops_the_gradient(problem):
    model = problem.model
    _, table = model.integrate(problem.batch, sample=False, use_expected=True)
    value = merge_likelihood(model, table.detach())
    assert gradient_norm(value, model.integrator) == 0.0
    assert gradient_norm(value, model.merger) > 0.0


def test_staged_objective_knows_nothing_of_the_merge():
    model, batch = (p := joint_problem(40)).model, p.batch
    terms, _ = model.joint_terms(batch, sample=False, coupled=False)
    assert gradient_norm(terms.elbo, model.merger) == 0.0
    assert gradient_norm(terms.elbo, model.integrator) > 0.0
    with torch.no_grad():
        for parameter in model.merger.parameters():
            parameter.add_(1.0)
        changed, _ = model.joint_terms(batch, sample=False, coupled=False)
    assert changed.elbo.item() == terms.elbo.item()
    coupled, _ = model.joint_terms(batch, sample=False, coupled=True)
    assert coupled.elbo.item() != pytest.approx(terms.elbo.item())


def freeze_detached_parts(model, batch, monkeypatch) -> None:
    """Hold fixed what the model computes without gradient: the function whose gradient it takes.

    These are what the encoder reads, the background fit (and the intensity that comes with it),
    the share of information, and the expectation that chooses the pixels' weights.
    """
    integrator = model.integrator
    freeze_inputs(integrator, model, batch, monkeypatch)
    fits = []
    fit, inference = integrator.background.fit, integrator.inference
    monkeypatch.setattr(
        integrator.background, "fit", lambda *a, **k: fits.append(fit(*a, **k)) or fits[-1]
    )
    expected = model.expected(batch.metadata.refl_row)
    fraction = inference(batch, expected).information_fraction
    monkeypatch.setattr(integrator.background, "fit", lambda *a, **k: fits[0])
    monkeypatch.setattr(model, "expected", lambda rows: expected)
    monkeypatch.setattr(
        integrator,
        "inference",
        lambda *a, **k: replace(inference(*a, **k), information_fraction=fraction),
    )


def freeze_inputs(integrator, model, batch, monkeypatch) -> None:
    """Hold the encoder's inputs fixed: they are data to it, whatever profile made them."""
    inputs = []
    encode = integrator._encode_inputs
    monkeypatch.setattr(
        integrator, "_encode_inputs", lambda *a: inputs.append(encode(*a)) or inputs[-1]
    )
    with torch.no_grad():
        model.joint_terms(batch, sample=False)
    monkeypatch.setattr(integrator, "_encode_inputs", lambda *a: inputs[0])


def central_difference(function, parameter, k: int, step: float = 1e-5) -> float:
    flat = parameter.data.view(-1)
    kept = flat[k].item()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            flat[k] = kept + sign * step
            values.append(function().item())
        flat[k] = kept
    return (values[0] - values[1]) / (2 * step)


@every_setting
def test_gradient_equals_finite_differences(monkeypatch, settings):
    """Every kind of parameter of the joint objective, at its largest element, in float64."""
    problem = in_float64(joint_problem(40, **settings))
    assert_gradients(problem.model, problem.batch, monkeypatch)


@pytest.mark.parametrize("photons", [0, 1])
def test_gradients_where_boxes_are_dark(monkeypatch, photons):
    """No box holds a photon, or every other one holds a single one."""
    problem = in_float64(joint_problem(40))
    batch = problem.batch
    counts = torch.zeros_like(batch.counts)
    counts[::2, 3, 4, 4] = photons
    assert_gradients(
        problem.model, ShoeboxBatch(counts, batch.is_valid, batch.metadata), monkeypatch
    )


@pytest.mark.slow
@pytest.mark.parametrize("extreme", EXTREMES, ids=lambda f: f.__name__)
def test_gradients_at_the_extremes(extreme, monkeypatch):
    problem = in_float64(extreme())
    assert_gradients(problem.model, problem.batch, monkeypatch)


def assert_gradients(model, batch, monkeypatch) -> None:
    freeze_detached_parts(model, batch, monkeypatch)
    elbo = lambda: model.joint_terms(batch, sample=False)[0].elbo  # noqa: E731
    named = parameters(model)
    value = elbo()
    gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    # a difference over 2e-5 has the rounding of the whole objective, ten units of its last place
    rounding = 1e-4 + 10 * torch.finfo(value.dtype).eps * abs(value.item()) / 2e-5
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        assert gradient is not None, name
        k = int(gradient.abs().argmax())
        exact = central_difference(elbo, parameter, k)
        assert gradient.view(-1)[k].item() == pytest.approx(exact, rel=1e-4, abs=rounding), name


def test_envelope_costs_little(monkeypatch):
    """Slope along the gradient with the background fit moving along.

    The fit maximises the pixels' own posterior: its motion is of second order in that term, and
    small, though not zero, in the merge's term and in the share of information. Seen: 0.3 %.
    """
    problem = in_float64(joint_problem(40))
    model, batch = problem.model, problem.batch
    freeze_inputs(model.integrator, model, batch, monkeypatch)
    elbo = lambda: model.joint_terms(batch, sample=False)[0].elbo  # noqa: E731
    for module in (model.integrator.encoder, model.integrator.profile):
        values = list(parameters(module).values())
        gradients = torch.autograd.grad(elbo(), values)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        found = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                for value, gradient in zip(values, gradients, strict=True):
                    value.add_(step / norm * gradient)
                found.append(elbo().item())
                for value, gradient in zip(values, gradients, strict=True):
                    value.sub_(step / norm * gradient)
        assert (found[0] - found[1]) / 2e-5 == pytest.approx(norm, rel=0.02)


def test_expectation_of_unknown_reflections_is_nan():
    problem = joint_problem(30, n_absent=4)
    model, merger = problem.model, problem.model.merger
    expected = model.expected(problem.batch.metadata.refl_row)
    assert torch.isnan(expected[:4]).all()
    everything = model.observations.everything()
    spread = merger.log_spread.exp()[everything.terms.row]
    mean = (merger.scale(everything).log_k.exp() * spread).detach()
    assert model.store_row.sort().values.tolist() == list(range(4, 30))
    torch.testing.assert_close(expected[model.store_row], mean)


def test_a_row_of_the_merge_is_the_reflection_of_its_box():
    problem = joint_problem(40, n_absent=3)
    model, metadata = problem.model, problem.batch.metadata
    assert (model.table_row[:3] == -1).all()
    rows = model.store_row
    torch.testing.assert_close(model.table_row[rows], torch.arange(len(rows)))
    merger, terms = model.merger, model.observations.terms
    index = metadata.miller_index[rows].numpy()
    assert merger.unique.asus[0].refl_id(index).tolist() == terms.row.tolist()
    torch.testing.assert_close(terms.base_log_scale, -metadata.lp[rows].double().log())


def test_only_usable_rows_enter_the_merge():
    """No reflection, or rejected: integrated, but without a say in the structure factors."""
    problem = joint_problem(30, n_absent=4)
    model, batch = problem.model, problem.batch
    model.flags[6] = Flag.REJECTED
    is_valid = batch.is_valid.clone()
    is_valid[9, :, 3:] = False  # most of the spot is lost: the integrator rejects it
    counts = batch.counts * is_valid
    batch = type(batch)(counts, is_valid, batch.metadata)
    terms, table = model.joint_terms(batch, sample=False)
    expected = set(range(30)) - {0, 1, 2, 3, 6, 9}
    batch = model.merge_batch(table)
    used = batch.rows[batch.observations.is_used]
    assert set(model.store_row[used].tolist()) == expected
    observed = model.observe(table)
    assert set(model.store_row[observed.observations.is_used].tolist()) == expected
    assert (table.flags[[6, 9]] & Flag.REJECTED).all()
    assert torch.isfinite(terms.elbo)


def test_same_seed_same_gradient(problem):
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        problem.model.zero_grad()
        terms, _ = problem.model.joint_terms(problem.batch, sample=True)
        terms.elbo.backward()
        gradient = torch.cat(
            [p.grad.flatten().double() for p in parameters(problem.model).values()]
        )
        results.append((terms.elbo.item(), gradient))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0] != results[2][0]


def test_training_raises_the_objective():
    """Some steps of Adam on the joint objective, all parameters together."""
    problem = joint_problem(60)
    model, batch = problem.model, problem.batch
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with torch.no_grad():
        before = model.joint_terms(batch, sample=False)[0].elbo.item()
    for _ in range(30):
        optimizer.zero_grad()
        (-model.joint_terms(batch)[0].elbo / len(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        after = model.joint_terms(batch, sample=False)[0].elbo.item()
    assert after > before + 10.0
