"""A merge of simulated counts: what was simulated is found, and errors are what sigmas say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import robust_spread
from simulated_merge import DAMAGE, fit, simulate

from braggflux.merge.fit.training import start, start_amplitudes
from braggflux.merge.model.objective import elbo
from braggflux.merge.output.amplitudes import (
    fresh_crystal_factor,
    merged_rows,
    scaled_observations,
    used_observations,
)
from braggflux.merge.output.half_sets import friedel_rows
from braggflux.merge.prior.double_wilson import DoubleWilson
from braggflux.merge.prior.wilson import Wilson

pytestmark = pytest.mark.slow

PLAIN = {"flicker": 0.0, "damage": 0.0, "absorption": 0.0}
KNOWN_SCALES = {"prior": "wilson", "error_model": False, "likelihood": "normal"}
KNOWN_SCALES |= {"detector_network_width": 0, "absorption_order": 0}


def rows(merging, table=None):
    """What is written of each unique reflection, (R,)."""
    table = merging.table if table is None else table
    return merged_rows(merging.merger, table, used_observations(merging.merger, table))


def bijvoet_pairs(fitted):
    """Rows of F(+) and F(-) of the acentric pairs that are seen."""
    asu, seen = fitted.experiment.asu, fitted.is_seen
    plus = np.flatnonzero((asu.friedel_sign > 0) & ~asu.is_centric)
    minus = asu.friedel_mate[plus]
    both = seen[plus] & seen[minus]
    return plus[both], minus[both]


# --- the scale


def test_frame_scales_are_recovered(fitted):
    """Frame scales stand for the mean 1/d^2: the rest of the simulated damage is B's."""
    n = fitted.experiment.n_frames
    inv_d2 = fitted.experiment.table.metadata.d.numpy() ** -2.0
    damage = DAMAGE * (np.arange(n) + 0.5) / n * inv_d2.mean() / 2
    true = fitted.experiment.truth.log_frame_scale - damage
    found = fitted.merger.scale.frames.frame_scales().detach().numpy()
    assert np.corrcoef(true, found)[0, 1] > 0.99


def test_damage_is_recovered(fitted):
    b = fitted.merger.scale.terms["b_factor"].b_factor.detach().numpy()
    slope = np.polyfit(np.linspace(0, 1, len(b)), b, 1)[0]
    assert slope == pytest.approx(DAMAGE, abs=0.5)


def test_scales_are_recovered(fitted):
    """Frames, damage and absorption together; 25 observations a frame at 3 % each."""
    assert fitted.scale_error.std() < 0.013


def damage_left(fitted, intensity) -> float:
    """B of the true intensities over these, (R,) [A^2]."""
    true = fitted.experiment.truth.amplitude**2
    strong = fitted.is_seen & (true > 500) & np.isfinite(intensity)
    log_ratio = np.log(intensity[strong] / true[strong])
    return -2 * np.polyfit(fitted.experiment.asu.d[strong] ** -2.0, log_ratio, 1)[0]


def test_posterior_is_of_the_mean_dose_and_output_of_the_crystal_before_damage(fitted):
    """B of the scale is zero on average: half of the damage is left in the amplitudes."""
    assert damage_left(fitted, fitted.posterior[0] ** 2) == pytest.approx(DAMAGE / 2, abs=0.5)
    found = np.full(len(fitted.amplitude), np.nan)
    plus, minus = friedel_rows(fitted.experiment.asu)
    table, has_mate = fitted.merging.merged().table, minus >= 0
    found[plus] = table.i_plus
    found[minus[has_mate]] = table.i_minus[has_mate]
    assert damage_left(fitted, found) == pytest.approx(0.0, abs=0.5)


# --- amplitudes, intensities and differences


def test_posterior_amplitudes_are_calibrated(fitted):
    mean, sd = fitted.posterior
    z = ((mean - fitted.amplitude) / sd)[fitted.is_seen]
    assert 0.9 < robust_spread(z) < 1.15
    assert 0.9 < z.std() < 1.2
    assert abs(z.mean()) < 0.15


def test_output_is_calibrated(fitted):
    merged = rows(fitted.merging)
    for value, sigma, true in (
        (merged.intensity, merged.sigma_intensity, fitted.amplitude**2),
        (merged.amplitude, merged.sigma_amplitude, fitted.amplitude),
    ):
        z = ((value.numpy() - true) / sigma.numpy())[fitted.is_seen]
        assert 0.9 < robust_spread(z) < 1.2
        assert abs(z.mean()) < 0.15


def test_bijvoet_differences_are_not_absorbed(fitted):
    """Fitted on true differences: slope 1 within 3 %, and the residual is what sigma says."""
    merged = rows(fitted.merging)
    plus, minus = bijvoet_pairs(fitted)
    intensity = fitted.amplitude**2
    true = intensity[plus] - intensity[minus]
    found = (merged.intensity[plus] - merged.intensity[minus]).numpy()
    sigma = np.hypot(merged.sigma_intensity[plus], merged.sigma_intensity[minus]).numpy()
    weight = sigma**-2.0
    slope = (weight * true * found).sum() / (weight * true**2).sum()
    assert slope == pytest.approx(1.0, abs=0.03)
    assert ((found - true) / sigma).std() == pytest.approx(1.0, abs=0.15)


