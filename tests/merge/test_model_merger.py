"""The merge on simulated observations: calibration, counting of priors, output amplitudes."""

from dataclasses import replace

import numpy as np
import pytest
import tolerances
import torch
from helpers import robust_spread
from simulated_merge import fit, simulate

from braggflux.merge.engine.amplitudes import merged_amplitudes

PLAIN = {"flicker": 0.0, "damage": 0.0, "absorption": 0.0}


def elbo_parts(merger, batch):
    terms = merger.loss(batch, merger.inference())
    weights = merger.group_weights(batch.refl_id)
    share = len(batch) / int(merger.n_obs.sum())
    return (
        terms.log_likelihood.sum()
        - (weights * terms.kl_structure_factor).sum()
        - share * terms.scale_penalty
    )


def test_minibatches_sum_to_the_full_batch(fitted):
    merger, batch = fitted.merger, fitted.experiment.batch
    order = torch.randperm(len(batch))
    with torch.no_grad():
        whole = elbo_parts(merger, batch)
        parts = sum(elbo_parts(merger, batch[rows]) for rows in order.split(1234))
    torch.testing.assert_close(parts, whole, rtol=tolerances.FLOAT64_SUM, atol=0)


def test_prior_counts_once_per_group(fitted):
    """Each group of mates with an observation weighs 1 in the full batch, the others 0."""
    weights = fitted.merger.group_weights(fitted.experiment.refl_id)
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    assert int(weights.sum()) == len(fitted.merger.group[fitted.experiment.refl_id].unique())


def test_rejected_observations_take_no_prior_with_them():
    """When the integrator rejects some, the rest of their group still has the whole prior."""
    experiment = simulate(d_min=6.0)
    merger = experiment.merger()
    kept = experiment.refl_id[torch.rand(len(experiment.refl_id)) < 0.6]
    assert ((merger.group_weights(kept) > 0) & (merger.group_weights(kept) < 1)).any()
    merger.count_observations(kept)
    assert set(merger.group_weights(kept).tolist()) <= {0.0, 1.0}
    assert int(merger.n_obs.sum()) == len(kept) == int(merger.n_group.sum())


def test_posterior_amplitudes_are_calibrated(fitted):
    q = fitted.merger.inference()
    mean, sd = q.mean.detach().numpy(), q.variance.sqrt().detach().numpy()
    z = ((mean - fitted.amplitude) / sd)[fitted.is_seen]
    assert 0.9 < robust_spread(z) < 1.15
    assert 0.9 < z.std() < 1.2
    assert abs(z.mean()) < 0.15


def test_output_amplitudes_are_calibrated(fitted):
    merged = merged_amplitudes(fitted.merger, fitted.experiment.batch)
    fresh = fitted.merger.scale.fresh_crystal_factor(fitted.merger.inv_d2).numpy()
    assert 1.03 < fresh.max() < 1.045  # B grows by 2 A^2: exp(1 / (2 3.5^2)) = 1.042
    for value, sigma, true in (
        (merged.intensity, merged.sigma_intensity, fitted.amplitude**2 * fresh),
        (merged.amplitude, merged.sigma_amplitude, fitted.amplitude * fresh**0.5),
    ):
        z = ((value.numpy() - true) / sigma.numpy())[fitted.is_seen]
        assert 0.9 < robust_spread(z) < 1.2
        assert abs(z.mean()) < 0.15


def test_output_is_the_crystal_before_damage(fitted):
    """The simulated F are those of the undamaged crystal: no B is left between them and ours."""
    merged = merged_amplitudes(fitted.merger, fitted.experiment.batch)
    true = fitted.experiment.truth.amplitude**2
    strong = fitted.is_seen & (true > 500)
    log_ratio = np.log(merged.intensity.numpy()[strong] / true[strong])
    slope = np.polyfit(fitted.experiment.asu.d[strong] ** -2.0, log_ratio, 1)[0]
    # exp(-B / (2 d^2)); at the mean dose it would be half of the 2 A^2 that were simulated
    assert -2 * slope == pytest.approx(0.0, abs=0.5)