def test_coupled_differences_are_calibrated(fitted):
    """DANO and SIGDANO, as the file has them: the prior's share and the data's."""
    table = fitted.merging.merged().table
    plus, minus = bijvoet_pairs(fitted)
    true = fitted.amplitude[plus] - fitted.amplitude[minus]
    number = np.cumsum(fitted.experiment.asu.friedel_sign > 0)[plus] - 1  # row of the table
    true *= fresh_crystal_factor(fitted.merger).sqrt().numpy()[plus]
    found, sigma = table.difference[number], table.sigma_difference[number]
    z = (found - true) / sigma
    assert 0.85 < robust_spread(z) < 1.2
    assert abs(z.mean()) < 0.15
    apart = np.hypot(table.sigma_f_plus, table.sigma_f_minus)[number]
    assert (sigma < apart).mean() > 0.9
    assert np.corrcoef(found, true)[0, 1] > 0.98


def test_sigma_falls_with_the_root_of_the_redundancy():
    """A quarter of the observations of each reflection: twice the sigma."""
    whole = simulate(d_min=5.0, photons=2000.0, one_minus_r2=0.5, **PLAIN)
    order = np.lexsort((np.random.default_rng(0).random(len(whole.refl_id)), whole.refl_id))
    _, first = np.unique(whole.refl_id[order], return_index=True)
    rank = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    quarter = whole.subset(np.sort(order[rank % 4 == 0]))
    sigmas, counts = [], []
    for experiment in (whole, quarter):
        merging = experiment.merging(**KNOWN_SCALES)
        merging.merger.scale.requires_grad_(False)
        merging.merger.scale.start = lambda *_: None
        fit(merging, n_steps=100)
        q = merging.merger.inference()
        sigmas.append(q.variance.sqrt().detach() * merging.table.unit_intensity**0.5)
        counts.append(merging.merger.n_obs.double())
        strong = q.concentration > 30
    ratio = (sigmas[1] / sigmas[0])[strong]
    expected = (counts[0] / counts[1]).sqrt()[strong]
    assert len(ratio) > 50
    assert (ratio / expected).median().item() == pytest.approx(1.0, abs=0.03)


def test_weak_data_fall_back_to_the_prior():
    """Noise ten times Sigma, uncoupled: q(F) is Wilson's law, and its divergence small."""
    experiment = simulate(d_min=5.0, photons=1.0, background=2000.0, span_deg=90.0, **PLAIN)
    merging = experiment.merging(**KNOWN_SCALES, n_wilson_knots=2, anisotropic=False)
    merger, wilson = merging.merger, merging.merger.prior.part(Wilson)
    for part in (merger.scale, merger.likelihood, wilson):
        part.requires_grad_(False)
    merger.scale.start = lambda *_: None
    wilson.start = lambda *_: None
    with torch.no_grad():
        wilson.log_sigma.fill_(-np.log(merging.table.unit_intensity))
    fit(merging, n_steps=100)
    q = merger.inference()
    acentric = ~wilson.is_centric & (merger.n_obs > 0)
    assert q.concentration[acentric].median().item() == pytest.approx(1.0, abs=0.15)
    sigma = q.spread[acentric].median().item() * merging.table.unit_intensity
    assert sigma == pytest.approx(1.0, abs=0.15)
    assert merger.prior.kl(q)[merger.n_obs > 0].median() < 0.05


# --- error model and priors


def test_error_model_is_recovered(fitted):
    found = fitted.merger.likelihood.error_parameters
    assert found["sdadd"] == pytest.approx(0.02, abs=0.004)
    assert found["sdfac"] == pytest.approx(1.0, abs=0.12)
    assert found["dof"] > 30  # there are no outliers


def test_wilson_sigma_is_recovered(fitted):
    true = fitted.experiment.truth.wilson_sigma
    factor = (fitted.amplitude / fitted.experiment.truth.amplitude) ** 2
    sigma = fitted.merger.prior.part(Wilson).wilson_sigma().detach().numpy()
    ratio = np.log(sigma * fitted.merging.table.unit_intensity / (true * factor))
    # about 90 reflections on each of 12 knots, mates alike: 15 %
    assert abs(ratio.mean()) < 0.1
    assert ratio.std() < 0.2


def test_friedel_correlation_is_recovered(fitted):
    found = fitted.merger.prior.part(DoubleWilson).one_minus_r2
    # 0.01 was simulated; 500 pairs in all determine it to 7 %, and shells lean on each other
    assert found.mean().item() == pytest.approx(0.01, rel=0.2)
    assert ((found > 0.005) & (found < 0.02)).all()