def test_error_model_is_recovered(fitted):
    likelihood = fitted.merger.likelihood
    assert likelihood.relative_error.item() == pytest.approx(0.02, abs=0.004)
    assert torch.sigmoid(likelihood.logit_outlier).item() < 0.02


def test_wilson_sigma_is_recovered(fitted):
    true = fitted.experiment.truth.wilson_sigma
    factor = (fitted.amplitude / fitted.experiment.truth.amplitude) ** 2
    ratio = np.log(fitted.merger.prior.wilson.wilson_sigma().detach().numpy() / (true * factor))
    # about 90 reflections on each of 12 knots, mates alike: 15 %
    assert abs(ratio.mean()) < 0.1
    assert ratio.std() < 0.2


def test_friedel_correlation_is_recovered(fitted):
    found = fitted.merger.prior.one_minus_r2
    # 0.01 was simulated; 500 pairs in all determine it to 7 %, a shell of 50 to 20 %
    assert found.mean().item() == pytest.approx(0.01, rel=0.2)
    assert ((found > 0.005) & (found < 0.02)).all()


def test_sigma_falls_with_the_root_of_the_redundancy():
    """A quarter of the observations of each reflection: twice the sigma."""
    whole = simulate(d_min=5.0, photons=2000.0, one_minus_r2=0.5, **PLAIN)
    order = np.lexsort((np.random.default_rng(0).random(len(whole.refl_id)), whole.refl_id))
    _, start = np.unique(whole.refl_id[order], return_index=True)
    rank = np.arange(len(order)) - np.repeat(start, np.diff([*start, len(order)]))
    quarter = whole.subset(np.sort(order[rank % 4 == 0]))
    sigmas, counts = [], []
    for experiment in (whole, quarter):
        merger = experiment.merger(double_wilson=False, scale_network_width=0, absorption_order=0)
        for p in (*merger.scale.parameters(), *merger.likelihood.parameters()):
            p.requires_grad_(False)
        fit(merger, experiment.batch, n_steps=150, rate=0.05)
        q = merger.inference()
        sigmas.append(q.variance.sqrt().detach())
        counts.append(merger.n_obs.double())
        strong = q.concentration > 30
    ratio = (sigmas[1] / sigmas[0])[strong]
    expected = (counts[0] / counts[1]).sqrt()[strong]
    assert len(ratio) > 50
    assert (ratio / expected).median().item() == pytest.approx(1.0, abs=0.03)


def test_weak_data_fall_back_to_the_prior():
    """Noise ten times Sigma, uncoupled: q(F) is Wilson's law, and its divergence small."""
    experiment = simulate(d_min=5.0, photons=1.0, background=2000.0, span_deg=90.0, **PLAIN)
    merger = experiment.merger(double_wilson=False)
    for p in (*merger.scale.parameters(), *merger.likelihood.parameters()):
        p.requires_grad_(False)
    with torch.no_grad():
        merger.prior.wilson.log_sigma.zero_()
    merger.prior.wilson.log_sigma.requires_grad_(False)
    merger.prior.wilson.start = lambda *_: None
    fit(merger, experiment.batch, n_steps=300, rate=0.05)
    q = merger.inference()
    acentric = ~merger.prior.wilson.is_centric & (merger.n_obs > 0)
    assert q.concentration[acentric].median().item() == pytest.approx(1.0, abs=0.15)
    assert q.spread[acentric].median().item() == pytest.approx(1.0, abs=0.15)
    weights = merger.group_weights(experiment.refl_id)
    assert merger.prior.kl(q)[weights > 0].median() < 0.05


def test_start_is_near_the_data(fitted):
    merger = fitted.experiment.merger()
    merger.start(fitted.experiment.batch)
    q = merger.inference()
    seen = torch.as_tensor(fitted.is_seen)
    # scales unknown yet: a tenth
    ratio = (q.spread.sqrt()[seen] / torch.as_tensor(fitted.amplitude)[seen]).detach()
    strong = fitted.amplitude[fitted.is_seen] > 30
    assert ratio[torch.as_tensor(strong)].log().std() < 0.15
    assert torch.isfinite(q.spread).all()
    assert torch.isfinite(q.concentration).all()


def test_amplitudes_are_nan_where_nothing_was_observed(fitted):
    unseen = torch.as_tensor(fitted.is_seen.nonzero()[0][:7])
    keep = ~torch.isin(fitted.experiment.refl_id, unseen)
    merged = merged_amplitudes(fitted.merger, fitted.experiment.batch, keep)
    for column in (merged.amplitude, merged.sigma_amplitude, merged.intensity):
        assert torch.isnan(column[unseen]).all()
        others = torch.as_tensor(fitted.is_seen).clone()
        others[unseen] = False
        assert torch.isfinite(column[others]).all()
    assert (merged.n_obs[unseen] == 0).all()


def test_halves_are_independent_and_make_the_whole(fitted):
    batch = fitted.experiment.batch
    half = torch.rand(len(batch)) < 0.5
    whole = merged_amplitudes(fitted.merger, batch)
    one, two = (merged_amplitudes(fitted.merger, batch, h) for h in (half, ~half))
    assert torch.equal(one.n_obs + two.n_obs, whole.n_obs)
    w1, w2 = one.sigma_intensity**-2, two.sigma_intensity**-2
    both = (one.n_obs > 0) & (two.n_obs > 0)
    joined = (w1 * one.intensity + w2 * two.intensity) / (w1 + w2)
    # equal but for the weights of outliers, which are relative to the best observation of a half
    shift = (joined - whole.intensity)[both].abs() / whole.sigma_intensity[both]
    assert shift.median() < 0.01
    assert shift.max() < 1.0
    # scales and the variances come from all the data, so halves share those errors
    z = ((one.intensity - two.intensity) / (w1**-1 + w2**-1).sqrt())[both]
    assert robust_spread(z) == pytest.approx(1.0, abs=0.1)


def test_an_outlier_loses_its_say(fitted):
    batch = fitted.experiment.batch
    row = int(batch.effective_counts.argmax())
    counts = batch.effective_counts.clone()
    counts[row] *= 5
    spoiled = replace(batch, effective_counts=counts)
    _, _, good = fitted.merger.scaled_observations(spoiled)
    assert good[row] < 1e-3
    refl = int(batch.refl_id[row])
    clean = merged_amplitudes(fitted.merger, batch)
    found = merged_amplitudes(fitted.merger, spoiled)
    shift = (found.intensity - clean.intensity)[refl].abs() / clean.sigma_intensity[refl]
    assert shift < 1.5


def test_expected_intensity_is_scale_times_the_second_moment(fitted):
    rows = torch.arange(50)
    refl_id = fitted.experiment.refl_id[rows]
    q = fitted.merger.inference()
    exact = fitted.merger.scale(rows).exp() * q.second_moment[refl_id]
    found = fitted.merger.expected_intensity(refl_id, rows)
    torch.testing.assert_close(found, exact.detach())


def test_gradient_of_the_whole_objective():
    """Finite differences of the merge's ELBO by one parameter of each kind."""
    experiment = simulate(d_min=6.0, relative_error=0.02)
    merger = experiment.merger()
    merger.start(experiment.batch)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in merger.named_parameters():
            if "likelihood" not in name:
                p.add_(0.05 * torch.randn_like(p))
    elbo_parts(merger, experiment.batch).backward()
    for name, p in merger.named_parameters():
        k = int(p.grad.abs().argmax())
        flat, step = p.data.view(-1), 1e-5
        with torch.no_grad():
            flat[k] += step
            high = elbo_parts(merger, experiment.batch).item()
            flat[k] -= 2 * step
            low = elbo_parts(merger, experiment.batch).item()
            flat[k] += step
        exact = (high - low) / (2 * step)
        # the mode's derivative is that of one scoring step: Fisher's information for the curvature
        assert p.grad.view(-1)[k].item() == pytest.approx(exact, rel=1e-3), name