# --- how observations count


def test_prior_counts_once_per_tree(fitted):
    """Each pair of mates with an observation weighs 1 in the full batch, the others 0."""
    merger, table = fitted.merger, fitted.merging.table
    weight = merger.loss(table.everything(), merger.inference()).row_weight
    observed = torch.zeros(merger.n_groups, dtype=torch.bool)
    observed[merger.group[table.terms.row]] = True
    assert torch.equal(weight, observed[merger.group].double())


def test_rejected_observations_take_no_prior_with_them():
    """When the integrator rejects some, the rest of their tree still has the whole prior."""
    merging = simulate(d_min=6.0).merging()
    merger, n = merging.merger, len(merging.table.observations)
    used = merging.used(torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.6)

    def weights():
        return merger.loss(used.everything(), merger.inference()).row_weight

    before = weights()
    assert ((before > 0) & (before < 1)).any()
    merger.count(used)
    assert set(weights().tolist()) <= {0.0, 1.0}
    assert int(merger.n_obs.sum()) == int(used.observations.is_used.sum())
    assert int(merger.n_obs.sum()) == int(merger.n_group.sum())


def test_start_is_near_the_data(fitted):
    merging = fitted.experiment.merging()
    merger = merging.merger
    merger.count(merging.table)
    for begin, spread in ((start_amplitudes, 0.15), (start, 0.08)):
        begin(merger, merging.table)
        q = merger.inference()
        amplitude = q.spread.sqrt().detach().numpy() * merging.table.unit_intensity**0.5
        # scales unknown yet: a tenth; then those of the frames are known
        strong = fitted.is_seen & (fitted.amplitude > 30)
        assert np.log(amplitude / fitted.amplitude)[strong].std() < spread
        assert torch.isfinite(q.spread).all()
        assert torch.isfinite(q.concentration).all()


def test_amplitudes_are_nan_where_nothing_was_observed(fitted):
    unseen = torch.as_tensor(fitted.is_seen.nonzero()[0][:7])
    kept = fitted.merging.used(~torch.isin(fitted.merging.row, unseen))
    merged = rows(fitted.merging, kept)
    others = torch.as_tensor(fitted.is_seen).clone()
    others[unseen] = False
    for column in (merged.amplitude, merged.sigma_amplitude, merged.intensity):
        assert torch.isnan(column[unseen]).all()
        assert torch.isfinite(column[others]).all()
    assert (merged.n_obs[unseen] == 0).all()


def test_halves_are_independent_and_make_the_whole(fitted):
    merging = fitted.merging
    half = torch.rand(len(merging.row), generator=torch.Generator().manual_seed(0)) < 0.5
    one, two = (rows(merging, merging.used(h)) for h in (half, ~half))
    whole = rows(merging)
    assert torch.equal(one.n_obs + two.n_obs, whole.n_obs)
    w1, w2 = one.sigma_intensity**-2, two.sigma_intensity**-2
    both = (one.n_obs > 0) & (two.n_obs > 0)
    assert both.sum() > 500
    joined = (w1 * one.intensity + w2 * two.intensity) / (w1 + w2)
    torch.testing.assert_close(joined[both], whole.intensity[both], rtol=1e-9, atol=1e-9)


def test_an_outlier_loses_its_say(fitted):
    merging = fitted.merging
    table, counts = merging.table, merging.table.observations.measured
    number = int(counts.effective_counts.argmax())
    a = counts.effective_counts.clone()
    a[number] *= 5
    used = table.observations.is_used
    spoiled = table.measured_as(replace(counts, effective_counts=a), used)
    clean, found = (scaled_observations(merging.merger, t) for t in (table, spoiled))
    # Student's t of many degrees of freedom still takes the weight away
    assert found.variance[number] > 20 * clean.variance[number]
    row = int(merging.row[number])
    before, after = rows(merging), rows(merging, spoiled)
    shift = (after.intensity - before.intensity)[row].abs() / before.sigma_intensity[row]
    assert shift < 1.5


# --- the objective


def test_gradient_of_the_whole_objective():
    """Finite differences of the merge's ELBO by one parameter of each kind."""
    merging = simulate(d_min=6.0, relative_error=0.02).merging()
    merger, batch = merging.merger, merging.table.everything()
    start(merger, merging.table)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in merger.named_parameters():
            if "likelihood" not in name:
                p.add_(0.05 * torch.randn_like(p))
    value = lambda: elbo(merger.loss(batch, merger.inference()))  # noqa: E731
    value().backward()
    for name, p in merger.named_parameters():
        if not p.requires_grad:
            continue
        k = int(p.grad.abs().argmax())
        flat, step = p.data.view(-1), 1e-5
        with torch.no_grad():
            flat[k] += step
            high = value().item()
            flat[k] -= 2 * step
            low = value().item()
            flat[k] += step
        exact = (high - low) / (2 * step)
        assert p.grad.view(-1)[k].item() == pytest.approx(exact, rel=1e-4), name
